"""Several sets of weights that train at once over one resident base, and what becomes of each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from pipeline.sampling import draw, grid
from pipeline.stages.features import Features
from pipeline.stages.resident import resident_base
from pipeline.stages.stage import Artifact, Progress
from pipeline.store import Store
from training.attention import training_dtype, use_attention
from training.backbone import Backbone
from training.loop import train
from training.run import Member, TrainingConcept, TrainingDiverged, TrainingSettings
from training.strategies import Single
from training.weights import ConceptWeights

if TYPE_CHECKING:
    from pipeline.stages.train import Train


class Trained(Artifact):
    @property
    def file(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def tensorboard(self) -> Path:
        """Not there when nothing was logged."""
        return self.folder / "tensorboard"

    def weights(self) -> ConceptWeights:
        return ConceptWeights.load(self.file)

    def losses(self) -> list[float]:
        """Of each step."""
        with safe_open(self.file, framework="np") as file:
            return json.loads(file.metadata()["polyconcept"])["losses"]

    def grids(self) -> list[tuple[int, Path]]:
        """Grids of samples, and the steps they were drawn at."""
        return [(int(path.stem.split("-")[1]), path) for path in sorted(self.folder.glob("samples-*.png"))]


def train_pack(
    stages: Sequence[Train], store: Store, progress: Progress, strategy: Single | None = None
) -> dict[str, str]:
    """Train the stages as one concept pack over one resident base; those the store has are left out.

    Each artifact is written as its member ends. strategy: how the ranks that call this alike share the work.
    Returns: key -> why, of the stages whose training diverged or whose features cannot be read.
    """
    strategy = strategy or Single()
    todo = [stage for stage in stages if not stage.is_in(store)]
    if not todo:
        return {}
    places = todo[0].places
    backbone = _prepared(todo[0])
    failures: dict[str, str] = {}
    members: list[Member] = []
    stage_of: dict[int, Train] = {}
    for stage in todo:
        try:
            members.append(member_of(stage, store))
        except (ValueError, OSError) as error:  # damaged features are to sink no other member
            if strategy.ranks > 1:  # the others would wait for this one
                raise
            failures[stage.key] = str(error)
            continue
        stage_of[id(members[-1])] = stage
    if not members:
        return failures

    def report_step(member: Member, step: int, loss: float) -> None:
        if strategy.rank == 0:
            progress(stage_of[id(member)], "steps", step, member.settings.steps)

    seconds, since, active = 0.0, time.time(), len(members)
    with backbone.compiled() if places.compile else contextlib.nullcontext():
        sample = _sampler(backbone, writes=strategy.rank == 0)
        for member, result in train(backbone, members, strategy=strategy, sample=sample, progress=report_step):
            now = time.time()
            seconds += (now - since) / active  # its part of the pack's
            since, active = now, active - 1
            if isinstance(result, TrainingDiverged):
                failures[stage_of[id(member)].key] = str(result)
            elif strategy.rank == 0:
                _keep(stage_of[id(member)], store, member.scratch, result, seconds)
    return failures


def _prepared(stage: Train) -> Backbone:
    """The base as the members of a stage's pack train it."""
    backbone = resident_base(stage.places.base, training_dtype(stage.training.precision))
    use_attention(backbone.unet, stage.places.attention)
    if stage.places.gradient_checkpointing:
        backbone.unet.enable_gradient_checkpointing()
    else:
        backbone.unet.disable_gradient_checkpointing()
    return backbone


def member_of(stage: Train, store: Store) -> Member:
    """What a stage says, with the features of its concepts."""
    values = dataclasses.asdict(stage.training)
    for key in ("precision", "regularization"):
        values.pop(key)
    places = stage.places
    settings = TrainingSettings(**values, checkpoint_every=places.checkpoint_every, sample_every=places.sample_every)
    concepts = []
    for (name, concept), source in zip(stage.concepts.items(), stage.inputs_of(Features), strict=True):
        files = source.result(store)
        features, prior = files.concept(), files.regularization()
        concepts.append(TrainingConcept(name, concept.token, concept.initializer, concept.class_word, features, prior))
    return Member(concepts, settings, store.scratch(stage.key))


def _sampler(backbone: Backbone, *, writes: bool) -> Callable[[Member, Path, int], None]:
    """Draws a member's concepts to a file; writes: whether this rank does, as all have to draw."""

    def sample(member: Member, path: Path, step: int) -> None:
        prompts = [member.settings.prompt.format(c.phrase) for c in member.concepts for _ in range(4)]
        with torch.compiler.set_stance("force_eager"):  # of other shapes
            images = draw(backbone, prompts, seeds=list(range(len(prompts))), steps=20, guidance=3.0)
        rows = [images[i : i + 4] for i in range(0, len(images), 4)]
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            grid(rows, labels=[f"{c.name}, step {step}" for c in member.concepts]).save(path)

    return sample


def _keep(stage: Train, store: Store, scratch: Path, weights: ConceptWeights, seconds: float) -> None:
    try:
        with stage.making(store, seconds=round(seconds, 3)) as out:
            weights.save(Trained(out).file)
            if (scratch / "tensorboard").exists():
                shutil.copytree(scratch / "tensorboard", Trained(out).tensorboard)
            for path in sorted(scratch.glob("samples-*.png")):
                shutil.copy(path, out)
    except OSError:
        if not stage.is_in(store):  # else another run was first, and removed the scratch folder
            raise
