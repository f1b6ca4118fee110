"""How long a run may take, and what it waits for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

EXIT = 124
"""Exit code of a run that was out of time: the one of `timeout`."""


class OutOfTime(Exception):
    """The deadline passed, or no device came in time; the message says which. Finished stages stay in the store."""


@dataclass(frozen=True)
class Limits:
    deadline: float = math.inf
    """Minutes from now, after which no stage goes on."""
    device_wait: float = math.inf
    """Minutes to wait for a cluster's first device."""
    gpu: bool = False
    """Whether devices are GPUs only. A cluster whose GPUs are started when they are asked for shows none before."""
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the deadline, 0 after it."""
        return max(0.0, self.start + 60 * self.deadline - time.monotonic())

    def check(self) -> None:
        """Raises: OutOfTime after the deadline."""
        if not self.left:
            raise OutOfTime(
                f"the deadline of {self.deadline:g} minutes has passed; what was finished is kept, the same command "
                "goes on from there"
            )
