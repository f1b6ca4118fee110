import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from pipeline.merge.factors import SHARED, MergedModel
from pipeline.plan import Plan, training_of
from pipeline.report import compare, summary, write_report
from pipeline.sampling import grid
from pipeline.spec import Concept, ConceptBatch
from pipeline.stages.candidates import Candidates
from pipeline.stages.drawn import DrawSettings, Model, Phrase
from pipeline.stages.evaluate import Evaluate, EvaluatePlaces
from pipeline.stages.merge import Merge
from pipeline.stages.regularization import Regularization
from pipeline.stages.stage import Stage, part_of
from pipeline.store import Store
from retrieval.regularization import RegularizationSet
from retrieval.select import CANDIDATES, LEFT_OUT
from training.weights import ConceptWeights

EVIL = "<script>alert('x')</script>"
PROMPTS = ("photo of a {}", "{} in the snow")
RELEASE = "s3://models/demo/v0001"
MODELS = {"base": (), "single": ("train",), "merged": ("merge",)}
MEASURED = {  # two prompts of two seeds each
    "image": {
        "base": [0.5, 0.6, 0.4, 0.5],
        "single": [0.6, 0.8, 0.5, 0.7],  # differences 0.1, 0.2, 0.1, 0.2
        "merged": [0.7, 0.6, 0.5, 0.624],
    },
    "text": {
        "base": [0.2, 0.2, 0.3, 0.3],
        "single": [0.2, 0.2, 0.25, 0.25],
        "merged": [0.2, 0.2, 0.3, 0.2],
    },
    "identity": {
        "base": [0.1, 0.1, 0.1, 0.1],
        "single": [0.3, 0.3, 0.3, 0.3],
        "merged": [0.2, 0.4, 0.2, 0.4],
    },
}


def scores() -> pd.DataFrame:
    rows = [
        {"model": model, "prompt": PROMPTS[i // 2], "seed": i} | {s: MEASURED[s][model][i] for s in MEASURED}
        for model in MEASURED["image"]
        for i in range(4)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)  # pairs are found by prompt and seed, not by position


def noise(side: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def make(store: Store, stage: Stage, seconds: float) -> Path:
    """The folder of an artifact, whole after its manifest."""
    folder = store.local / stage.kind / stage.key
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"kind": stage.kind, "key": stage.key, "seconds": seconds}))
    return folder


def make_regularization(folder: Path) -> None:
    folder = folder / "set"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "00000.tar")) as shard:
        for i in range(3):
            jpg = io.BytesIO()
            noise(64, i).save(jpg, "jpeg")
            shard.write({"__key__": f"{i:09d}", "jpg": jpg.getvalue(), "txt": f"a cat {EVIL} {i}", "json": b"{}"})
    statuses = {"failed_to_download": 2, "success": 3}
    RegularizationSet(folder, 5, 3, statuses, "3 of 5 images: all 5 candidates are used up").save()


def regularization(images: tuple[str, ...]) -> Regularization:
    return Regularization(
        name="cat",
        images=5,
        size=64,
        exclude=(),
        block_list=(),
        base_url="",
        local=True,
        miniature=False,
        places=Regularization.Places(images, "multiprocessing"),
    )


def evaluation(batch: ConceptBatch, concept: Concept, model: Model, inputs: tuple[Stage, ...]) -> Evaluate:
    return Evaluate(
        name=f"{concept.name}: {model}",
        inputs=inputs,
        base="base",
        clip="clip",
        judge="",
        model=model,
        evaluation=part_of(DrawSettings, batch.evaluation),
        prompts=tuple(PROMPTS),
        concept=concept.name,
        phrase=Phrase(concept.token, concept.class_word),
        images=(),
        places=EvaluatePlaces("base", "clip", "auto", concept.images, {}),
    )


