"""The captions of a corpus, encoded with CLIP."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.miniature.corpus import write_corpus
from pipeline.stages.stage import Artifact, Context, Stage
from retrieval.clip import load_clip
from retrieval.corpus import corpus_files, corpus_rows, precomputed, read_corpus
from retrieval.index import build_index, build_index_from_blocks, build_index_from_embeddings, read_header

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase

ROW, VECTOR = 200, 512
"""Bytes of a caption with its URL; numbers of its CLIP vector."""


class CaptionIndex(Artifact):
    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def counts(self) -> Path:
        """A file with the corpus's rows, and those that could be used; not there in stores of earlier versions."""
        return self.folder / "corpus.json"


@dataclass(frozen=True, kw_only=True)
class Index(Stage[CaptionIndex]):
    kind, version, on_device, artifact = "index", 1, True, CaptionIndex

    @dataclass(frozen=True)
    class Places:
        corpus: str
        clip: str

    corpus: str
    """Digest of what is in it."""
    clip: str
    """Digest of the model."""
    places: Places

    def run(self, context: Context) -> None:
        made, corpus = CaptionIndex(context.out), self.places.corpus
        if corpus == "miniature":
            rows = int(self.corpus.rsplit("-", 1)[1])
            corpus = str(context.scratch / "corpus.parquet")
            write_corpus(Path(corpus), rows, seed=0)
        clip = load_clip(self.places.clip)
        if pairs := precomputed(corpus):
            build_index_from_embeddings(pairs, made.index, clip=clip)
        elif self.waits(context.workers.devices):
            blocks = context.workers.encode(corpus, self.places.clip)
            build_index_from_blocks(blocks, made.index, model=clip.digest)
        else:
            build_index(read_corpus(corpus), clip.encode_text, made.index, model=clip.digest)
        counts = {"rows": corpus_rows(corpus), "used": read_header(made.index)["rows"]}
        made.counts.write_text(json.dumps(counts))

    def waits(self, devices: int) -> bool:
        """For the encoding of a corpus that several devices can share: one of more than one file."""
        corpus = self.places.corpus
        if devices < 2 or corpus == "miniature" or precomputed(corpus):
            return False
        return len(corpus_files(corpus)) > 1

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        if forecast.batch.training.regularization != "real":
            return None
        captions, size = forecast.captions, index_bytes(forecast)
        # all nodes read captions and send vectors in float32 to one, which writes the index
        moved = ((captions * ROW, forecast.cluster.nodes), (captions * (ROW + VECTOR * 4) + size, 1))
        encoding = captions / (forecast.gpus * forecast.cluster.captions_per_second)
        return forecast.phase(cls.kind, *moved, GPUs=encoding)


def index_bytes(forecast: Forecast) -> int:
    return forecast.captions * (ROW + VECTOR * 2)  # half precision
