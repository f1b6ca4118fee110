"""A small study: two methods, one concept; its files, and that nothing is done twice."""

from __future__ import annotations

import pandas as pd
import pytest
import yaml
from command import run
from PIL import Image

from pipeline.miniature.world import concept_images
from pipeline.runner import Local
from pipeline.study import cases, load_study


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr("ray_jobs.runner.OnRay", Local)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bus", "cow"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(concept_images(name, "streamline-emojis", 2, seed=0)):
            image.save(tmp_path / name / f"{i}.png")
    small = {"steps": 2, "batch_size": 2, "views": 2, "regularization": "none"}
    content = {
        "name": "small",
        "output": "tables",
        "batch": {
            "concepts": [{"name": name, "images": name, "class_word": name} for name in ("bus", "cow")],
            "training": small,
            "evaluation": {"samples": 2, "steps": 2, "guidance": 3.0, "prompts": ["photo of a {}", "{} in the snow"]},
        },
        "tables": [
            {
                "name": "single",
                "title": "Single concept",
                "concepts": ["bus"],
                "variants": [
                    {"name": "Custom Diffusion"},
                    {"name": "everything", "changes": {"training": {"method": "custom_diffusion_all"}}},
                ],
            }
        ],
    }

    def write(**changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


@pytest.mark.slow
def test_tables_and_figures(study, tmp_path, capsys):
    path = study(seeds=[0, 1])  # the two trainings of one token cannot be of one pack
    code, out, err = run("study", str(path), capsys=capsys)
    assert code == 0, err
    assert "made tables/README.md" in out
    text = (tmp_path / "tables" / "README.md").read_text()
    assert "## Single concept" in text and "| Custom Diffusion |" in text and "| everything | cross-attention |" in text
    scores = pd.read_parquet(tmp_path / "tables" / "scores.parquet")
    assert scores.groupby("variant").size().to_dict() == {"base": 4, "Custom Diffusion": 8, "everything": 8}
    summary = pd.read_parquet(tmp_path / "tables" / "summary.parquet").set_index(["variant", "measure"])
    for variant, rows in scores.groupby("variant"):
        for measure in ("text", "image", "drift", "moongate"):
            row = summary.loc[(variant, measure)]
            assert row.value == pytest.approx(rows[measure].mean()) and row.low <= row.value <= row.high
    assert Image.open(tmp_path / "tables" / "single-samples.png").size == (160, 2 * 96)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("manifest.json")}
    assert run("study", str(path), capsys=capsys)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("manifest.json")} == stamps


@pytest.mark.slow
def test_two_concepts_in_one_image_and_measures_against_the_number_of_concepts(study, tmp_path, capsys):
    variants = [{"name": "alone", "together": 1}, {"name": "two", "together": 1, "beside": 1}]
    path = study(
        tables=[
            {
                "name": "pairs",
                "model": "merged",
                "concepts": ["bus", "cow"],
                "pair_prompts": ["a {0} and a {1}"],
                "note": "In words.",
                "variants": [{"name": "merged", "together": 2}],
            },
            {"name": "number", "model": "merged", "concepts": ["bus"], "against": "concepts", "variants": variants},
        ]
    )
    code, _, err = run("study", str(path), capsys=capsys)
    assert code == 0, err
    pairs = pd.read_parquet(tmp_path / "tables" / "composition.parquet")
    assert pairs[["table", "method", "first", "second", "samples"]].values.tolist() == [
        ["pairs", "merged", "bus", "cow", 2]
    ]
    text = (tmp_path / "tables" / "README.md").read_text()
    assert "| merged | bus, cow |" in text and "| merged | all |" in text and "In words." in text
    assert (tmp_path / "tables" / "number.png").exists()
    scores = pd.read_parquet(tmp_path / "tables" / "scores.parquet")
    assert set(scores[scores.table == "number"].concept) == {"bus"}  # the cow beside it is not measured
    assert set(scores[scores.table == "pairs"].concept) == {"bus", "cow"}


def test_tables_are_not_written_over_images_or_each_other(study, capsys):
    code, _, err = run("study", str(study(output="./bus/../bus")), capsys=capsys)
    assert code == 2 and "bus/0.png, which is read; give another folder" in err
    for second in ("one", "one-samples"):
        tables = [{"name": name, "variants": [{"name": "a"}]} for name in ("one", second)]
        code, _, err = run("study", str(study(tables=tables)), capsys=capsys)
        assert code == 2 and f"tables need names of their own, for their files; found '{second}" in err


def test_cases_and_what_is_wrong_with_a_study(study, capsys):
    path = study(seeds=[0, 1])
    made = list(cases(load_study(path), path))
    assert [(c.variant, c.seed) for c in made] == [(v, s) for v in ("Custom Diffusion", "everything") for s in (0, 1)]
    base = {c.stages["bus"]["base"].key for c in made}
    assert len(base) == 1 and len({c.stages["bus"]["tuned"].key for c in made}) == 4
    assert {stage.kind for stage in made[0].plan} == {"features", "train", "evaluate"}
    broken = [{"name": "t", "variants": [{"name": "v", "changes": {"training": {"stepz": 1}}}]}]
    code, _, err = run("study", str(study(tables=broken)), capsys=capsys)
    assert code == 2 and "table t, variant 'v'" in err and "stepz: unknown key; did you mean 'steps'" in err
    for table, message in (
        ({"variants": []}, "tables[0].variants"),
        ({"variants": [{"name": "v", "beside": 5}], "concepts": ["bus"]}, "only 1 further concepts"),
        ({"variants": [{"name": "v"}], "pair_prompts": ["a {0} and a {1}"]}, "even number of `concepts`"),
        ({"variants": [{"name": "v", "together": 2}], "pair_prompts": ["a {}"]}, "names the concept once by '{0}'"),
    ):
        code, _, err = run("study", str(study(tables=[{"name": "t", **table}])), capsys=capsys)
        assert code == 2 and message in err
