"""Regularisation images as stages leave them, retrieved or generated."""

from __future__ import annotations

from pathlib import Path

from pipeline.stages.stage import Artifact
from retrieval.regularization import RegularizationSet


class ImageSet(Artifact):
    @property
    def path(self) -> Path:
        return self.folder / "set"

    def load(self) -> RegularizationSet:
        return RegularizationSet.load(self.path)
