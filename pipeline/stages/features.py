"""What a training reads of a concept: latents of its images, and those of its regularisation images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cost.estimate import Device, Estimate
from pipeline.cost.model_size import ModelSize
from pipeline.stages.generated import Generated
from pipeline.stages.regularization import IMAGE, Regularization
from pipeline.stages.resident import planned_images, resident_base
from pipeline.stages.stage import Artifact, Context, Stage
from training.features import ConceptFeatures, RegularizationFeatures, concept_features, regularization_features

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase


class FeatureFiles(Artifact):
    @property
    def own(self) -> Path:
        return self.folder / "concept.safetensors"

    @property
    def prior(self) -> Path:
        """Not there without regularisation."""
        return self.folder / "regularization.safetensors"

    def concept(self) -> ConceptFeatures:
        return ConceptFeatures.load(self.own)

    def regularization(self) -> RegularizationFeatures | None:
        return RegularizationFeatures.load(self.prior) if self.prior.exists() else None


@dataclass(frozen=True, kw_only=True)
class Features(Stage[FeatureFiles]):
    kind, version, on_device, at_once, artifact = "features", 2, True, 4, FeatureFiles

    @dataclass(frozen=True)
    class Places:
        images: tuple[str, ...]
        base: str

    base: str
    images: tuple[str, ...]
    """Digests."""
    seed: int
    views: int
    """Augmented ones of each image; 0 for the image as it is."""
    whole_from: float | None = None
    flip: bool = False
    places: Places

    def run(self, context: Context) -> None:
        backbone = resident_base(self.places.base)
        own = planned_images(self.places.images, self.images)
        made = FeatureFiles(context.out)
        concept_features(
            backbone,
            own.images,
            own.digests,
            views=self.views or 1,
            augment=self.views > 0,
            seed=self.seed,
            flip=self.flip,
        ).save(made.own)
        for source in self._sources():
            samples = source.result(context.store).load()
            regularization_features(backbone, samples, seed=self.seed, flip=self.flip).save(made.prior)

    def _sources(self) -> list[Regularization | Generated]:
        """Of regularisation images: one, or none."""
        return [*self.inputs_of(Regularization), *self.inputs_of(Generated)]

    def estimate(self, model: ModelSize, device: Device, together: int = 1) -> Estimate:
        own = len(self.images) * max(1, self.views)
        prior = sum(source.images for source in self._sources())
        latent = 4.0 * model.latent_numbers
        return Estimate(
            (own + prior) * model.vae_flops / device.speed,
            device.resident_gib(model),
            disk=own * latent + prior * (latent + 4.0 * model.text_numbers),
        )

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        image = {"real": IMAGE, "generated": forecast.image_bytes, "none": 0}
        sets = forecast.concepts * forecast.batch.retrieval.images * image[forecast.batch.training.regularization]
        return forecast.phase(
            cls.kind,
            (forecast.concepts * feature_bytes(forecast) + sets, forecast.cluster.nodes),
            memory=forecast.whole_bytes,
            GPUs=forecast.rounds * _views(forecast) * forecast.model.vae_flops / forecast.float32,
        )


def _views(forecast: Forecast) -> int:
    """Of a concept of five images, and of its regularisation."""
    training = forecast.batch.training
    prior = 0 if training.regularization == "none" else forecast.batch.retrieval.images
    return 5 * (training.views if training.augment else 1) + prior


def feature_bytes(forecast: Forecast) -> int:
    """Of a concept's latents."""
    return 4 * forecast.model.latent_numbers * _views(forecast)
