"""Stores and releases that people have stay valid: every stage of these batches has the key it always had.

`python tests/pipeline/test_keys.py` writes the table again. A key in it may change only where the same stage makes
something else than before; CHANGELOG then says why.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.catalogue import read_catalogue
from pipeline.gate import baseline, retention
from pipeline.merge.files import load_change
from pipeline.plan import Plan, make_plan
from pipeline.release.publish import verify
from pipeline.release.versions import listed, read
from pipeline.spec import MINIATURE, ConceptBatch, Retraining, load_batch, load_retraining, overridden
from pipeline.stages.merge import Merge
from pipeline.stages.stage import Stage
from pipeline.store import Store, content_key
from pipeline.study import cases, load_study
from training.backbone import Backbone

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RELEASE = ROOT / "tests" / "data" / "release"
TABLE = Path(__file__).with_name("keys.json")

BATCHES: dict[str, dict[str, Any]] = {
    "joint": {"training": {"composition": "joint", "flip": True, "augment": False}},
    "own settings": {"own": {"training": {"steps": 7, "learning_rate": 1e-3, "seed": 9}, "initializer": "dog"}},
    "new category": {"own": {"new_category": True, "class_prompt": "cow", "prompts": ["a {} at night"]}},
    "soft": {"merge": {"form": "soft", "penalty": 0.5}, "compress": {"max_rank": 3}},
    "no regularization": {"training": {"regularization": "none", "precision": "fp32"}},
    "generated": {"training": {"regularization": "generated", "augment": False}, "retrieval": {"images": 7}},
    "dreambooth": {"training": {"method": "dreambooth", "train_text_encoder": True}, "own": {"token": "pll"}, "one": 1},
    "textual inversion": {"training": {"method": "textual_inversion"}},
    "whole unet": {"training": {"method": "custom_diffusion_all"}, "one": 1},
    "deepspeed": {"training": {"strategy": "deepspeed", "ranks": 2, "deepspeed": {"stage": 3}}},
    "deepspeed file": {"training": {"strategy": "deepspeed", "ranks": 2, "deepspeed": {"config": "zero.json"}}},
    "retrieval": {
        "retrieval": {
            "block_list": "blocked.txt",
            "miniature_captions": 100,
            "base_url": "http://127.0.0.1/",
            "max_nsfw": 0.3,
            "distributor": "ray",
        }
    },
    "safety checker": {"training": {"regularization": "generated"}, "base": "base"},
}
"""Name -> what it has beside the defaults; own: settings of its first concept; one: it has no other."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("keys"))


def _folder(path: Path) -> Path:
    """What the batches name."""
    (path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": False}}))
    (path / "blocked.txt").write_text(f"{'ab' * 32}\n{'0' * 64}  0.png\n")
    shutil.copytree(MINIATURE / "model", path / "base")
    index = json.loads((path / "base" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (path / "base" / "model_index.json").write_text(json.dumps(index))
    return path


def _batch(name: str, folder: Path) -> ConceptBatch:
    sections = dict(BATCHES[name])
    own, count = sections.pop("own", {}), sections.pop("one", 3)
    words = ("cow", "bus", "umbrella")[:count]
    concepts = [{"name": word, "images": str(EXAMPLES / "miniature" / word), "class_word": word} for word in words]
    concepts[0] |= own
    if sections.get("base"):
        sections["evaluation"] = {"clip": str(MINIATURE / "clip")}
    return ConceptBatch.model_validate({"name": "keys", "concepts": concepts, **sections}, context={"folder": folder})


def _keys(stages: Iterable[Stage]) -> dict[str, str]:
    return {f"{stage.kind} {stage.name}": stage.key for stage in stages}


def _nightly(output: Path) -> Plan:
    asked: Retraining = overridden(load_retraining(EXAMPLES / "nightly" / "retrain.yaml"), output=str(output))
    concepts, problems = read_catalogue(asked, ())
    assert not problems
    return make_plan(asked.with_concepts(concepts))


def _gate(plan: Plan, folder: Path) -> dict[str, str]:
    """What is measured for the gate, of the new release, of the current one, and of one that the store has lost."""
    current, store = read(f"{RELEASE}/v0001"), Store(str(folder / "store"))
    lost = baseline(plan, current, f"{RELEASE}/v0001", store)
    (merge,) = plan.of(Merge)
    with store.create(merge.kind, merge.key, {}):
        pass
    known = baseline(plan, current, f"{RELEASE}/v0001", store)
    plans = {"own": retention(plan), "current": known, "lost": lost}
    return {f"{which}: {name}": key for which, each in plans.items() for name, key in _keys(each).items()}


def _study(name: str) -> dict[str, str]:
    """Of each table's variants one key, made of all keys; of the first training seed alone, to be quick."""
    path = EXAMPLES / "study" / f"{name}.yaml"
    study = load_study(path)
    tables = tuple(table.model_copy(update={"seeds": table.seeds[:1]}) for table in study.tables)
    keys: dict[str, list[str]] = {}
    for case in cases(study.model_copy(update={"seeds": study.seeds[:1], "tables": tables}), path):
        keys.setdefault(f"{case.table}, {case.variant}", []).extend(stage.key for stage in case.plan)
    return {name: content_key(of) for name, of in keys.items()}


def _table(folder: Path) -> dict[str, dict[str, str]]:
    nightly = _nightly(folder)
    return {
        "examples/miniature/batch.yaml": _keys(make_plan(load_batch(EXAMPLES / "miniature" / "batch.yaml"))),
        "examples/nightly/retrain.yaml": _keys(nightly),
        "examples/nightly/retrain.yaml, gate": _gate(nightly, folder),
        "examples/study/study.yaml": _study("study"),
        "examples/study/rates.yaml": _study("rates"),
        **{name: _keys(make_plan(_batch(name, folder))) for name in BATCHES},
    }


def test_keys_are_what_they_were(folder: Path) -> None:
    known, found = json.loads(TABLE.read_text()), _table(folder)
    assert found.keys() == known.keys()
    for name, keys in known.items():
        assert found[name] == keys, name


def test_a_release_of_before_is_read(miniature: Backbone) -> None:
    """One of the nightly example, with weights of rank 1."""
    assert verify(str(RELEASE)) == []
    assert [(version.name, version.aliases) for version in listed(str(RELEASE))] == [("v0001", ("latest",))]
    deltas, tokens = load_change(f"{RELEASE}/latest", miniature)
    assert set(deltas) == set(miniature.layers) and set(tokens) == {"<bus>", "<cow>", "<umbrella>"}
    assert all(delta.any() for delta in deltas.values())


def test_a_retraining_after_a_release_of_before_reads_and_retrieves_nothing_again(folder: Path) -> None:
    """It trains again, as new tokens start from rows of their own, and merges over many prompts."""
    made, now = read(str(RELEASE))["provenance"]["stages"], _keys(_nightly(folder))
    again = {name.split()[0] for name in now if made.get(name) != now[name]}
    assert again == {"train", "constraints", "sums", "merge", "evaluate", "release"}
    base = [name for name in now if name.endswith(": base")]
    assert base and all(made[name] == now[name] for name in base)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        TABLE.write_text(json.dumps(_table(_folder(Path(scratch))), indent=1) + "\n")
