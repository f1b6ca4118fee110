"""From a batch to its stages: what there is to do, in what order, and what is done already.

A stage's key is the hash of its kind, its parameters and its inputs' keys. All keys are known before anything runs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.merge.constraints import row_count
from pipeline.miniature.corpus import CORPUS_VERSION
from pipeline.miniature.identity import WEIGHTS as IDENTITY
from pipeline.places import masked
from pipeline.reading import read_lines, read_written, shown
from pipeline.sampling import check_steps
from pipeline.spec import Concept, ConceptBatch, clip_path, public_name
from pipeline.store import Store, content_key, file_digest
from retrieval.clip import check_clip, clip_digest
from retrieval.corpus import check_corpus, corpus_digest, precomputed
from training.augment import SIZE_WORDS, WHOLE_FROM
from training.base import Base, base_digest, check_base
from training.images import load_images
from training.methods import METHODS
from training.strategies import complete_deepspeed_config, deepspeed_config
from training.tokens import Words

VERSIONS = {
    "index": 1,
    "candidates": 1,
    "regularization": 1,
    "generated": 1,
    "features": 2,
    "train": 3,
    "constraints": 1,
    "sums": 1,
    "merge": 4,
    "released": 1,
    "evaluate": 3,
    "compose": 1,
    "release": 4,
}
"""Kind -> version; raised when a stage's code makes other results from the same parameters. A kind reads only kinds
before it."""


SUMMED = 512
"""Concepts whose sums one task adds up, when the merge takes the soft form."""


@dataclass(frozen=True)
class Stage:
    """One step from artifacts to an artifact.

    params: all that determines the result besides the inputs (hashed). places: where things are found (not hashed).
    """

    kind: str
    name: str
    params: dict[str, Any]
    inputs: tuple[Stage, ...] = ()
    places: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        return content_key([self.kind, VERSIONS[self.kind], self.params, [stage.key for stage in self.inputs]])

    def inputs_of(self, kind: str) -> list[Stage]:
        return [stage for stage in self.inputs if stage.kind == kind]


class UnusableConcepts(ValueError):
    """Concepts whose images or words cannot be used. concepts: name -> why."""

    def __init__(self, concepts: dict[str, str]) -> None:
        super().__init__("\n".join(concepts.values()))
        self.concepts = concepts


@dataclass(frozen=True)
class Plan:
    """The stages of a batch, each after its inputs; `release` is the last."""

    batch: ConceptBatch
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    """What was remarked about the users' images."""

    def of(self, kind: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.kind == kind]

    def evaluations(self) -> dict[str, dict[str, Stage]]:
        """Concept -> model (`base`, `single`, `merged_full` where the merge has exact factors, `merged`: what is
        released) -> its stage."""
        found: dict[str, dict[str, Stage]] = {}
        for stage in self.of("evaluate"):
            found.setdefault(stage.params["concept"], {})[stage.params["model"]] = stage
        return found

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def todo(self, store: Store) -> list[Stage]:
        return [stage for stage in self.stages if not store.has(stage.kind, stage.key)]


def of_bare_class(evaluation: Stage) -> Stage:
    """The same model asked for the class word alone, from the same prompts and seeds: what it kept of what the base
    knew."""
    _, class_word = evaluation.params["phrase"]
    return dataclasses.replace(
        evaluation, name=f"{evaluation.name}, bare class", params=evaluation.params | {"phrase": ["", class_word]}
    )


def of_pair(first: Stage, second: Stage, prompts: Sequence[str]) -> Stage:
    """The model of two concepts' evaluations asked for both in one image. prompts: with `{0}` and `{1}`."""
    both = (first, second)
    shared = ("base", "safety_checker", "clip", "judge", "model", "evaluation")
    params = {key: first.params[key] for key in shared if key in first.params}
    return Stage(
        "compose",
        f"{' and '.join(stage.params['concept'] for stage in both)}: {first.params['model']}",
        params
        | {"prompts": list(prompts)}
        | {"concepts": [stage.params["concept"] for stage in both]}
        | {"phrases": [stage.params["phrase"] for stage in both]}
        | {"images": [stage.params["images"] for stage in both]},
        first.inputs,
        first.places | {"images": [stage.places["images"] for stage in both]},
    )


