"""What all stages have in common. A stage is one step from artifacts to an artifact: it says what determines its
result, how to make it, what that costs, and what is in it."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.cost.estimate import Device, Estimate
from pipeline.cost.model_size import ModelSize
from pipeline.store import Store, content_key
from retrieval.index import search
from retrieval.select import Search

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase

Progress = Callable[["Stage", str, int, int], None]
"""Called with the stage, what is counted, how many are done, and how many there are."""


class Workers(Protocol):
    """The processes beside this one that a runner has for a stage that can use several."""

    @property
    def devices(self) -> int:
        """How many there are in all."""
        ...

    def search(self, index: Callable[[], Path]) -> Search:
        """A search of the caption index in the folder that `index` finds on whichever machine it is called; `index` can
        be pickled."""
        ...

    def encode(self, corpus: str, clip: str) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """Unit text features, (n, d) float32, of a corpus of several files, beside their rows, in the corpus's
        order."""
        ...

    def on_ranks(self, count: int, task: Callable[[Progress], dict[str, str]], name: str) -> dict[str, str]:
        """Call a task, which can be pickled, in so many processes that torch.distributed knows as ranks. Returns what
        the first of them did."""
        ...


class Alone:
    """This process, and no other."""

    devices = 1

    def search(self, index: Callable[[], Path]) -> Search:
        return search

    def encode(self, corpus: str, clip: str) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        raise ValueError("several devices encode a corpus, and there is one")

    def on_ranks(self, count: int, task: Callable[[Progress], dict[str, str]], name: str) -> dict[str, str]:
        raise ValueError(f"{name}: trains on {count} ranks, which only Ray starts")


@dataclass(frozen=True)
class Context:
    """What a stage gets to make its artifact. store: where its inputs are; out: the folder to fill; scratch: a folder
    for what is not to be kept."""

    store: Store
    out: Path
    scratch: Path
    progress: Callable[[str, int, int], None]
    workers: Workers


@dataclass(frozen=True)
class Artifact:
    """What a stage made, in its folder. Its subclasses know the files."""

    folder: Path


Made = TypeVar("Made", bound=Artifact, covariant=True)
S = TypeVar("S", bound="Stage[Any]")
P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class Stage(ABC, Generic[Made]):
    """Fields of subclasses are hashed, and so all that determines the result besides the inputs is a field. One that is
    at its default is left out of the hash: give a new field a default that means what stores have already.

    A field `places` says where things are found and how fast the result comes; it is not hashed.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    """Raised when the code makes other results from the same fields."""
    on_device: ClassVar[bool] = False
    """Whether it runs a model: on a GPU, where there is any."""
    at_once: ClassVar[int] = 1
    """How many of its kind share a machine's cores where there is no GPU, and what they run is a model. However many
    there are to do, and whatever runs beside them: the number of threads changes rounding, and a stage is to give the
    same bits each time."""
    artifact: ClassVar[type[Any]] = Artifact

    name: str
    inputs: tuple[Stage[Any], ...] = ()

    def hashed(self) -> dict[str, Any]:
        """The fields that determine the result, JSON values."""
        return _plain(self, leave_out=("name", "inputs", "places"))

    @functools.cached_property
    def key(self) -> str:
        return content_key([self.kind, self.version, self.hashed(), [stage.key for stage in self.inputs]])

    def inputs_of(self, kind: type[S]) -> list[S]:
        return [stage for stage in self.inputs if isinstance(stage, kind)]

    def is_in(self, store: Store) -> bool:
        return store.has(self.kind, self.key)

    def result(self, store: Store) -> Made:
        """Raises: FileNotFoundError when the store does not have it."""
        return self.artifact(store.path(self.kind, self.key))

    @contextmanager
    def making(self, store: Store, **facts: Any) -> Iterator[Path]:
        """The folder to fill; on leaving the block, the artifact is whole in the store. facts: for its manifest."""
        with store.create(self.kind, self.key, {"name": self.name, "params": self.hashed(), **facts}) as out:
            yield out

    def run(self, context: Context) -> None:
        """Fill `context.out`; the inputs are in the store."""
        raise NotImplementedError

    def estimate(self, model: ModelSize, device: Device, together: int = 1) -> Estimate:
        """What it costs. model: its base; together: how many of its kind are done as one job."""
        return Estimate()

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        """What all stages of this kind take on a cluster; None where there are none, or they take next to nothing."""
        return None

    # how a runner goes about it

    @property
    def ranks(self) -> int:
        """Processes that make the result together, each with a device of its own; 0 for a stage that is not shared."""
        return 0

    def waits(self, devices: int) -> bool:
        """Whether its process only waits for others that it has the runner start, which take the resources."""
        return self.ranks > 0

    @classmethod
    def jobs(cls, stages: Sequence[Self], devices: int, device: Callable[[], Device]) -> list[tuple[Self, ...]]:
        """Stages that one process does one after the other, or at once. devices: how many there are; device: looks at
        the smallest."""
        return [(stage,) for stage in stages]

    @classmethod
    def run_job(cls, stages: Sequence[Self], store: Store, progress: Progress, workers: Workers) -> dict[str, str]:
        """Make the artifacts of a job, of those that the store does not have; their inputs are in it.

        Returns: key -> why, of the stages that could not be done though the others were.
        """
        for stage in stages:
            if not stage.is_in(store):
                for source in stage.inputs:  # before the time is taken
                    source.result(store)
                with stage.making(store) as out:
                    report = functools.partial(progress, stage)
                    stage.run(Context(store, out, store.scratch(stage.key), report, workers))
        return {}


def run_stage(stage: Stage[Made], store: Store, progress: Progress, workers: Workers | None = None) -> Made:
    """Make a stage's artifact, by itself, unless the store has it; its inputs must be there.

    Raises: ValueError when it cannot be done.
    """
    for why in type(stage).run_job([stage], store, progress, workers or Alone()).values():
        raise ValueError(why)
    return stage.result(store)


def part_of(part: type[P], settings: object, **more: Any) -> P:
    """A dataclass that has a part of some settings. more: fields that are not, or not as they stand there."""
    names = {field.name for field in dataclasses.fields(part)} - more.keys()  # type: ignore[arg-type]
    return part(**{name: getattr(settings, name) for name in names}, **more)


def _plain(value: Any, leave_out: Sequence[str] = ()) -> Any:
    """JSON values; fields at their default are left out."""
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.name not in leave_out]
        return {f.name: _plain(own) for f in fields if (own := getattr(value, f.name)) != f.default}
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, (list, tuple)) else value
