"""From a batch to its stages: what there is to do, in what order, and what is done already.

All keys are known before anything runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pipeline.checks import check_concepts, check_models, generated_prompt, initializer_of, read_block_list
from pipeline.evaluation.networks import judge_digest
from pipeline.merge.constraints import FORMS, PAPER_PROMPTS, row_count
from pipeline.miniature.corpus import CORPUS_VERSION
from pipeline.places import masked
from pipeline.reading import read_written
from pipeline.spec import Concept, ConceptBatch, Mark, clip_path, marked, public_name, sections
from pipeline.stages.candidates import Candidates
from pipeline.stages.constraints import Constraints
from pipeline.stages.drawn import DrawSettings, Model, Phrase
from pipeline.stages.evaluate import Evaluate, EvaluatePlaces
from pipeline.stages.features import Features
from pipeline.stages.generated import Generated
from pipeline.stages.index import Index
from pipeline.stages.merge import Budget, Merge, MergeSettings
from pipeline.stages.regularization import Regularization
from pipeline.stages.release import License, Release
from pipeline.stages.stage import Stage, part_of
from pipeline.stages.sums import SUMMED, AddUp
from pipeline.stages.train import TaughtConcept, Train, TrainSettings
from pipeline.store import Store
from retrieval.clip import clip_digest
from retrieval.corpus import check_corpus, corpus_digest, precomputed
from training.augment import WHOLE_FROM
from training.base import Base, base_digest, check_base
from training.methods import METHODS
from training.strategies import complete_deepspeed_config

S = TypeVar("S", bound=Stage[Any])


@dataclass(frozen=True)
class Plan:
    """Stages of a batch, each after its inputs."""

    batch: ConceptBatch
    stages: tuple[Stage[Any], ...]
    notes: tuple[str, ...] = ()
    """What was remarked about the users' images."""

    def of(self, kind: type[S]) -> list[S]:
        return [stage for stage in self.stages if isinstance(stage, kind)]

    @property
    def release(self) -> Release:
        """Of a plan that `make_plan` made."""
        (release,) = self.of(Release)
        return release

    def evaluations(self) -> dict[str, dict[Model, Evaluate]]:
        """Concept -> model -> its stage."""
        found: dict[str, dict[Model, Evaluate]] = {}
        for stage in self.of(Evaluate):
            found.setdefault(stage.concept, {})[stage.model] = stage
        return found

    def trainings(self) -> dict[str, Train]:
        """Concept -> the training that it is in."""
        return {name: stage for stage in self.of(Train) for name in stage.concepts}

    def __iter__(self) -> Iterator[Stage[Any]]:
        return iter(self.stages)

    def todo(self, store: Store) -> list[Stage[Any]]:
        return [stage for stage in self.stages if not stage.is_in(store)]


def make_plan(batch: ConceptBatch) -> Plan:
    """Look at everything a batch names (images, base, corpus) and lay out its stages. Writes nothing.

    Raises: ValueError naming what is missing or cannot be used; UnusableConcepts when it is only some concepts' images
        or words.
    """
    shape = check_base(batch.base_path)
    base = base_digest(batch.base_path)
    check_models(batch, shape)
    digests, remarks = check_concepts(batch, shape.words)
    blocked = tuple(read_block_list(batch.at(batch.retrieval.block_list)))
    if blocked:
        remarks.append(f"{batch.retrieval.block_list}: {len(blocked)} images are never used")
    wiring = _Wiring(batch, shape, base, digests, blocked)
    prior, features = wiring.features()
    together = batch.training.composition == "joint"
    groups = [list(batch.concepts)] if together else [[concept] for concept in batch.concepts]
    trained = [training_of(batch, base, group, [features[c.name] for c in group]) for group in groups]
    if METHODS[batch.training.method].unet == "text_kv":
        merging = wiring.merge(trained, [stage for stage in prior if isinstance(stage, Regularization)])
    else:
        merging = [Merge(name="all concepts", inputs=tuple(trained))]
    measured = wiring.evaluations(trained, merging[-1])
    release = wiring.release((merging[-1], *measured))
    return Plan(batch, (*prior, *trained, *merging, *measured, release), (*batch.notes, *remarks))