def make_plan(batch: ConceptBatch) -> Plan:
    """Look at everything a batch names (images, base, corpus) and lay out its stages. Writes nothing.

    Raises: ValueError naming what is missing or cannot be used; UnusableConcepts when it is only some concepts' images
        or words.
    """
    retrieval, training = batch.retrieval, batch.training
    method = METHODS[training.method]
    shape = check_base(batch.base_path)
    base = {"base": base_digest(batch.base_path)}
    # drawn without it; what was drawn when it was still on has another key
    drawing: dict[str, Any] = base | ({"safety_checker": False} if shape.has_safety_checker else {})
    notes = list(batch.notes)
    stages: list[Stage] = []

    def add(stage: Stage) -> Stage:
        stages.append(stage)
        return stage

    _check_steps(batch, shape)
    for key, model in _clips(batch).items():
        try:
            check_clip(clip_path(model, batch.folder))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    problems = _check_words(batch, shape.words)
    digests: dict[str, list[str]] = {}
    for concept in batch.concepts:
        try:
            images = load_images(list(concept.images))
            digests[concept.name] = images.digests
            notes += [f"{concept.name}: {note}" for note in images.notes]
            notes += [f"{concept.name}: not used: {reason}" for reason in images.rejected]
        except ValueError as error:
            problems.setdefault(concept.name, str(error))
    if problems:
        places = {c.name: f"concepts[{i}] ({c.name})" for i, c in enumerate(batch.concepts)}
        raise UnusableConcepts({name: f"{places[name]}: {problem}" for name, problem in problems.items()})

    index = None
    blocked = read_block_list(batch.at(retrieval.block_list))
    if blocked:
        notes.append(f"{retrieval.block_list}: {len(blocked)} images are never used")
    clip_place = clip_path(retrieval.clip, batch.folder)
    if training.regularization == "real":
        clip = {"clip": clip_digest(clip_place)}
        index = add(
            Stage(
                "index",
                "corpus",
                {"corpus": _corpus_digest(batch), **clip},
                places={"corpus": batch.corpus, "clip": clip_place},
            )
        )

    features: dict[str, Stage] = {}
    for concept in batch.concepts:
        inputs: tuple[Stage, ...] = ()
        if index is not None:
            prompt = concept.class_prompt or concept.class_word
            count = round(retrieval.images * retrieval.oversample)
            candidates = Stage(
                "candidates",
                prompt,
                {
                    "prompt": prompt,
                    "count": count,
                    "max_nsfw": retrieval.max_nsfw,
                    "block_list": blocked,
                },
                (index,),
                {"clip": clip_place},
            )
            if candidates.key not in {s.key for s in stages}:
                add(candidates)
            inputs = (
                add(
                    Stage(
                        "regularization",
                        concept.name,
                        {
                            "images": retrieval.images,
                            "size": shape.resolution,
                            "exclude": digests[concept.name],
                            "block_list": blocked,
                            "base_url": retrieval.base_url,
                            "local": retrieval.local or retrieval.corpus == "miniature",
                            "miniature": retrieval.corpus == "miniature",
                        },
                        (candidates,),
                        {"images": list(concept.images), "distributor": retrieval.distributor},
                    )
                ),
            )
        elif training.regularization == "generated":
            inputs = (add(_generated_stage(batch, concept, drawing)),)
        features[concept.name] = add(
            Stage(
                "features",
                concept.name,
                base
                | {"images": digests[concept.name], "seed": training.seed}
                | ({"views": training.views, "whole_from": WHOLE_FROM} if training.augment else {"views": 0})
                | ({"flip": True} if training.flip else {}),
                inputs,
                {"images": list(concept.images), "base": batch.base_path},
            )
        )

    groups = [list(batch.concepts)] if training.composition == "joint" else [[c] for c in batch.concepts]
    trained = [add(_train_stage(batch, group, features, base)) for group in groups]
    merged = add(_kept_stage(trained)) if method.unet != "text_kv" else _add_merge(batch, trained, shape, stages)
    judges = drawing | {
        "clip": clip_digest(clip_path(batch.evaluation.clip, batch.folder)),
        "judge": file_digest(IDENTITY) if batch.evaluation.identity else "",
    }
    measured = [
        add(_evaluate_stage(batch, concept, judges | {"images": digests[concept.name], "model": model}, inputs))
        for concept in batch.concepts
        for model, inputs in (
            ("base", ()),
            ("single", tuple(s for s in trained if concept.name in s.params["concepts"])),
            ("merged_full", (merged,)),
            ("merged", (merged,)),
        )
        if model != "merged_full" or method.unet == "text_kv"
    ]
    spec = public_spec(batch)
    add(
        Stage(
            "release",
            batch.name,
            {
                "name": batch.name,
                "license": {key: spec["publish"][key] for key in ("license", "license_name", "license_link")},
                "spec": spec,
            },
            (merged, *measured),
            {"base": batch.base_path, "base_name": spec["base"]},
        )
    )
    return Plan(batch, tuple(stages), tuple(notes))


