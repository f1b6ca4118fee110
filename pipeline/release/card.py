"""The model card: `README.md` of a release, with Hugging Face front matter and code that runs as it stands.

Its code names a precision: of bases stored in float16, transformers loads the text encoder as such and diffusers the
rest in float32, which do not go together. A base that is a folder goes by the folder's own name: where it lay is
nobody's business, and no reader has it there.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from pipeline.release.formats import EXPORTERS
from pipeline.release.formats.names import LORA, file_stem, token_files
from training.methods import METHODS

CARD = "README.md"
MINIATURE = "miniature"
LOADERS = ("diffusers", "transformers", "peft", "torch")
"""Packages that a release's files were loaded back by."""


@dataclass(frozen=True)
class CardConcept:
    """A row of the card's table.

    residual: how well the merge met the concept's constraint (relative), where there was a merge.
    measures: name of the measure -> value, as in `{"image alignment": 0.74}`.
    """

    name: str
    token: str
    class_word: str
    residual: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        return f"{self.token} {self.class_word}".strip()


def write_card(
    folder: Path,
    concepts: Sequence[CardConcept],
    *,
    name: str,
    base_model: str,
    base_digest: str = "",
    license: str = "",
    license_name: str = "",
    license_link: str = "",
    method: str = "custom_diffusion",
    grid: str = "",
    two_encoders: bool = False,
) -> Path:
    """Write `README.md` into a folder that `write_formats` or `write_whole` has filled; it tells of what is there.

    Args:
        name: of the batch, which the files were named after.
        base_model: folder or hub name, as `from_pretrained` takes it, or `miniature`.
        base_digest: hash of the base's weights, since bases vanish and change under their hub names.
        method: name of the method in `training.methods`.
        license: as the hub knows it (`mit`, `creativeml-openrail-m`); `other` when empty, since the hub asks for one.
        license_name, license_link: of a licence that the hub does not know, where `license` is empty.
        grid: picture in the folder, with samples of every concept.
        two_encoders: SDXL, whose tokens have a row for each text encoder.

    Raises:
        ValueError: no concepts, or the grid is not in the folder.
    """
    if not concepts:
        raise ValueError("a model card needs at least one concept")
    if grid and not (folder / grid).is_file():
        raise ValueError(f"{folder / grid}: no such picture; write the sample grid before the card")
    parts = _parts(folder)
    # of the concepts' words those that were made: a rare word is the base's own, a new category has none
    files = token_files([c.token for c in concepts if c.token], name)
    files = {token: file for token, file in files.items() if (folder / file).is_file()}
    words = {token: Path(file).stem for token, file in files.items()}
    tags = ["text-to-image", "diffusers", method.replace("_", "-"), "polyconcept"]
    if lora := (folder / LORA).is_file():
        tags.append("lora")
    if words:
        tags.append("textual-inversion")
    prompts = [f"photo of a {c.phrase}" for c in concepts]
    first = concepts[0]
    base, base_code = _base(base_model)
    front = ModelCardData(
        # of these three the front matter takes the hub's own names, one line each
        license=_line(license) or "other",
        license_name=_line(license_name) or None,
        license_link=_line(license_link) or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base if base_code == repr(base) else None,
        instance_prompt=", ".join(prompts),
        tags=tags,
    )
    card = ModelCard.from_template(
        front,
        template_str=TEMPLATE,
        name=_cell(name),
        method=METHODS[method],
        has_lora=lora,
        parts=parts,
        loaded=", ".join(["BASE", *(f"{part}={part}" for part in parts)]),
        file_name=file_stem(name),
        base_model=_cell(base),
        base_digest=base_digest,
        license=_license(license, license_name, license_link),
        base_code=base_code,
        is_miniature=base_model == MINIATURE,
        grid=grid,
        table=_table(concepts),
        prompt_code=repr(prompts[0]),
        prompt=_cell(f"photo of a {words.get(first.token, first.token)} {first.class_word}"),
        load_tokens=_load_tokens(files, two_encoders),
        words=[(_cell(token), word) for token, word in words.items()],
        two_encoders=two_encoders,
        snippets=[exporter.snippet for exporter in EXPORTERS if exporter.snippet],
        tested=", ".join(f"{package} {importlib.metadata.version(package)}" for package in LOADERS),
    )
    path = folder / CARD
    path.write_text(str(card), encoding="utf-8")
    return path


