"""What any method makes goes through the same stages: trained, measured, released, sampled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.merge.constraints import constraint_of
from pipeline.merge.files import load_change
from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.release.formats.names import token_files
from pipeline.release.publish import publish, verify
from pipeline.report import summary, write_report
from pipeline.sampling import draw
from pipeline.spec import ConceptBatch
from pipeline.stages.compose import Compose
from pipeline.stages.features import Features
from pipeline.stages.generated import Generated
from pipeline.stages.index import Index
from pipeline.stages.merge import Merge
from pipeline.stages.pack import train_pack
from pipeline.stages.regularization import Regularization
from pipeline.stages.stage import run_stage
from pipeline.stages.train import Train
from pipeline.store import Store
from training.weights import ConceptWeights

CONCEPTS = [
    {"name": "outlined-cat", "images": "cat", "class_word": "cat"},
    {"name": "flat-turtle", "images": "turtle", "class_word": "turtle"},
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, style in (("cat", "streamline-emojis"), ("turtle", "fxemoji")):
        (folder / name).mkdir()
        for i, image in enumerate(concept_images(name, style, 2, seed=1)):
            image.save(folder / name / f"{i}.png")
    return folder


def _batch(images: Path, count: int, training: dict, **concept) -> ConceptBatch:
    concepts = [c | concept | {"images": str(images / c["images"])} for c in CONCEPTS[:count]]
    return ConceptBatch.model_validate(
        {
            "name": "small",
            "concepts": concepts,
            "retrieval": {"images": 5},
            "training": {"steps": 2, "batch_size": 2, "views": 2, "learning_rate": 1e-3, **training},
            "evaluation": {"samples": 2, "steps": 2, "guidance": 3.0, "identity": "miniature"},
        }
    )


def _run(batch: ConceptBatch, folder: Path) -> tuple[Plan, Store]:
    """Every stage in this process, in the plan's order."""
    plan, store = make_plan(batch), Store(str(folder / "store"))
    for stage in plan:
        run_stage(stage, store, lambda *_: None)
    return plan, store


def test_images_that_change_during_a_run(images, tmp_path):
    """Nothing is kept under the key of the images that the plan saw."""
    shutil.copytree(images, tmp_path / "images")
    batch = _batch(tmp_path / "images", 2, {"regularization": "none"})
    plan, store = make_plan(batch), Store(str(tmp_path / "store"))
    bases = [models["base"] for models in plan.evaluations().values()]
    stages = [plan.of(Features)[1], bases[1], Compose.of(*bases, ["photo of {0} and {1}"])]
    concept_images("turtle", "noto", 1, seed=1)[0].save(tmp_path / "images/turtle/0.png")
    for stage in stages:
        with pytest.raises(ValueError, match="images/turtle: the images changed during the run; run again"):
            run_stage(stage, store, lambda *_: None)
        assert not stage.is_in(store)