def make_run(tmp_path: Path, composition: str = "merged", identity: bool = True) -> tuple[Plan, Store]:
    """A finished run of two concepts; the second's name is hostile (which a batch file could not say)."""
    (tmp_path / "images").mkdir()
    for i in range(2):
        noise(64, i).save(tmp_path / "images" / f"{i}.png")
    place = (str(tmp_path / "images"),)
    cat = Concept(name="cat", images=place, class_word=f"cat {EVIL}")
    evil = Concept.model_construct(name=f"evil {EVIL}", images=place, class_word="dog", token="<new2>")
    batch = ConceptBatch(name="demo", concepts=(cat, evil), training={"composition": composition})
    batch = batch.model_copy(update={"store": "s3://KEY:pass/word@b/st"})  # read from a file it would be refused
    store = Store(str(tmp_path / "store"))
    stages = []

    def add(stage: Stage, seconds: float) -> Path:
        stages.append(stage)
        return make(store, stage, seconds)

    make_regularization(add(regularization(place), 2.5))
    groups = [list(batch.concepts)] if composition == "joint" else [[c] for c in batch.concepts]
    for group in groups:
        folder = add(training_of(batch, "base", group, ()), 10.0)
        losses = np.random.default_rng(0).random(40).tolist()
        tokens = {c.token: [torch.zeros(8)] for c in group}
        ConceptWeights({"layer": torch.zeros(64, 8)}, tokens, {"losses": losses}).save(folder / "weights.safetensors")
        for step in (20, 40):
            grid([[noise(64, i) for i in range(4)]], labels=["step"]).save(folder / f"samples-{step:05d}.png")
    trained = {name: stage for stage in stages[1:] for name in stage.concepts}

    merge = Merge(name="all concepts")
    folder = add(merge, 1.5)
    full = MergedModel({"layer": torch.zeros(64, 2)}, {SHARED: torch.zeros(2, 8)}, {})
    full.save(folder / "full.safetensors")
    residuals = {c.name: 1e-9 for c in batch.concepts}
    report = {
        "form": "soft",
        "rows": 2,
        "regularization_captions": 3,
        "condition": float("nan"),
        "drift": 0.01,
        "residuals": residuals,
        "compressed": {"error": 0.0, "drift": 0.02, "residuals": {name: 2e-4 for name in residuals}},
        "unseen": {name: {"words": 0.41, "padding": 0.52} for name in residuals},
        "moved": {"words": 0.013, "padding": 0.024, "empty": 0.005},
        "bytes": {"concepts": 4000, "concept_files": 4100, "merged_dense": 2000, "merged": 300},
    }
    (folder / "report.json").write_text(json.dumps(report))
    for c in batch.concepts:
        table = scores()
        for model, inputs in MODELS.items():
            upstream = tuple({"merge": merge, "train": trained[c.name]}[kind] for kind in inputs)
            folder = add(evaluation(batch, c, model, upstream), 1.0)
            own = table[table["model"] == model]
            (own if identity else own.drop(columns="identity")).to_parquet(folder / "scores.parquet")
            rows = [[noise(64, 2 * row + i) for i in range(2)] for row in range(2)]
            grid(rows, side=96).save(folder / "images.png")
    return Plan(batch, tuple(stages), (f"cat: 0.png: {EVIL}",)), store


def test_comparisons_are_paired_by_prompt_and_seed() -> None:
    compared = compare(scores())
    # mean 0.15, sample deviation 0.0577…, over sqrt(4) images
    assert compared["image_gain_single"] == pytest.approx(0.15)
    assert compared["image_gain_single_se"] == pytest.approx(0.15 / (np.sqrt(0.01 / 3) / 2))
    merged = np.array([0.2, 0.0, 0.1, 0.124])
    assert compared["image_gain_merged_se"] == pytest.approx(merged.mean() / (merged.std(ddof=1) / 2))
    assert compared["identity_gain_merged"] == pytest.approx(0.2)
    assert compared["identity_gain_merged_se"] == pytest.approx(0.2 / (np.sqrt(0.04 / 3) / 2))
    assert compared["text_ratio_single"] == pytest.approx(0.9)
    assert compared["text_ratio_merged"] == pytest.approx(0.9)


def test_a_gain_without_spread_has_no_standard_error() -> None:
    one = scores().query("seed == 0")
    assert np.isnan(compare(one)["image_gain_single_se"])
    assert np.isnan(compare(scores())["identity_gain_single_se"])


