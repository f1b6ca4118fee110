"""One file for each stage: what determines its result, how it is made, what it costs, what is in it."""

from __future__ import annotations

from typing import Any

from pipeline.stages.candidates import Candidates
from pipeline.stages.compose import Compose
from pipeline.stages.constraints import Constraints
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.features import Features
from pipeline.stages.generated import Generated
from pipeline.stages.index import Index
from pipeline.stages.merge import Merge
from pipeline.stages.regularization import Regularization
from pipeline.stages.release import Release
from pipeline.stages.released import Released
from pipeline.stages.stage import Stage
from pipeline.stages.sums import AddUp
from pipeline.stages.train import Train

STAGES: tuple[type[Stage[Any]], ...] = (
    Index,
    Candidates,
    Regularization,
    Generated,
    Features,
    Train,
    Constraints,
    AddUp,
    Merge,
    Released,
    Evaluate,
    Compose,
    Release,
)
"""All of them; each reads only results of those before it."""