@dataclass(frozen=True)
class _Wiring:
    """What the stages of a batch are made of. base: its digest; digests: of each concept's images; blocked: sums of
    images that are not to be used."""

    batch: ConceptBatch
    shape: Base
    base: str
    digests: dict[str, tuple[str, ...]]
    blocked: tuple[str, ...]

    @property
    def safety_checker(self) -> bool | None:
        """Nothing is drawn with it; what was drawn when it was still on has another key."""
        return False if self.shape.has_safety_checker else None

    def features(self) -> tuple[list[Stage[Any]], dict[str, Features]]:
        """All stages up to those that encode a concept's images; and these, by concept."""
        batch = self.batch
        index = self._index() if batch.training.regularization == "real" else None
        stages: list[Stage[Any]] = [index] if index else []
        found: dict[str, Features] = {}
        for concept in batch.concepts:
            inputs: tuple[Stage[Any], ...] = ()
            if index:
                candidates = self._candidates(concept, index)
                if candidates.key not in {stage.key for stage in stages}:
                    stages.append(candidates)
                inputs = (self._regularization(concept, candidates),)
            elif batch.training.regularization == "generated":
                inputs = (self._generated(concept),)
            found[concept.name] = Features(
                name=concept.name,
                inputs=inputs,
                base=self.base,
                images=self.digests[concept.name],
                seed=batch.training.seed,
                views=batch.training.views if batch.training.augment else 0,
                whole_from=WHOLE_FROM if batch.training.augment else None,
                flip=batch.training.flip,
                places=Features.Places(concept.images, batch.base_path),
            )
            stages += [*inputs, found[concept.name]]
        return stages, found

    def _index(self) -> Index:
        clip = clip_path(self.batch.retrieval.clip, self.batch.folder)
        return Index(
            name="corpus",
            corpus=_corpus_digest(self.batch),
            clip=clip_digest(clip),
            places=Index.Places(self.batch.corpus, clip),
        )

    def _candidates(self, concept: Concept, index: Index) -> Candidates:
        retrieval, prompt = self.batch.retrieval, concept.class_prompt or concept.class_word
        return Candidates(
            name=prompt,
            inputs=(index,),
            prompt=prompt,
            count=round(retrieval.images * retrieval.oversample),
            max_nsfw=retrieval.max_nsfw,
            block_list=self.blocked,
            places=Candidates.Places(index.places.clip),
        )

    def _regularization(self, concept: Concept, candidates: Candidates) -> Regularization:
        retrieval = self.batch.retrieval
        miniature = retrieval.corpus == "miniature"
        return Regularization(
            name=concept.name,
            inputs=(candidates,),
            images=retrieval.images,
            size=self.shape.resolution,
            exclude=self.digests[concept.name],
            block_list=self.blocked,
            base_url=retrieval.base_url,
            local=retrieval.local or miniature,
            miniature=miniature,
            places=Regularization.Places(concept.images, retrieval.distributor),
        )

    def _generated(self, concept: Concept) -> Generated:
        batch = self.batch
        return Generated(
            name=concept.name,
            base=self.base,
            prompt=generated_prompt(batch, concept),
            images=batch.retrieval.images,
            steps=batch.evaluation.steps,
            guidance=batch.evaluation.guidance,
            safety_checker=self.safety_checker,
            places=Generated.Places(batch.base_path, batch.training.attention),
        )

    def merge(self, trained: Sequence[Train], regularization: Sequence[Regularization]) -> list[Stage[Any]]:
        """The constraints of trained text K/V layers, their sums, and last the merge."""
        batch, shape = self.batch, self.shape
        exact, base = batch.merge.form == "paper", batch.base_path
        prompts = batch.merge.prompts or (PAPER_PROMPTS if exact else FORMS)
        constraints = [
            Constraints(name=t.name, inputs=(t,), prompts=prompts, exact=exact, places=Constraints.Places(base))
            for t in trained
        ]
        sums: list[AddUp] = []
        if len(trained) > 1 and exact:
            rows = sum(row_count(shape.words.tokenizers[0], prompts, c.class_word) for c in batch.concepts)
            if rows > shape.text_width:
                raise ValueError(
                    f"merge.form: {len(batch.concepts)} concepts make {rows} constraint rows, but text features "
                    f"{shape.text_width} wide can meet at most {shape.text_width} exactly; use 'soft', or fewer "
                    "concepts or constraint prompts"
                )
        elif len(trained) > 1:
            sums = [
                AddUp(name=f"{SUMMED} from {i}", inputs=tuple(constraints[i : i + SUMMED]))
                for i in range(0, len(constraints), SUMMED)
            ]
        merge = Merge(
            name="all concepts",
            inputs=(*(trained if len(trained) == 1 else ()), *constraints, *sums, *regularization),
            merge=part_of(MergeSettings, batch.merge),
            compress=part_of(Budget, batch.compress),
            places=Merge.Places(base),
        )
        return [*constraints, *sums, merge]

    def evaluations(self, trained: Sequence[Train], merge: Stage[Any]) -> list[Evaluate]:
        found = []
        for concept in self.batch.concepts:
            alone = tuple(training for training in trained if concept.name in training.concepts)
            found += [self._evaluate(concept, "base", ()), self._evaluate(concept, "single", alone)]
            found.append(self._evaluate(concept, "merged", (merge,)))
        return found

    def _evaluate(self, concept: Concept, model: Model, inputs: tuple[Stage[Any], ...]) -> Evaluate:
        batch = self.batch
        clip = clip_path(batch.evaluation.clip, batch.folder)
        return Evaluate(
            name=f"{concept.name}: {model}",
            inputs=inputs,
            base=self.base,
            safety_checker=self.safety_checker,
            **self._judges,
            model=model,
            evaluation=part_of(DrawSettings, batch.evaluation),
            prompts=batch.prompts_of(concept),
            concept=concept.name,
            # the base knows no token: by whatever a concept goes, the base's images are the same
            phrase=Phrase(concept.token if inputs else "", concept.class_word),
            images=self.digests[concept.name],
            judges=self._other_judges,
            places=EvaluatePlaces(batch.base_path, clip, batch.training.attention, concept.images, batch.judge_places),
        )

    @functools.cached_property
    def _judges(self) -> dict[str, str]:
        batch = self.batch
        clip = clip_path(batch.evaluation.clip, batch.folder)
        return {"clip": clip_digest(clip), "judge": judge_digest("miniature") if batch.evaluation.identity else ""}

    @functools.cached_property
    def _other_judges(self) -> dict[str, str] | None:
        places = self.batch.judge_places
        return {name: judge_digest(places[name]) for name in self.batch.evaluation.judges} or None

    def release(self, inputs: tuple[Stage[Any], ...]) -> Release:
        spec = public_spec(self.batch)
        return Release(
            name=self.batch.name,
            inputs=inputs,
            license=License(**{field.name: spec["publish"][field.name] for field in fields(License)}),
            spec=spec,
            places=Release.Places(self.batch.base_path, spec["base"]),
        )


