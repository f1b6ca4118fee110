"""docs/settings.md, written from the settings themselves:

python -m pipeline.settings_page > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from pipeline.spec import ConceptBatch, Gate, Retraining, section_of

INTRODUCTION = """# Settings

Every key of a batch file, and below of a retraining file. A key that you leave out has the default;
[defaults.md](defaults.md) says why it is that. `polyconcept schema` prints the same for editors, as JSON schema.
"""
KINDS = {"boolean": "`true`, `false`", "integer": "whole number", "number": "number", "string": "text"}
SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def page() -> str:
    """The page as Markdown."""
    lines = [INTRODUCTION, *_section(ConceptBatch, "The batch file")]
    own = set(Retraining.model_fields) - set(ConceptBatch.model_fields)
    lines += _section(Retraining, "A retraining file: as a batch file, but these in the place of `concepts`", own)
    lines += _section(Gate, "`gate`, of a retraining")
    return "\n".join(lines)


def _section(model: type[BaseModel], title: str, only: set[str] | None = None) -> Iterator[str]:
    """A heading and a table, then those of the sections within."""
    schema = model.model_json_schema()
    yield f"## {title}\n"
    yield "| key | values | default | |"
    yield "| --- | --- | --- | --- |"
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        if only is not None and name not in only:
            continue
        found = schema["properties"][name]
        section, _ = section_of(field.annotation)
        if section is not None and section is not Gate:
            inner.append((name, section))
        default = "required" if field.is_required() else "" if section else _shown(found.get("default"))
        values = f"[see below](#{name})" if section else _values(found, schema.get("$defs", {}))
        yield f"| `{name}` | {values} | {default} | {_cell(field.description or '')} |"
    yield ""
    for name, section in inner:
        yield from _section(section, name)


def _values(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_values(part, definitions) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value or '(empty)'}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_values(schema.get('items', {}), definitions)}"
    if schema["type"] == "object":
        return f"name: {_values(schema['additionalProperties'], definitions)}"
    kind = KINDS[schema["type"]]
    bounds = [f"{sign} {_number(schema[key])}" for key, sign in SIGNS.items() if key in schema]
    return f"{kind} {', '.join(bounds)}".strip()


def _number(value: float) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:g}"


def _shown(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "empty"
    if isinstance(value, list):
        return ", ".join(f"`{each}`" for each in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