# What a user's program is: no module of this project. {code} is the card's own, as it stands.
PROGRAM = """
import sys, torch
{code}
pipe.set_progress_bar_config(disable=True)
seeded = torch.Generator().manual_seed(0)
image = pipe({prompt!r}, num_inference_steps=2, guidance_scale=3.0, generator=seeded).images[0]
image.save({out!r})
ours = {{m for m in sys.modules if m.split(".")[0] in ("pipeline", "training", "retrieval", "ray_jobs")}}
assert ours <= {{"pipeline", "pipeline.miniature"}}, ours  # where the base lies
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "count", "parts"),
    [
        ({"method": "custom_diffusion_crossattn", "regularization": "none"}, 1, ["unet"]),
        ({"method": "custom_diffusion_all", "regularization": "none", "composition": "joint"}, 2, ["unet"]),
        ({"method": "dreambooth", "train_text_encoder": True, "learning_rate": 1e-4}, 1, ["text_encoder", "unet"]),
        ({"method": "textual_inversion", "learning_rate": 1e-1}, 2, []),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else None,
)
def test_released_sampled_and_measured_alike(miniature, images, tmp_path, training, count, parts):
    plan, store = _run(_batch(images, count, training), tmp_path)
    release = publish(plan.release.result(store).folder, str(tmp_path / "releases"))
    place = Path(release.url)
    assert not verify(release.url)
    assert sorted(p.name for p in place.iterdir() if p.is_dir() and p.name != "comfyui") == parts
    tokens = [c.token for c in plan.batch.concepts if c.token.startswith("<")]
    assert set(token_files(tokens, "small").values()) <= {p.name for p in place.iterdir()}
    assert not any(str(tmp_path) in p.read_text() for p in place.rglob("*.json"))

    # measured and reported
    figures = summary(plan, store, release.url)
    for entry in figures["concepts"].values():
        assert {"base", "single", "merged"} <= entry.keys() and entry["image_gain_merged"] is not None
    write_report(plan, store, release.url, tmp_path / "report.html")
    assert training["method"] in (tmp_path / "report.html").read_text()

    # sampled: the release draws what training made, and not what the base does
    prompt = f"photo of a {plan.batch.concepts[0].phrase}"
    deltas, rows = load_change(str(tmp_path / "releases"), miniature)
    with miniature.changed(deltas, rows):
        (ours,) = draw(miniature, [prompt], seeds=[0], steps=2, guidance=3.0)
    (base,) = draw(miniature, ["photo of a cat"], seeds=[0], steps=2, guidance=3.0)
    assert _difference(ours, base) > 1

    # and diffusers alone draws the same with the card's own code
    card = (place / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].partition("\nimage = ")[0]
    program = PROGRAM.format(code=code, prompt=prompt, out=str(tmp_path / "theirs.png"))
    done = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _difference(ours, Image.open(tmp_path / "theirs.png")) < 1


def _difference(a: Image.Image, b: Image.Image) -> float:
    """Mean over the pixels, of 255."""
    one, other = (torch.frombuffer(bytearray(i.convert("RGB").tobytes()), dtype=torch.uint8).float() for i in (a, b))
    return float((one - other).abs().mean())


def test_generated_images_are_as_many_as_asked_with_the_class_caption(images, tmp_path):
    plan = make_plan(_batch(images, 2, {"regularization": "generated"}))
    store = Store(str(tmp_path / "store"))
    sets = [run_stage(stage, store, lambda *_: None).load() for stage in plan.of(Generated)]
    first = sets[0]
    assert first.captions() == ["photo of a cat"] * 5 and first.asked == first.got == 5
    drawn = [image for image, _ in first]
    assert {image.size for image in drawn} == {(64, 64)} and len({image.tobytes() for image in drawn}) == 5
    assert sets[1].captions() == ["photo of a turtle"] * 5
    assert not plan.of(Index) and not plan.of(Regularization)
    # as retrieved ones, they are the same for all seeds of the training
    other = make_plan(_batch(images, 2, {"regularization": "generated", "seed": 7}))
    assert [s.key for s in other.of(Generated)] == [s.key for s in plan.of(Generated)]
    # concepts of one class have one set
    both = _batch(images, 2, {"regularization": "generated"}, class_prompt="a scene")
    assert len({s.key for s in make_plan(both).of(Generated)}) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's, which lost its file
def test_another_run_is_first(images, tmp_path):
    """Two runs of one store train the same: when the other has finished it and cleared its scratch folder, this one
    takes its result, and goes on with its other trainings."""
    plan = make_plan(
        _batch(images, 2, {"regularization": "none", "steps": 4, "sample_every": 3, "checkpoint_every": 2})
    )
    store = Store(str(tmp_path / "store"))
    for stage in plan.of(Features):
        run_stage(stage, store, lambda *_: None)
    cat, turtle = plan.of(Train)

    def finish(stage, what, done, total):
        if stage == cat and done == 1:
            with store.create(cat.kind, cat.key, {"name": "the other's"}) as out:
                (out / "weights.safetensors").touch()

    assert train_pack([cat, turtle], store, finish) == {}
    assert store.manifest(cat.kind, cat.key)["name"] == "the other's"
    assert turtle.result(store).weights().metadata["steps"] == 4
    assert list((store.local / ".scratch").iterdir()) == []


@pytest.mark.slow
def test_new_categories_are_merged_by_their_class_words(miniature, images, tmp_path):
    plan, store = _run(_batch(images, 2, {"regularization": "none"}, new_category=True), tmp_path)
    (merge,) = plan.of(Merge)
    model = merge.result(store).full()
    assert not model.tokens and [c["token"] for c in model.metadata["concepts"]] == ["", ""]
    weights = plan.of(Train)[0].result(store).weights()
    (constraint,) = constraint_of(miniature, weights, ["photo of a {}"], exact=True)
    assert len(constraint.rows) == 2  # cat, end-of-text
    for name, change in constraint.changes.items():
        met = constraint.rows @ model.deltas[name].double().T
        assert (met - change).norm() < 0.5 * change.norm()


def test_only_text_kv_changes_are_merged(miniature):
    weights = ConceptWeights({"conv_in": torch.zeros(1)}, {}, {"method": "dreambooth", "concepts": []})
    with pytest.raises(ValueError, match="weights made by dreambooth cannot be merged"):
        constraint_of(miniature, weights, ["{}"])


def test_rare_words_are_checked_before_anything_runs(images):
    with pytest.raises(ValueError, match="token 'zzyzx': this method needs a word"):
        make_plan(_batch(images, 1, {"method": "dreambooth"}, token="zzyzx"))
