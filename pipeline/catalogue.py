"""The concept catalogue: a folder for each concept, with its images and a `concept.yaml`.

    catalogue/our-cat/concept.yaml      class_word: cat         (also concept.yml, in any case)
    catalogue/our-cat/1.jpg, 2.jpg, …

The folder's name is the concept's. A folder without a `concept.yaml` is no concept yet: write it last. The other keys
are those of a batch's concept, but for `name` and `images`.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from fsspec.core import url_to_fs

from pipeline.places import masked
from pipeline.spec import Concept, Retraining, doubles, read_mapping, validated
from training.methods import METHODS
from training.methods.method import RARE_WORDS

CARD = "concept.yaml"
CARDS = (CARD, "concept.yml")
"""Names of a card, in any case."""
MEANT = re.compile(r"concept.*(ya?ml|json|toml)", re.IGNORECASE)
"""Names that may be meant as a card's: `concept.yaml.txt`, `concepts.yaml`."""


def read_catalogue(asked: Retraining, released: Collection[str] = ()) -> tuple[list[Concept], dict[str, str]]:
    """The concepts, sorted by name, and what is wrong with the others: name -> why.

    A catalogue that is not on this machine is copied to `<output>/.catalogue`, which all nodes of a cluster reach. Of
    two concepts with the same name but for case, or the same token, the second is wrong: those `released` come first.

    Raises: ValueError when there is no catalogue or no concept in it: an empty bucket is a mistake more often than a
        wish to have nothing released.
    """
    place = asked.at(asked.catalogue)
    root = Path(place)
    if "://" in place:
        # what is there is removed: a name that nobody gives a folder of their own
        root = Path(asked.output_path).absolute() / ".catalogue"
        _fetch(place, root)
    if not root.is_dir():
        raise ValueError(f"{place}: no such folder; the catalogue has a folder for each concept")
    concepts, problems, cards = [], {}, {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        try:
            card = _card(folder)
            if card:
                concepts.append(_read(card, asked))
                cards[folder.name] = card
        except (ValueError, OSError) as error:
            problems[folder.name] = str(error)
    ordered = sorted(concepts, key=lambda concept: concept.name not in released)
    for second, (first, what, word) in doubles(ordered).items():
        name = ordered[second].name
        taken = f"the {what} {word!r} is that of {ordered[first].name!r}; each needs its own"
        problems[name] = f"{cards[name]}: {taken}"
    concepts = [concept for concept in concepts if concept.name not in problems]
    if not concepts and not problems:
        raise ValueError(f"{masked(place)}: no concept in it; expected folders with images and a {CARD}")
    return concepts, problems


def _card(folder: Path) -> Path | None:
    """A folder's card; None where there is none.

    Raises: ValueError for two, or a file that may be meant as one: a card that is not seen retires its concept.
    """
    files = sorted(path for path in folder.iterdir() if MEANT.match(path.name))
    cards = [path for path in files if path.name.lower() in CARDS]
    if len(cards) > 1:
        raise ValueError(f"{folder}: {' and '.join(path.name for path in cards)} are there; keep one")
    if files and not cards:
        raise ValueError(f"{files[0]}: no card is read from a file of this name; call it {CARD}")
    return cards[0] if cards else None


def _read(card: Path, asked: Retraining) -> Concept:
    written = read_mapping(card, "concept card", "class_word")
    for key in ("name", "images"):
        if key in written.value:
            raise ValueError(f"{card}:{written.inner[key].line}: {key}: given by the folder; leave it out")
    data = written.value | {"name": card.parent.name, "images": [str(card.parent.absolute())]}
    concept = validated(Concept, data, card, written)
    try:
        asked.check_concept(concept)
    except ValueError as error:
        raise ValueError(f"{card}: {error}") from None
    if concept.token or concept.new_category:
        return concept
    method = METHODS[asked.training.method]
    if method.token == "rare":
        raise ValueError(
            f"{card}: token: missing; {method.name} makes no new token: name a rare word that the base model has as "
            f"one token, like {RARE_WORDS[0]!r}"
        )
    # by the name, not by the position: it stays what it is when others come and go
    return concept.model_copy(update={"token": f"<{concept.name}>"})


def _fetch(url: str, folder: Path) -> None:
    """Copy the catalogue's files, and no others: those directly in a concept's folder. What was there before goes."""
    fs, root = url_to_fs(url)
    fs.invalidate_cache()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        found = fs.find(root, maxdepth=2)
    except FileNotFoundError:
        found = []
    remote, local = [], []
    for path in found:
        name, _, file = path[len(root.rstrip("/")) :].lstrip("/").partition("/")
        # a bucket's keys may hold anything, `..` and backslashes too
        if file and all(part == posixpath.basename(part) and part.strip(".") for part in (name, file)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            remote.append(path)
            local.append(str(folder / name / file))
    if not remote:
        if not fs.exists(root):
            raise ValueError(f"{masked(url)}: not there; the catalogue has a folder for each concept")
        raise ValueError(f"{masked(url)}: no concept in it; expected folders with images and a {CARD}")
    fs.get(remote, local)