_HOW = {
    "attention",
    "pack_size",
    "strategy",
    "ranks",
    "deepspeed",
    "gradient_checkpointing",
    "compile",
    "checkpoint_every",
    "sample_every",
}
"""Settings of the training that change how fast the weights come, not what they are (but for rounding)."""

_PLACES: dict[str, Any] = {
    "output": True,
    "store": True,
    "publish": {"to", "hub", "made_by", "signing_key"},
    "concepts": {"__all__": {"images"}},
    "retrieval": {"corpus", "base_url", "block_list", "distributor"},
    "training": _HOW,
    "merge": {"partial"},
}
"""What of a batch says where or how, not what: no part of a release."""


def public_spec(batch: ConceptBatch) -> dict[str, Any]:
    """What a release says that it was asked for: nothing of the machine's folders, no passwords."""
    spec = batch.model_dump(mode="json", exclude=_PLACES)
    spec["base"] = public_name(spec["base"])
    for section in ("retrieval", "evaluation"):
        spec[section]["clip"] = public_name(spec[section]["clip"])
    spec["publish"] = {key: masked(value) for key, value in spec["publish"].items()}
    return spec


def _clips(batch: ConceptBatch) -> dict[str, str]:
    own = {"retrieval.clip": batch.retrieval.clip} if batch.training.regularization == "real" else {}
    return own | {"evaluation.clip": batch.evaluation.clip}


def _check_steps(batch: ConceptBatch, shape: Base) -> None:
    try:
        check_steps(batch.evaluation.steps, shape.timesteps)
    except ValueError as error:
        raise ValueError(f"evaluation.steps: {error}") from None


def _check_words(batch: ConceptBatch, words: Words) -> dict[str, str]:
    """What is wrong with the words that a concept goes by, and with the prompts that they make: name -> why."""
    problems: dict[str, str] = {}
    new = METHODS[batch.training.method].token == "new"
    for concept in batch.concepts:
        try:
            if concept.token and new:
                words.check_new(concept.token)
                words.check_initializer(_initializer(concept))
            elif concept.token:
                words.check_rare(concept.token)
        except ValueError as error:
            problems[concept.name] = str(error)
    usable = [concept for concept in batch.concepts if concept.name not in problems]
    words = _knowing(words, batch, usable)
    for concept in usable:
        for key, prompts in _prompts(batch, concept).items():
            try:
                words.check_fits(prompts)
            except ValueError as error:
                problems.setdefault(concept.name, f"{key}: {error}")
    return problems


def _knowing(words: Words, batch: ConceptBatch, concepts: Sequence[Concept]) -> Words:
    """With the tokens that training makes."""
    new = METHODS[batch.training.method].token == "new"
    return words.knowing([concept.token for concept in concepts if concept.token and new])


def check_pair(batch: ConceptBatch, concepts: Sequence[Concept], prompts: Sequence[str]) -> None:
    """prompts: with `{0}` and `{1}`. Raises: ValueError for one that is too long with both concepts in it."""
    phrases = [concept.phrase for concept in concepts]
    words = _knowing(check_base(batch.base_path).words, batch, concepts)
    words.check_fits([prompt.format(*phrases) for prompt in prompts])


