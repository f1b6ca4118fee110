"""What one stage says that it costs; `pipeline.cost.of_plan` asks all of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cost.model_size import ModelSize

PROCESS = 0.9 * 2**30
"""Bytes of a process that has imported everything and done a step, beyond tensors; measured on the CPU."""


@dataclass(frozen=True)
class Estimate:
    """seconds: None where it depends on the network or the corpus. gib: peak memory of the stage's process. disk: bytes
    that it leaves in the store, at least; scratch: bytes that it needs there meanwhile."""

    seconds: float | None = None
    gib: float | None = None
    disk: float = 0.0
    scratch: float = 0.0


@dataclass(frozen=True)
class Device:
    """What a stage runs on. memory: bytes that it may take. cuda: a GPU, else a process on a machine's cores. speed:
    operations a second that the models reach on it."""

    memory: float
    cuda: bool
    speed: float = 1.0

    def resident_gib(self, model: ModelSize) -> float:
        """With the whole base in float32, without what is computed with it."""
        return (model.parameters * 4 + (0 if self.cuda else PROCESS)) / 2**30
