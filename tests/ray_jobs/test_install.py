"""What the command needs of the environment: which packages, and nothing of the current folder."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import torch
from command import run
from packaging.requirements import Requirement
from PIL import Image

from ray_jobs.cli import EXTRAS
from ray_jobs.session import ray_session
from training.weights import ConceptWeights

ROOT = Path(__file__).parents[2]

# The command, in a process that finds none of the modules of the extras.
WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from ray_jobs.cli import main
for command in {commands}:
    try:
        main(command)
    except SystemExit as stop:
        print("ended with", stop.code or 0, flush=True)
"""


@pytest.mark.slow
def test_commands_that_need_no_extra(backbone, pico, tmp_path):
    """Merging, drawing and releases work without Ray, DeepSpeed and so on; other commands say what to install."""
    width = backbone.text_encoders[0].get_input_embeddings().embedding_dim
    described = [{"name": "a", "token": "<a>", "class_word": "cat"}]
    deltas = {name: 0.01 * torch.ones_like(layer.weight) for name, layer in backbone.layers.items()}
    made = {"concepts": described, "base": backbone.digest}
    ConceptWeights(deltas, {"<a>": [torch.ones(width)]}, made).save(tmp_path / "a.safetensors")
    (tmp_path / "captions.txt").write_text("a cat\na dog\na house")
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/file").write_text("x")
    commands = (
        "--help",
        f"merge a.safetensors --captions captions.txt --base {pico}",
        f"sample merged.safetensors cat --base {pico} --count 1 --steps 1",
        "publish prepared releases",
        "release verify releases",
        "run batch.yaml",
        "study study.yaml",
        "plan batch.yaml",
    )
    program = WITHOUT_EXTRAS.format(missing=set(EXTRAS), commands=[command.split() for command in commands])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    codes = [line for line in done.stdout.splitlines() if line.startswith("ended with")]
    assert codes == ["ended with 0"] * 5 + ["ended with 2"] * 3, done.stderr
    assert Image.open(tmp_path / "samples.png").size[0] > 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    needs_ray = "error: this command needs ray, which is not installed; run `pip install 'polyconcept[cluster]'`"
    assert errors[:2] == [needs_ray] * 2
    assert errors[2].endswith("is not installed; run `pip install 'polyconcept[train]'`")
    assert "Traceback" not in done.stderr


def test_extras_install_what_is_missing():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, extra in EXTRAS.items():
        names = {Requirement(line).name for line in extras[extra]}
        assert names & {name.lower() for name in packages_distributions()[module]}, module
    assert extras["all"] == [f"polyconcept[{','.join(dict.fromkeys(EXTRAS.values()))}]"]


def test_the_version_is_printed(capsys):
    assert run("--version", capsys=capsys) == (0, f"{version('polyconcept')}\n", "")


def test_modules_of_the_current_folder_are_not_imported(tmp_path):
    """`python -m` and `-c` search it first. Other modules of it are found as always."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training/__init__.py").write_text("raise ImportError('not polyconcept')")
    (tmp_path / "pipeline.py").write_text("raise ImportError('not polyconcept')")
    (tmp_path / "mine.py").touch()
    program = "import ray_jobs, pipeline, training.methods, mine; print(training.__file__, pipeline.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in ("training", "pipeline")], done.stderr


def test_a_ray_jobs_of_the_current_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "ray_jobs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="has a module `ray_jobs` of its own"), ray_session():
        pass
