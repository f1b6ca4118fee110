"""Images of a concept's class that the base draws itself (DreamBooth's prior preservation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.cost.estimate import Device, Estimate
from pipeline.cost.model_size import ModelSize
from pipeline.sampling import draw
from pipeline.stages.image_set import ImageSet
from pipeline.stages.resident import resident_base
from pipeline.stages.stage import Context, Stage
from retrieval.regularization import RegularizationSet
from training.attention import use_attention

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase


@dataclass(frozen=True, kw_only=True)
class Generated(Stage[ImageSet]):
    """Concepts of one class have one key, whatever the seed of the training, so they are drawn once."""

    kind, version, on_device, at_once, artifact = "generated", 1, True, 4, ImageSet

    @dataclass(frozen=True)
    class Places:
        base: str
        attention: Literal["auto", "xformers", "sdpa"]

    base: str
    prompt: str
    images: int
    steps: int
    guidance: float
    safety_checker: bool | None = None
    """False where the base has one: it is not used."""
    places: Places

    def run(self, context: Context) -> None:
        backbone = resident_base(self.places.base)
        use_attention(backbone.unet, self.places.attention)
        images = draw(
            backbone,
            [self.prompt] * self.images,
            seeds=list(range(self.images)),
            steps=self.steps,
            guidance=self.guidance,
            progress=lambda done: context.progress("images", done, self.images),
        )
        RegularizationSet.generated(ImageSet(context.out).path, images, self.prompt)

    def estimate(self, model: ModelSize, device: Device, together: int = 1) -> Estimate:
        operations = self.images * self.steps * 2 * model.unet_flops
        return Estimate(operations / device.speed, device.resident_gib(model))

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        if forecast.batch.training.regularization != "generated":
            return None
        count = forecast.batch.retrieval.images
        return forecast.phase(
            cls.kind,
            (forecast.concepts * count * forecast.image_bytes, forecast.cluster.nodes),
            memory=forecast.whole_bytes,
            GPUs=forecast.rounds * count * forecast.drawing_flops / forecast.float32,
        )
