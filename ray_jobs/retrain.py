"""Retraining on Ray: what a nightly cron starts, `python -m ray_jobs.retrain retrain.yaml`."""

import sys

from ray_jobs.cli import main

if __name__ == "__main__":
    main(["retrain", *sys.argv[1:]])