def test_summary(tmp_path: Path) -> None:
    plan, store = make_run(tmp_path)
    figures = summary(plan, store, RELEASE)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert (figures["name"], figures["release"]) == ("demo", RELEASE)
    assert figures["seconds"]["train"] == {"cat": 10.0, f"evil {EVIL}": 10.0}
    assert figures["seconds_per_kind"] == {"regularization": 2.5, "train": 20.0, "merge": 1.5, "evaluate": 6.0}
    assert figures["seconds_total"] == 30.0
    cat, evil = figures["concepts"].values()
    assert (cat["token"], cat["class_word"]) == ("<new1>", f"cat {EVIL}")
    assert cat["base"]["image"] == pytest.approx(0.5)
    assert cat["base"]["image_se"] == pytest.approx(np.std(MEASURED["image"]["base"], ddof=1) / 2)
    assert set(cat) >= {"base", "single", "merged"}
    assert cat["regularization"]["statuses"] == {"failed_to_download": 2, "success": 3}
    assert (cat["regularization"]["asked"], cat["regularization"]["got"]) == (5, 3)
    assert "regularization" not in evil
    assert figures["overall"]["merged"] == pytest.approx({"image": 0.606, "text": 0.225, "identity": 0.3})
    assert figures["overall"]["image_gain_single"] == pytest.approx(0.15)
    assert figures["worst"]["text_ratio_merged"] == {"concept": "cat", "value": pytest.approx(0.9)}
    assert figures["merge"]["condition"] is None
    assert figures["residuals"]["after"]["cat"] == 2e-4
    assert figures["drift"] == {"before": 0.01, "after": 0.02}
    exact = plan.of(Merge)[0].result(store).full_file.stat().st_size
    assert figures["bytes"]["merged_factors"] == exact
    assert figures["bytes"]["ratio"] == 300 / 4000


def test_what_retrieval_left_out_is_said(tmp_path: Path) -> None:
    plan, store = make_run(tmp_path)
    assert summary(plan, store, RELEASE)["left_out"] == []
    candidates = Candidates(
        name="cat", prompt="cat", count=5, max_nsfw=0.5, block_list=(), places=Candidates.Places("clip")
    )
    folder = make(store, candidates, 1.0)
    (folder / "corpus.json").write_text(json.dumps({"rows": 1000, "used": 988}))
    schema = CANDIDATES.with_metadata({LEFT_OUT: json.dumps({"nsfw": 3, "unscored": 4, "blocked": 5})})
    pq.write_table(schema.empty_table(), folder / "candidates.parquet")
    (retrieved,) = plan.of(Regularization)
    RegularizationSet(retrieved.result(store).path, 5, 3, {"blocked": 2, "success": 3}, None).save()
    plan = dataclasses.replace(plan, stages=(candidates, *plan.stages))
    said = summary(plan, store, RELEASE)["left_out"]
    assert [line.partition(" left out")[0] for line in said] == [
        "The corpus: 12 of 1000 rows are",
        "“cat”: 3 captions are",
        "“cat”: 4 captions are",
        "“cat”: 5 captions are",
        "cat: 2 downloaded images are",
    ]
    write_report(plan, store, RELEASE, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(line in page for line in said)


@pytest.mark.parametrize("composition", ["merged", "joint"])
@pytest.mark.parametrize("identity", [True, False])
def test_the_page_stands_alone_and_says_everything(tmp_path: Path, composition: str, identity: bool) -> None:
    plan, store = make_run(tmp_path, composition, identity)
    path = tmp_path / "out" / "report.html"
    write_report(plan, store, RELEASE, path)
    page = path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert len(page) < 1_000_000
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"https?://", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert all(alt for alt in re.findall(r'<img[^>]* alt="([^"]*)"', page))
    assert page.count("<img") == page.count(" alt=") == len(sources)
    # 2 concepts of 2 images, and of 2 prompts by 3 models; 3 retrieved; a curve and 2 grids a training; a chart a score
    trainings = 1 if composition == "joint" else 2
    assert len(sources) == 2 * 2 + 2 * 2 * 3 + 3 + 3 * trainings + 2 + identity
    assert page.count('class="concept"') == 2 and 'id="concept-cat"' in page and 'id="concept-evil &lt;script' in page
    assert ("Trained together" in page) == (composition == "joint")
    assert ("Identity" in page) == identity
    assert "3 of 5 images: all 5 candidates are used up" in page
    assert "+5.2 s.e." in re.sub("<[^>]*>", "", page)
    assert "pass/word" not in page and "s3://***@b/st" in page
    assert "in the snow" in page and RELEASE in page and "7.5% of the concepts" in page


def test_many_concepts_show_fewer_pictures_of_each(tmp_path: Path) -> None:
    plan, store = make_run(tmp_path)
    again = []
    for i in range(39):
        for stage in plan.evaluations()["cat"].values():
            again.append(dataclasses.replace(stage, concept=f"cat{i}"))
            folder = make(store, again[-1], 0.1)
            for file in stage.result(store).folder.glob("*.p*"):
                (folder / file.name).write_bytes(file.read_bytes())
    plan = Plan(plan.batch, (*plan.stages, *again), plan.notes)
    write_report(plan, store, RELEASE, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="concept"') == 41
    assert "the first 1 of 2 prompts" in page and "open>" not in page
