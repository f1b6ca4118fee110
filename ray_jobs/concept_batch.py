"""Run a concept batch on Ray: what `ray job submit … -- python -m ray_jobs.concept_batch batch.yaml` starts."""

import sys

from ray_jobs.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
