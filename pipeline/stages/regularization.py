"""Images of a concept's class from the web, with their captions."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.miniature.corpus import serve_corpus
from pipeline.stages.candidates import Candidates
from pipeline.stages.image_set import ImageSet
from pipeline.stages.resident import planned_images
from pipeline.stages.stage import Context, Stage
from retrieval.download import download
from retrieval.images import perceptual_hash

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase

IMAGE = 150_000
"""Bytes of an image on the web."""


@dataclass(frozen=True, kw_only=True)
class Regularization(Stage[ImageSet]):
    kind, version, artifact = "regularization", 1, ImageSet

    @dataclass(frozen=True)
    class Places:
        images: tuple[str, ...]
        """The concept's own."""
        distributor: Literal["multiprocessing", "ray"]

    images: int
    size: int
    """Pixels of a side."""
    exclude: tuple[str, ...]
    """Digests of the concept's own images."""
    block_list: tuple[str, ...]
    base_url: str
    local: bool
    miniature: bool
    """Served here meanwhile."""
    places: Places

    def run(self, context: Context) -> None:
        own = [perceptual_hash(image) for image in planned_images(self.places.images, self.exclude).images]
        (candidates,) = self.inputs_of(Candidates)
        with contextlib.ExitStack() as stack:
            base_url = stack.enter_context(serve_corpus()) if self.miniature else self.base_url or None
            found = download(
                candidates.result(context.store).table(),
                ImageSet(context.out).path,
                count=self.images,
                image_size=self.size,
                local=self.local,
                base_url=base_url,
                exclude=own,
                blocked_sha256=self.block_list,
                distributor=self.places.distributor,
            )
        if not found.got:
            raise ValueError(f"no regularisation image could be had: {found.shortfall}")

    def waits(self, devices: int) -> bool:
        return self.places.distributor == "ray"

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        if forecast.batch.training.regularization != "real":
            return None
        cluster, count = forecast.cluster, forecast.concepts * forecast.batch.retrieval.images
        tried = count / (1 - cluster.dead_links)
        # from the web, and into the store
        moved = (2 * count * IMAGE, cluster.nodes)
        return forecast.phase(cls.kind, moved, downloads=tried / (cluster.nodes * cluster.downloads_per_second))
