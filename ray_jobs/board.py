"""What a batch's driver and its tasks tell each other. In a module of its own: its process needs no PyTorch, and
starts at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ray

from pipeline.failure import Failure

PACKAGES = ("training", "retrieval", "pipeline")


def lost(error: ray.exceptions.RayError) -> Failure:
    """Of a task that could not begin, or whose process died more often than Ray tries again."""
    why = getattr(error, "cause", None) or error
    return Failure(f"{type(why).__name__}: {why}")


class Notes(logging.Handler):
    """Brings warnings that this process logs to the board, for the driver to print."""

    def __init__(self, board: Any) -> None:
        super().__init__(logging.WARNING)
        self.board = board

    def emit(self, record: logging.LogRecord) -> None:
        self.board.note.remote(record.getMessage())

    @classmethod
    def go_to(cls, board: Any) -> None:
        """From now on, in place of the board before: processes are used for several tasks."""
        for package in PACKAGES:
            logging.getLogger(package).handlers = [cls(board)]


class Board:
    """How far each stage is and what deserves a note, which workers write and the driver reads, and how tasks ended:
    one process, in which any number of calls wait."""

    def __init__(self) -> None:
        self.state: dict[str, tuple[str, int, int]] = {}
        self.notes: list[str] = []

    async def put(self, key: str, what: str, done: int, total: int) -> None:
        self.state[key] = (what, done, total)

    async def note(self, text: str) -> None:
        self.notes.append(text)

    async def get(self) -> tuple[dict[str, tuple[str, int, int]], list[str]]:
        """How far each stage is, and all notes so far."""
        return self.state, self.notes

    async def ended(self, keys: Sequence[str], task: Sequence[Any]) -> dict[str, Failure]:
        """What a task of `_work` returns when it has ended, or that all its stages failed when it is lost: what waits
        for this is not lost with it.

        task: its reference, in a list: else this call would wait for it, and be lost with it.
        """
        try:
            return await task[0]
        except ray.exceptions.RayError as error:
            return dict.fromkeys(keys, lost(error))
