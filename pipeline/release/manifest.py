"""`manifest.json` of a release: what it has to say to be one, and its sums."""

from __future__ import annotations

import hashlib
import json
import ntpath
import os
import posixpath
import re
from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from pipeline.reading import shown

FORMAT = 2
"""2: `sum`, over all of the manifest; manifests of format 1 have `content` only, over the list of files."""


class Newer(ValueError):
    """A later polyconcept wrote the manifest: it is not damaged, and not to be removed."""


class Part(BaseModel):
    """A part of a manifest: keys beyond those that are read here are free."""

    model_config = ConfigDict(strict=True)


def _known(number: int) -> int:
    if number > FORMAT:
        raise PydanticCustomError("newer", "a later polyconcept wrote it (format {found}); upgrade", {"found": number})
    return number


class File(Part):
    sha256: str
    size: int


class Concept(Part):
    token: str
    class_word: str
    training: str


class Base(Part):
    name: str
    digest: str


class Measures(Part):
    concepts: dict[str, dict[str, Any]] = {}


class Provenance(Part):
    concepts: dict[str, Concept] = {}
    measures: Measures = Measures()
    stages: dict[str, str] = {}
    base: Base = Base(name="", digest="")


class Described(Part):
    """What is to be published."""

    format: Annotated[int, Field(ge=1), AfterValidator(_known)]
    content: str
    files: dict[str, File]
    provenance: Provenance


class Manifest(Described):
    """version: empty for a candidate."""

    version: str = ""
    created: str
    sum: str = ""


def parse(text: bytes | str, form: type[Described] = Manifest) -> dict[str, Any]:
    """A manifest as it stands in its file.

    Raises: ValueError when it is none, or damaged; Newer when it is of a format that is not known yet.
    """
    try:
        form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "newer":
            raise Newer(first["msg"]) from None
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON. Raises: ValueError for a key that is given twice: readers differ in which one they take."""
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"the key {shown(twice[0])} is given twice")
    return dict(pairs)


def content_sum(files: dict[str, Any]) -> str:
    """sha256 over a manifest's list of files; releases of the same content have the same."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def own_sum(manifest: dict[str, Any]) -> str:
    """sha256 over all of a manifest but `sum` itself."""
    rest = {key: value for key, value in manifest.items() if key != "sum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def public(value: Any) -> Any:
    """JSON values as they may be published: of absolute paths the last part alone, URLs without user and password.
    Where things lay on the machine of whoever made a release is nobody's business."""
    if isinstance(value, dict):
        return {key: public(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if ntpath.isabs(value) or os.path.isabs(value) or value.startswith("~"):
        return posixpath.basename(value.replace("\\", "/").rstrip("/"))
    return re.sub(r"(\w://)[^/\s]*@", r"\1", value)


def leaves_its_folder(name: str) -> bool:
    """Whether a file's name may lead out of the folder it is copied to, on any system. Object stores take any name."""
    return "\\" in name or any(part in ("", ".", "..") for part in name.split("/"))
