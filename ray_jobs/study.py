"""`polyconcept study`: make what a study compares, all at once, then its tables and figures."""

from __future__ import annotations

from pathlib import Path

from pipeline.study import cases, check_output, load_study, store_of, write_study
from ray_jobs.concept_batch import StageFailed, ray_session, run_stages
from training.backbone import load_backbone


def run_study(path: Path) -> Path:
    """Do all that a study file asks for and is not done yet; returns the folder of its tables.

    Raises: ValueError for bad input, before anything runs; StageFailed naming what failed.
    """
    study = load_study(path)
    made = list(cases(study, path))
    check_output(study, made)
    store = store_of(study, path)
    stages = {stage.key: stage for case in made for stage in case.plan}
    if not all(stage.is_in(store) for stage in stages.values()):
        with ray_session():
            if failed := run_stages([case.plan for case in made], store):
                raise StageFailed("\n".join(failed))
    folder = Path(study.output).expanduser()
    write_study(study, made, store, load_backbone(made[0].plan.batch.base_path), folder)
    return folder