def _parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Whole parts of a pipeline in a release -> the library and the class that load them."""
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if (config := folder / part / "config.json").is_file():
            described = json.loads(config.read_text())
            name = described.get("_class_name")
            found[part] = ("diffusers", name) if name else ("transformers", described["architectures"][0])
    return found


def _base(base_model: str) -> tuple[str, str]:
    """What the card calls the base, and the code that `BASE` is set to: the hub's name in quotes, or what finds a
    folder."""
    if base_model == MINIATURE:
        return MINIATURE, 'files("pipeline.miniature") / "model"'
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base_model) and not Path(base_model).exists():
        return base_model, repr(base_model)
    name = re.split(r"[/\\]", base_model.rstrip("/\\"))[-1]
    return name, f"{name!r}  # where you have the folder of this base model"


def _license(license: str, name: str, link: str) -> str:
    """The licence as the card says it. Its parts are what somebody typed: they end neither the line nor the page."""
    if license or not link:
        return _cell(license or name) or "not stated: ask whoever published it"
    # of other schemes browsers run some
    if re.match(r"https?://", link):
        return f'<a href="{html.escape(_line(link))}">{_cell(name or link)}</a>'
    return f"{_cell(name)} ({_cell(link)})"


def _load_tokens(files: Mapping[str, str], two_encoders: bool) -> str:
    """Code that gives a diffusers pipeline the new words, all at once: each call copies the whole table of words. Empty
    when there are none."""
    if not files:
        return ""
    words = f"words = {dict(files)!r}\n"
    if not two_encoders:
        return words + 'pipe.load_textual_inversion([f"{RELEASE}/{w}" for w in words.values()], token=list(words))'
    return words + (
        'rows = [load_file(f"{RELEASE}/{w}") for w in words.values()]\n'
        'for key, end in {"clip_l": "", "clip_g": "_2"}.items():\n'
        '    parts = {name: getattr(pipe, name + end) for name in ("tokenizer", "text_encoder")}\n'
        "    pipe.load_textual_inversion([row[key] for row in rows], token=list(words), **parts)"
    )


def _table(concepts: Sequence[CardConcept]) -> str:
    measures = list(dict.fromkeys(m for c in concepts for m in c.measures))
    merged = any(c.residual is not None for c in concepts)
    header = ["concept", "write", "class word", *measures, *(["residual of the merge"] if merged else [])]
    rows = [
        [
            _cell(c.name),
            f"<code>{_cell(c.phrase)}</code>",
            _cell(c.class_word),
            *(f"{c.measures[m]:.3f}" if m in c.measures else "" for m in measures),
            *(["" if c.residual is None else f"{c.residual:.1e}"] if merged else []),
        ]
        for c in concepts
    ]
    lines = [[_cell(h) for h in header], ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(text: str) -> str:
    """Text on one line, without control characters."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor is taken for HTML or a link."""
    text = html.escape(_line(text), quote=False)
    return re.sub(r"[|`\[\]*\\]", lambda m: f"&#{ord(m[0])};", text)


TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{% if has_lora -%}
Concepts taught to a text-to-image model by [{{ method.title }}]({{ method.reference }}): changes of the
cross-attention keys and values{% if words %} and one new word for each concept{% endif %}, merged into one small model
by polyconcept.
{%- elif parts -%}
Concepts taught to a text-to-image model by [{{ method.title }}]({{ method.reference }}) with polyconcept: the changed
parts of the model, whole, in float16{% if words %}, and one new word for each concept{% endif %}.
{%- else -%}
Concepts taught to a text-to-image model by [{{ method.title }}]({{ method.reference }}) with polyconcept: one new word
for each concept; the model itself is unchanged.
{%- endif %}
{% if grid %}
![samples of every concept]({{ grid }})
{% endif %}
## Concepts

{{ table }}

Base model: <code>{{ base_model }}</code>{% if is_miniature %}, which comes with polyconcept{% endif %}
{%- if base_digest %}, digest of its weights `{{ base_digest }}`{% endif %}.

Samples and measures were drawn without a safety checker; a base that has one uses it in the code below.

Licence of these weights: {{ license }}. What is made with them also falls under the licence of the base model.

## In diffusers

Run in this folder, or set `RELEASE` to where it is. Loaded back with {{ tested }}.
{%- if has_lora %} Either way below gives the same pictures but for rounding; the LoRA is exact and the smaller.
{% for snippet in snippets %}
### {{ snippet.title }}
{% if snippet.before %}
{{ snippet.before }}
{% endif %}
```python
{{ "from importlib.resources import files\n\n" if is_miniature }}import torch
from diffusers import DiffusionPipeline
{{- "\nfrom safetensors.torch import load_file" if two_encoders }}

BASE = {{ base_code }}
RELEASE = "."

pipe = DiffusionPipeline.from_pretrained(BASE)
pipe.to(torch.float32)  # with a GPU: pipe.to("cuda", torch.float16)
{{ snippet.load }}
{{ load_tokens }}
image = pipe({{ prompt_code }}).images[0]
image.save("image.png")
```
{% if snippet.after %}
{{ snippet.after }}
{% endif %}
{%- endfor %}
{%- else %}

```python
{{ "from importlib.resources import files\n\n" if is_miniature }}import torch
from diffusers import DiffusionPipeline
{%- for library, loader in parts.values() %}
from {{ library }} import {{ loader }}
{%- endfor %}
{{- "\nfrom safetensors.torch import load_file" if two_encoders and load_tokens }}

BASE = {{ base_code }}
RELEASE = "."

{% for part, (_, loader) in parts.items() -%}
{{ part }} = {{ loader }}.from_pretrained(RELEASE, subfolder="{{ part }}")
{% endfor -%}
pipe = DiffusionPipeline.from_pretrained({{ loaded }})
pipe.to(torch.float32)  # with a GPU: pipe.to("cuda", torch.float16)
{{ load_tokens }}
image = pipe({{ prompt_code }}).images[0]
image.save("image.png")
```
{%- endif %}
{% if has_lora or words %}
## In ComfyUI and A1111

{% if has_lora -%}
Copy `comfyui/{{ file_name }}.safetensors` to `models/loras` (ComfyUI) or `models/Lora` (A1111).
{% endif -%}
{% if words -%}
Copy the files in `comfyui/embeddings` to `models/embeddings` (ComfyUI) or `embeddings` (A1111). There the new words
go by their files' names, so write:

| for | in ComfyUI | in A1111 |
| --- | --- | --- |
{%- for token, word in words %}
| <code>{{ token }}</code> | `embedding:{{ word }}` | `{{ word }}` |
{%- endfor %}
{% endif %}
{%- if has_lora %}
So: <code>{{ prompt }} &lt;lora:{{ file_name }}:1&gt;</code> in A1111. Strength 1 is what was trained and measured.
{% elif parts %}
The changed parts of the model have no form of their own there: the words alone are not enough.
{% endif %}
{%- endif %}

## Checking the files

`manifest.json` has the sha256 sum of every file; `polyconcept release verify .` compares them. All weights are
safetensors.
"""
