"""The model card: `README.md` of a release, with Hugging Face front matter and code that runs as it stands.

Its code names a precision: of bases stored in float16, transformers loads the text encoder as such and diffusers the
rest in float32, which do not go together.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from pipeline.release.formats import CUSTOM_DIFFUSION, LORA, embedding_files, token_files
from training.methods import METHODS

CARD = "README.md"


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
        name: of the batch; also of the file under `comfyui/`.
        base_model: folder or hub name, as `from_pretrained` takes it.
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
    tokens = [token for token, file in token_files(c.token for c in concepts).items() if (folder / file).is_file()]
    tags = ["text-to-image", "diffusers", method.replace("_", "-"), "polyconcept"]
    if lora := (folder / LORA).is_file():
        tags.append("lora")
    if tokens:
        tags.append("textual-inversion")
    prompts = [f"photo of a {c.phrase}" for c in concepts]
    words = {token: Path(file).stem for token, file in embedding_files(tokens).items()}
    # the front matter takes only the hub's own names
    named = license or (f"[{_cell(license_name)}]({license_link})" if license_link else _cell(license_name))
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not Path(base_model).exists()
    front = ModelCardData(
        license=license or "other",
        license_name=license_name or None,
        license_link=license_link or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base_model if on_hub else None,
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
        file_name=name,
        base_model=_cell(base_model),
        base_digest=base_digest,
        license=named or "not stated: ask whoever published it",
        base_code=repr(base_model),
        grid=grid,
        table=_table(concepts),
        prompt_code=repr(prompts[0]),
        prompt=_cell(prompts[0].replace(concepts[0].token, words[concepts[0].token]))
        if concepts[0].token in words
        else _cell(prompts[0]),
        load_tokens=_load_tokens(tokens, two_encoders),
        words={_cell(token): word for token, word in words.items()},
        two_encoders=two_encoders,
        custom_diffusion=CUSTOM_DIFFUSION,
        lora=LORA,
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


def _load_tokens(tokens: Sequence[str], two_encoders: bool) -> str:
    """Code that gives a diffusers pipeline the new words; empty when there are none."""
    files = token_files(tokens)
    if not files:
        return ""
    if not two_encoders:
        return f"for file in {list(files.values())!r}:\n    pipe.load_textual_inversion(RELEASE, weight_name=file)"
    return (
        f"for token, file in {files!r}.items():\n"
        '    rows = load_file(f"{RELEASE}/{file}")\n'
        '    for key, end in {"clip_l": "", "clip_g": "_2"}.items():\n'
        '        parts = {name: getattr(pipe, name + end) for name in ("tokenizer", "text_encoder")}\n'
        "        pipe.load_textual_inversion(rows[key], token=token, **parts)"
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


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor is taken for HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;").replace("`", "&#96;")


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

Base model: <code>{{ base_model }}</code>{% if base_digest %}, digest of its weights `{{ base_digest }}`{% endif %}.

Samples and measures were drawn without a safety checker; a base that has one uses it in the code below.

Licence of these weights: {{ license }}. What is made with them also falls under the licence of the base model.

## In diffusers

Run in this folder, or set `RELEASE` to where it is.
{%- if has_lora %} Either way below gives the same pictures but for rounding; the LoRA is exact and the smaller.

### As a LoRA

```python
import torch
from diffusers import DiffusionPipeline
{{- "\nfrom safetensors.torch import load_file" if two_encoders }}

BASE = {{ base_code }}
RELEASE = "."

pipe = DiffusionPipeline.from_pretrained(BASE)
pipe.to(torch.float32)  # with a GPU: pipe.to("cuda", torch.float16)
pipe.load_lora_weights(RELEASE, weight_name="{{ lora }}")
{{ load_tokens }}
image = pipe({{ prompt_code }}).images[0]
image.save("lora.png")
```

### As Custom Diffusion weights

`_pipeline=pipe` is needed: without it diffusers reads the file and installs nothing
([diffusers#9320](https://github.com/huggingface/diffusers/issues/9320)).

```python
import torch
from diffusers import DiffusionPipeline
{{- "\nfrom safetensors.torch import load_file" if two_encoders }}

BASE = {{ base_code }}
RELEASE = "."

pipe = DiffusionPipeline.from_pretrained(BASE)
pipe.to(torch.float32)  # with a GPU: pipe.to("cuda", torch.float16)
pipe.unet.load_attn_procs(RELEASE, weight_name="{{ custom_diffusion }}", _pipeline=pipe)
{{ load_tokens }}
image = pipe({{ prompt_code }}).images[0]
image.save("custom_diffusion.png")
```
{%- else %}

```python
import torch
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
have their files' names:
{% for token, word in words.items() %}
- <code>{{ token }}</code>: `embedding:{{ word }}` in ComfyUI, `{{ word }}` in A1111
{%- endfor %}
{% endif %}
{%- if has_lora %}
So: `{{ prompt }} <lora:{{ file_name }}:1>` in A1111. Strength 1 is what was trained and measured.
{% elif parts %}
The changed parts of the model have no form of their own there: the words alone are not enough.
{% endif %}
{%- endif %}

## Checking the files

`manifest.json` has the sha256 sum of every file; `polyconcept release verify .` compares them. All weights are
safetensors.
"""
