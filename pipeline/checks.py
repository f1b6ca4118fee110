"""What a batch names, looked at before anything runs: images, words, prompts, models, a block list."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluation.networks import check_judge
from pipeline.places import CLIP
from pipeline.reading import read_lines, shown
from pipeline.sampling import check_steps
from pipeline.spec import Concept, ConceptBatch, clip_path
from training.augment import SIZE_WORDS
from training.base import Base, check_base
from training.images import load_images
from training.methods import METHODS
from training.tokens import Words


class UnusableConcepts(ValueError):
    """Concepts whose images or words cannot be used. concepts: name -> why."""

    def __init__(self, concepts: dict[str, str]) -> None:
        super().__init__("\n".join(concepts.values()))
        self.concepts = concepts


def check_models(batch: ConceptBatch, shape: Base) -> None:
    """Raises: ValueError when the base cannot draw with so many steps, or a CLIP model cannot be used."""
    try:
        check_steps(batch.evaluation.steps, shape.timesteps)
    except ValueError as error:
        raise ValueError(f"evaluation.steps: {error}") from None
    places = {key: CLIP + clip_path(model, batch.folder) for key, model in _clips(batch).items()}
    places |= {f"evaluation.judges.{name}": place for name, place in batch.judge_places.items()}
    for key, place in places.items():
        try:
            check_judge(place)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


def check_concepts(batch: ConceptBatch, words: Words) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """words: of the base. Returns: concept -> digests of its images, and what is remarked about them.

    Raises: UnusableConcepts naming those whose images or words cannot be used.
    """
    problems = _check_words(batch, words)
    digests: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for concept in batch.concepts:
        try:
            images = load_images(list(concept.images))
            digests[concept.name] = tuple(images.digests)
            notes += [f"{concept.name}: {note}" for note in images.notes]
            notes += [f"{concept.name}: not used: {reason}" for reason in images.rejected]
        except ValueError as error:
            problems.setdefault(concept.name, str(error))
    if problems:
        places = {c.name: f"concepts[{i}] ({c.name})" for i, c in enumerate(batch.concepts)}
        raise UnusableConcepts({name: f"{places[name]}: {problem}" for name, problem in problems.items()})
    return digests, notes


def _clips(batch: ConceptBatch) -> dict[str, str]:
    own = {"retrieval.clip": batch.retrieval.clip} if batch.training.regularization == "real" else {}
    return own | {"evaluation.clip": batch.evaluation.clip}


def _check_words(batch: ConceptBatch, words: Words) -> dict[str, str]:
    """What is wrong with the words that a concept goes by, and with the prompts that they make: name -> why."""
    problems: dict[str, str] = {}
    new = METHODS[batch.training.method].token == "new"
    for concept in batch.concepts:
        try:
            if concept.token and new:
                words.check_new(concept.token)
                words.check_initializer(initializer_of(concept))
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
    if METHODS[training.method].unet == "text_kv" and batch.merge.prompts:
        prompts["merge.prompts"] = [prompt.format(phrase) for prompt in batch.merge.prompts]
    if training.regularization == "generated":
        prompts["class_prompt"] = [generated_prompt(batch, concept)]
    elif concept.class_prompt:
        prompts["class_prompt"] = [concept.class_prompt]
    return prompts


def generated_prompt(batch: ConceptBatch, concept: Concept) -> str:
    return concept.class_prompt or batch.training.prompt.format(concept.class_word)


def initializer_of(concept: Concept) -> str | int:
    """The word its row starts from, or the number of a row of its own: by the token, whatever its neighbours are."""
    return concept.initializer or zlib.crc32(concept.token.encode())


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