def _prompts(batch: ConceptBatch, concept: Concept) -> dict[str, list[str]]:
    """All that a text encoder will read of a concept, by the keys of the batch file that say it."""
    training, phrase = batch.training, concept.phrase
    caption = training.prompt.format(phrase)
    own = "" if concept.prompts else "evaluation."
    prompts = {
        "class_word": [phrase],
        "training.prompt": [caption, *(f"{words} {caption}" for words in SIZE_WORDS if training.augment)],
        f"{own}prompts": [prompt.format(phrase) for prompt in batch.prompts_of(concept)],
    }
    if METHODS[training.method].unet == "text_kv":
        prompts["merge.prompts"] = [prompt.format(phrase) for prompt in batch.merge.prompts]
    if training.regularization == "generated":
        prompts["class_prompt"] = [_generated_prompt(batch, concept)]
    elif concept.class_prompt:
        prompts["class_prompt"] = [concept.class_prompt]
    return prompts


def _add_merge(batch: ConceptBatch, trained: list[Stage], shape: Base, stages: list[Stage]) -> Stage:
    """Lay out the merge of trained text K/V layers, its constraints and sums; returns the stage of the merge."""
    prompts = {"prompts": list(batch.merge.prompts)}
    constraints = [Stage("constraints", t.name, prompts, (t,), {"base": batch.base_path}) for t in trained]
    rows = sum(row_count(shape.words.tokenizers[0], batch.merge.prompts, c.class_word) for c in batch.concepts)
    sums: list[Stage] = []
    if len(trained) > 1 and (batch.merge.form == "soft" or rows > shape.text_width):
        if batch.merge.form == "hard":
            raise ValueError(
                f"merge.form: {len(batch.concepts)} concepts make {rows} constraint rows, but text features "
                f"{shape.text_width} wide can meet at most {shape.text_width} exactly; use 'auto' or 'soft', or fewer "
                "concepts or constraint prompts"
            )
        sums = [
            Stage("sums", f"{SUMMED} from {i}", {}, tuple(constraints[i : i + SUMMED]))
            for i in range(0, len(constraints), SUMMED)
        ]
    regularization = tuple(s for s in stages if s.kind == "regularization")
    merged = Stage(
        "merge",
        "all concepts",
        {"merge": batch.merge.model_dump(exclude={"partial", "prompts"}), "compress": batch.compress.model_dump()},
        (*(trained if len(trained) == 1 else ()), *constraints, *sums, *regularization),
        {"base": batch.base_path},
    )
    stages += [*constraints, *sums, merged]
    return merged


def _kept_stage(trained: list[Stage]) -> Stage:
    """In the merge's place where changes are of more than text K/V layers, or of tokens only: the weights as they are,
    in float16."""
    return Stage("merge", "all concepts", {}, tuple(trained))


def _generated_stage(batch: ConceptBatch, concept: Concept, drawing: dict[str, Any]) -> Stage:
    """Regularisation images that the base draws itself; concepts of one class have one key, whatever the seed of the
    training, so they are drawn once."""
    return Stage(
        "generated",
        concept.name,
        drawing
        | {"prompt": _generated_prompt(batch, concept), "images": batch.retrieval.images}
        | batch.evaluation.model_dump(include={"steps", "guidance"}),
        (),
        {"base": batch.base_path, "attention": batch.training.attention},
    )


def _generated_prompt(batch: ConceptBatch, concept: Concept) -> str:
    return concept.class_prompt or batch.training.prompt.format(concept.class_word)


