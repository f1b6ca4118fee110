"""The captions nearest to a class prompt."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cost.estimate import Device
from pipeline.stages.index import VECTOR, CaptionIndex, Index, index_bytes
from pipeline.stages.stage import Artifact, Progress, Stage, Workers
from pipeline.store import Store, content_key
from retrieval.clip import load_clip
from retrieval.select import HITS_AT_ONCE, candidates_by_class, left_out

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase


class CandidateTable(Artifact):
    @property
    def file(self) -> Path:
        return self.folder / "candidates.parquet"

    def table(self) -> pa.Table:
        return pq.read_table(self.file)

    def left_out(self) -> dict[str, int]:
        """See `retrieval.select.left_out`."""
        return left_out(pq.read_schema(self.file))

    def corpus_rows(self) -> tuple[int, int] | None:
        """How many the corpus has, and how many of them could be used; None in stores of earlier versions."""
        counts = CaptionIndex(self.folder).counts
        if not counts.exists():
            return None
        found = json.loads(counts.read_text())
        return found["rows"], found["used"]


@dataclass(frozen=True, kw_only=True)
class Candidates(Stage[CandidateTable]):
    kind, version, on_device, artifact = "candidates", 1, True, CandidateTable

    @dataclass(frozen=True)
    class Places:
        clip: str

    prompt: str
    count: int
    max_nsfw: float | None
    block_list: tuple[str, ...]
    """sha256 sums."""
    places: Places

    def waits(self, devices: int) -> bool:
        return True

    @classmethod
    def jobs(cls, stages: Sequence[Self], devices: int, device: Callable[[], Device]) -> list[tuple[Self, ...]]:
        """All class prompts are one search of an index."""
        alike: dict[str, list[Self]] = {}
        for stage in stages:
            (index,) = stage.inputs_of(Index)
            key = content_key([index.key, stage.count, stage.max_nsfw, stage.block_list])
            alike.setdefault(key, []).append(stage)
        return [tuple(group) for group in alike.values()]

    @classmethod
    def run_job(cls, stages: Sequence[Self], store: Store, progress: Progress, workers: Workers) -> dict[str, str]:
        todo = [stage for stage in stages if not stage.is_in(store)]
        if not todo:
            return {}
        first, (index,) = todo[0], todo[0].inputs_of(Index)
        built = index.result(store)
        tables = candidates_by_class(
            built.index,
            load_clip(first.places.clip),
            [stage.prompt for stage in todo],
            first.count,
            max_nsfw=first.max_nsfw,
            blocked_sha256=first.block_list,
            search=workers.search(functools.partial(_index_folder, store.root, index)),
        )
        for stage, table in zip(todo, tables, strict=True):
            with stage.making(store) as out:
                pq.write_table(table, CandidateTable(out).file)
                if built.counts.exists():
                    shutil.copy(built.counts, out)  # for the report, which does without the index
        return {}

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        if forecast.batch.training.regularization != "real":
            return None
        cluster, concepts, captions = forecast.cluster, forecast.concepts, forecast.captions
        # all the classes whose hits fit in memory are multiplied with each block that is read
        depth = 4 * round(forecast.batch.retrieval.images * forecast.batch.retrieval.oversample)
        scans = math.ceil(concepts / max(1, HITS_AT_ONCE // depth))
        return forecast.phase(
            cls.kind,
            (cluster.nodes * index_bytes(forecast), cluster.nodes),
            disks=scans * captions * VECTOR * 2 / 2**30 / (cluster.nodes * cluster.scan_gib_per_second),
            CPUs=2 * concepts * captions * VECTOR / (cluster.nodes * forecast.cores),
        )


def _index_folder(root: str, index: Index) -> Path:
    return index.result(Store(root)).index
