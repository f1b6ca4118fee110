"""What several kinds of cases are made of: a small batch, weights, a finished store. Made once, before any fork."""

from __future__ import annotations

import functools
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hostile.case import Case, Check, words, write

ROOT = Path(__file__).parents[2]
BUS = ROOT / "examples/miniature/bus"
COW = ROOT / "examples/miniature/cow"
MODEL = ROOT / "pipeline/miniature/model"
CLIP = ROOT / "pipeline/miniature/clip"


def batch_text(extra: str = "", training: str = "", evaluation: str = "", **concept: str) -> str:
    """A batch file of one concept, in YAML. training, evaluation: further settings there; concept: further or other
    keys of the concept, as they are written in YAML."""
    own = {"name": "bus", "images": str(BUS), "class_word": "bus"} | concept
    inner = ", ".join(f"{key}: {value}" for key, value in own.items())
    training = ", ".join(filter(None, ["regularization: none", training]))
    return f"concepts: [{{{inner}}}]\ntraining: {{{training}}}\nevaluation: {{{evaluation}}}\n{extra}\n"


def load(path: str = "batch.yaml") -> Any:
    from pipeline.spec import load_batch

    return load_batch(path)


def planned(path: str = "batch.yaml") -> Any:
    """What `polyconcept plan` begins with, whose refusals are its."""
    from pipeline.plan import make_plan

    return make_plan(load(path))


def batch(
    name: str,
    /,
    text: str | bytes | None = None,
    *,
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    files: dict[str, str | bytes] | None = None,
    prepare: Callable[[], None] | None = None,
    hand_over: Callable[[], Any] = planned,
    never: tuple[str, ...] = (),
    **changes: str,
) -> Case:
    """A case of a batch file: its text, or a small correct one with changes; it is to be planned."""

    def give() -> Callable[[], Any]:
        write(**{"batch.yaml": batch_text(**changes) if text is None else text} | (files or {}))
        if prepare:
            prepare()
        return hand_over

    return Case(name, give, words(refused), right, never)


def png(colour: str = "red", size: tuple[int, int] = (64, 64), kind: str = "PNG", **options: Any) -> bytes:
    return encoded(Image.new("RGB", size, colour), kind, **options)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def picture(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Smooth random colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


class Pickled:
    """Unpickled, it makes the file `executed`, which no case allows."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


@functools.cache
def backbone() -> Any:
    from training.backbone import load_backbone

    return load_backbone(MODEL)


def concept_weights(name: str = "bus", token: str = "<new1>", class_word: str = "bus", seed: int = 0) -> dict[str, Any]:
    """Tensors and description of a concept's weights, as training writes them, of small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"delta.{layer}": 0.01 * torch.randn(module.weight.shape, generator=generator)
        for layer, module in backbone().layers.items()
    }
    width = backbone().text_encoders[0].get_input_embeddings().weight.shape[1]
    tensors[f"token.0.{token}"] = 0.01 * torch.randn(width, generator=generator)
    described = {
        "kind": "concept_weights",
        "base": backbone().digest,
        "method": "custom_diffusion",
        "concepts": [{"name": name, "token": token, "class_word": class_word}],
        "steps": 1,
        "losses": [0.1],
    }
    return {"tensors": tensors, "described": described}


def save_weights(path: str, made: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    described = {"polyconcept": json.dumps(made["described"])} if metadata is None else metadata
    save_file(made["tensors"], path, described)


def preload() -> None:
    """Import once what the cases use: importing takes longer than most of them."""
    import deepspeed  # noqa: F401
    import open_clip  # noqa: F401
    import ray.job_submission  # noqa: F401

    import retrieval.fetch  # noqa: F401

    (shared() / "batch.yaml").write_text(batch_text())
    planned(str(shared() / "batch.yaml"))


@functools.cache
def shared() -> Path:
    """A folder for what cases share; removed when the campaign ends."""
    return Path(tempfile.mkdtemp(prefix="shared-"))


FINISHED = """\
name: finished
concepts:
  - {{name: bus, images: {bus}, class_word: bus}}
  - {{name: cow, images: {cow}, class_word: cow}}
training: {{steps: 2, batch_size: 1, views: 1, regularization: none, learning_rate: 1.0e-4}}
evaluation: {{samples: 1, steps: 1}}
"""


@functools.cache
def finished() -> Path:
    """A batch of two concepts in a folder of its own, everything done in its store but the publication."""
    from pipeline.stages.stage import run_stage
    from pipeline.store import Store

    folder = shared() / "finished"
    folder.mkdir()
    text = FINISHED.format(bus=BUS, cow=COW) + f"output: {folder}/out\n"
    (folder / "batch.yaml").write_text(text)
    plan = planned(str(folder / "batch.yaml"))
    store = Store(plan.batch.store_url)
    for stage in plan:
        run_stage(stage, store, lambda *_: None)
    return folder