def _train_stage(batch: ConceptBatch, group: list[Concept], features: dict[str, Stage], base: dict[str, Any]) -> Stage:
    settings = batch.training.model_dump(exclude={"composition", "augment", "views", "flip", *_HOW})
    how = batch.training
    if how.strategy == "deepspeed" and how.deepspeed.config:  # it can change the weights, as by quantized gradients
        file = Path(batch.at(how.deepspeed.config))
        try:
            config = read_written(file, "DeepSpeed configuration (.json)").value
        except ValueError as error:
            raise ValueError(f"training.deepspeed.config: {error}") from None
        where = f"training.deepspeed.config: {file}"
        own = complete_deepspeed_config(config, where, how.batch_size, how.ranks, how.max_grad_norm)
        base = base | {"deepspeed": own}
    if len(group) == 1:
        settings |= group[0].training.model_dump(exclude_none=True)
    settings["steps"] = settings["steps"] or METHODS[batch.training.method].steps * len(group)
    settings["token_learning_rate"] = settings["token_learning_rate"] or settings["learning_rate"]
    concepts = {c.name: [c.token, c.class_word, _initializer(c)] for c in group}
    return Stage(
        "train",
        " + ".join(concepts),
        base | {"training": settings, "concepts": concepts},
        tuple(features[c.name] for c in group),
        {"base": batch.base_path, **batch.training.model_dump(include=_HOW)},
    )


def deepspeed_of(training: Stage) -> dict[str, Any]:
    """DeepSpeed's whole configuration of a stage of the kind `train` that has this strategy."""
    if "deepspeed" in training.params:
        return training.params["deepspeed"]
    settings, zero = training.params["training"], training.places["deepspeed"]
    share = settings["batch_size"] // training.places["ranks"]
    return deepspeed_config(share, settings["max_grad_norm"], zero=zero["stage"], offload=zero["offload"])


def _evaluate_stage(batch: ConceptBatch, concept: Concept, params: dict[str, Any], inputs: tuple[Stage, ...]) -> Stage:
    return Stage(
        "evaluate",
        f"{concept.name}: {params['model']}",
        params
        | {
            "evaluation": batch.evaluation.model_dump(exclude={"prompts", "clip"}),
            "prompts": list(batch.prompts_of(concept)),
            "concept": concept.name,
            # the base knows no token: by whatever a concept goes, the base's images are the same
            "phrase": [concept.token if inputs else "", concept.class_word],
        },
        inputs,
        {
            "base": batch.base_path,
            "images": list(concept.images),
            "clip": clip_path(batch.evaluation.clip, batch.folder),
            "attention": batch.training.attention,
        },
    )


def _initializer(concept: Concept) -> str | int:
    """The word its row starts from, or which of the rare words: by the token, whatever its neighbours are."""
    return concept.initializer or zlib.crc32(concept.token.encode())


def _corpus_digest(batch: ConceptBatch) -> str:
    if batch.corpus == "miniature":
        return f"miniature-{CORPUS_VERSION}-{batch.retrieval.miniature_captions}"
    pairs = precomputed(batch.corpus)
    captions = pairs[0][1] if pairs else batch.corpus
    check_corpus(captions, scores=batch.retrieval.max_nsfw is not None)
    return corpus_digest(batch.corpus)


SUM = re.compile(
    r"""(?: \\? sha2?-?256 \s* \(.*\) \s* = \s*   # SHA256 (file) = sum, as BSD and openssl print it
        | \W* (?: sha-?256 \W+ )? )             # sum  file, as sha256sum does; "sum",…; sha256:sum
        ([0-9a-f]{64}) (?! \w)""",
    re.IGNORECASE | re.VERBOSE | re.ASCII,
)


def read_block_list(path: str) -> list[str]:
    """The sha256 sums of a block list, in lower case; lines that begin with `#` are comments.

    Raises: ValueError naming the line that holds no sum.
    """
    found = set()
    for number, line in read_lines(Path(path), "block list") if path else ():
        match = SUM.match(line)
        if match:
            found.add(match[1].lower())
            if re.match(r"\W*[,;]\W*[0-9a-fA-F]{64}(?![\w.])", line[match.end() :]):
                raise ValueError(f"{path}:{number}: two sums in one line; write each in a line of its own")
        elif not line.startswith("#"):
            raise ValueError(
                f"{path}:{number}: expected a sha256 sum of 64 hexadecimal digits, as `sha256sum` prints it; found "
                f"{shown(line)}"
            )
    return sorted(found)