def training_of(batch: ConceptBatch, base: str, group: Sequence[Concept], features: Sequence[Features]) -> Train:
    """The training of some concepts into one set of weights. base: its digest."""
    how = batch.training
    own: dict[str, Any] | None = None
    if how.strategy == "deepspeed" and how.deepspeed.config:
        file = Path(batch.at(how.deepspeed.config))
        try:
            config = read_written(file, "DeepSpeed configuration (.json)").value
        except ValueError as error:
            raise ValueError(f"training.deepspeed.config: {error}") from None
        where = f"training.deepspeed.config: {file}"
        own = complete_deepspeed_config(config, where, how.batch_size, how.ranks, how.max_grad_norm)
    settings = how.model_copy(update=group[0].training.model_dump(exclude_none=True)) if len(group) == 1 else how
    return Train(
        name=" + ".join(concept.name for concept in group),
        inputs=tuple(features),
        base=base,
        training=part_of(
            TrainSettings,
            settings,
            steps=settings.steps or METHODS[how.method].steps * len(group),
            token_learning_rate=settings.token_learning_rate or settings.learning_rate,
        ),
        concepts={c.name: TaughtConcept(c.token, c.class_word, initializer_of(c)) for c in group},
        deepspeed=own,
        places=part_of(Train.Places, how, base=batch.base_path),
    )


def public_spec(batch: ConceptBatch) -> dict[str, Any]:
    """What a release says that it was asked for: nothing of the machine's folders, no passwords."""
    spec = batch.model_dump(mode="json")
    for way in marked(ConceptBatch, Mark.PRIVATE):
        for section in sections(spec, way[:-1]):
            section.pop(way[-1], None)
    for way in marked(ConceptBatch, Mark.MODEL):
        for section in sections(spec, way[:-1]):
            named = section[way[-1]]
            is_one = isinstance(named, str)
            section[way[-1]] = public_name(named) if is_one else {k: public_name(v) for k, v in named.items()}
    for way in marked(ConceptBatch, Mark.LATER):
        for section in sections(spec, way[:-1]):
            if not section[way[-1]]:  # their defaults are empty
                del section[way[-1]]
    spec["publish"] = {key: masked(value) for key, value in spec["publish"].items()}
    return spec


def _corpus_digest(batch: ConceptBatch) -> str:
    if batch.corpus == "miniature":
        return f"miniature-{CORPUS_VERSION}-{batch.retrieval.miniature_captions}"
    pairs = precomputed(batch.corpus)
    captions = pairs[0][1] if pairs else batch.corpus
    check_corpus(captions, scores=batch.retrieval.max_nsfw is not None)
    return corpus_digest(batch.corpus)
