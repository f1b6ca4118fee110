"""The recipes of CONTRIBUTING.md, run as they stand."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from pipeline import report
from pipeline.evaluation import measures
from pipeline.evaluation.intervals import mean
from pipeline.gate import judge
from pipeline.merge.factors import SHARED, MergedModel
from pipeline.miniature.world import concept_images
from pipeline.plan import make_plan
from pipeline.release import formats
from pipeline.spec import MINIATURE, ConceptBatch, Gate
from pipeline.stages.evaluate import measures as means_of
from pipeline.stages.train import Train
from retrieval.clip import load_clip
from training.loop import train
from training.methods import METHODS
from training.run import Member

ROOT = Path(__file__).parents[1]


def recipe(name: str) -> dict:
    """What the example of a recipe defines."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(rf"```python {name}\n(.*?)```", text, re.DOTALL)
    defined: dict = {}
    exec(compile(code, f"CONTRIBUTING.md, {name}", "exec"), defined)
    return defined


def test_a_training_method(backbone, pico, concepts, settings, tmp_path, monkeypatch):
    """Once it is registered, batch files name it, plans hold it and the loop trains what it declares."""
    method = recipe("method")["METHOD"]
    monkeypatch.setitem(METHODS, method.name, method)
    concept_images("cat", "streamline-emojis", 1, seed=0)[0].save(tmp_path / "0.png")
    batch = {
        "name": "one",
        "base": str(pico),
        "concepts": [{"name": "cat", "images": str(tmp_path), "class_word": "cat"}],
        "training": {"method": method.name, "regularization": "none"},
        "evaluation": {"clip": str(MINIATURE / "clip")},
    }
    (stage,) = make_plan(ConceptBatch.model_validate(batch)).of(Train)
    assert stage.training.method == method.name
    assert stage.training.learning_rate == method.learning_rate

    concept = dataclasses.replace(concepts[0], token="pll")
    own = dataclasses.replace(settings, method=method.name, steps=2)
    ((_, weights),) = train(backbone, [Member([concept], own, tmp_path / "scratch")])
    assert weights.deltas and all(".attn2." in name and delta.any() for name, delta in weights.deltas.items())


def test_a_measure(monkeypatch):
    """Once it is registered, tables, reports, studies and the gate know it."""
    measure = recipe("measure")["MEASURE"]
    monkeypatch.setattr(measures, "MEASURES", (*measures.MEASURES, measure))
    blank, noise = Image.new("RGB", (8, 8), "red"), Image.fromarray(np.eye(8, dtype=np.uint8) * 255)
    clip = load_clip(str(MINIATURE / "clip"))
    judged = measures.Judged([blank, noise, noise], ["photo of a cat"] * 3, [noise], clip, {})
    values = measures.scores(judged)["sharpness"]
    assert values.shape == (3,) and values[0] == 0 < values[1] == values[2]
    assert mean(values).value == pytest.approx(values.mean())
    rows = {"prompt": "photo of a {}", "seed": range(3), **measures.scores(judged)}
    table = pd.concat([pd.DataFrame({"model": model, **rows}) for model in ("base", "single", "merged")])
    assert means_of([table])["merged"]["sharpness"] == pytest.approx(values.mean())
    assert report.compare(table)["sharpness_gain_merged"] == 0
    own = table[table.model == "merged"].drop(columns="model")
    (verdict,) = [v for v in judge(Gate(), {"a": own.assign(sharpness=0.0)}, {"a": own}, []) if not v.passed]
    assert verdict.measure == "sharpness" and "a: sharpness changed by -" in str(verdict)


def test_an_exporter(backbone, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left = {n: torch.randn(len(layer.weight), 2, generator=generator) for n, layer in backbone.layers.items()}
    width = next(iter(backbone.layers.values())).weight.shape[1]
    merged = MergedModel(left, {SHARED: torch.randn(2, width, generator=generator)}, {})
    exporter = recipe("exporter")["EXPORTER"]
    monkeypatch.setattr(formats, "EXPORTERS", (exporter,))
    merged_file, dense = formats.write_formats(merged, backbone.pipe, tmp_path, "two")
    assert (merged_file.name, dense.name) == ("merged.safetensors", "dense.safetensors")
    first = dense.read_bytes()
    assert exporter.write(merged, backbone.pipe, tmp_path, "two")[0].read_bytes() == first
    wrong = MergedModel(left, {SHARED: torch.ones(2, width + 1)}, {})
    with pytest.raises(RuntimeError, match=r"dense.safetensors: .* did not arrive"):
        exporter.write(wrong, backbone.pipe, tmp_path, "two")


def test_files_that_the_recipes_name():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {path for path in re.findall(r"`?((?:\w+/)+\w+\.(?:py|md))", text)}
    assert len(named) > 10 and all((ROOT / path).is_file() for path in named)


def test_hooks_and_workflow_run_what_make_runs():
    """The same tools as `make lint`; the README's own commands."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    tools = {hook["entry"].partition(" ")[0].removeprefix(".venv/bin/") for hook in hooks} - {"sh"}
    assert tools == {"ruff", "mypy"} and all(f"$(BIN)/{tool}" in lint for tool in tools)
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make demo", ".ci/run"]
