"""Why a stage was not done. In a module of its own, which needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


class StageFailed(ValueError):
    """Stages could not be done; the message names each and says why. Finished stages stay in the store."""


@dataclass(frozen=True)
class Failure:
    """fault: the traceback of what should not happen."""

    message: str
    fault: str = ""
