"""The measures against other implementations of them, and on images whose truth is known."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.models import save_for_hf

from pipeline.batch import run
from pipeline.evaluation import intervals, retention
from pipeline.evaluation.composition import Composed, appearance, composition, windows
from pipeline.evaluation.kid import kid
from pipeline.evaluation.measures import Judged, scores
from pipeline.evaluation.networks import clip_tower, identity_judge, judge_digest, load_judge, load_timm, unit
from pipeline.evaluation.prompts import TWO_PLACES, read_prompts
from pipeline.miniature.identity import load_identity
from pipeline.miniature.world import Scene, Sprite, concept_images, render
from pipeline.plan import make_plan
from pipeline.runner import Local
from pipeline.spec import MINIATURE, load_batch
from pipeline.stages.evaluate import Evaluate
from retrieval.clip import ClipModel, load_clip


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return load_clip(str(MINIATURE / "clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A small network of DINO's kind with random weights, as timm stores one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, img_size=32)
    folder = tmp_path_factory.mktemp("dino")
    config = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
    save_for_hf(
        network,
        folder,
        model_config={"pretrained_cfg": config},
        model_args={"depth": 2, "img_size": 32},
        safe_serialization=True,
    )
    return folder, network.eval()


def pictures(count: int, seed: int, cls: str = "cow", style: str = "noto") -> list[Image.Image]:
    return concept_images(cls, style, count, seed)


# --- alignment -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_alignment_is_the_cosine_image_by_image(clip, dino_folder):
    """Once more in plain open_clip, timm and torch, one pair at a time (the authors' `evaluate.py` takes the same
    cosines; of the text's it shows 2.5 times the positive part)."""
    folder, dino = dino_folder
    generated, real = pictures(3, 1), pictures(2, 2)
    texts = ["photo of a cow", "a cow in the snow", "photo of a cow"]
    judges = {
        "identity": load_judge("miniature"),
        "dino": load_judge(str(folder)),
        "other": load_judge(f"clip:{MINIATURE / 'clip'}"),
    }
    found = scores(Judged(generated, texts, real, clip, judges))
    np.testing.assert_allclose(found["other"], found["image"], rtol=1e-6)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{MINIATURE / 'clip'}")
    tokenize, model = open_clip.get_tokenizer(f"local-dir:{MINIATURE / 'clip'}"), model.eval()
    identity = load_identity()
    cosine = torch.nn.CosineSimilarity()

    def pixels(image: Image.Image, side: int, mean, std) -> torch.Tensor:
        resized = image.resize((side, side), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(resized, np.float32) / 255)
        return ((values - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]

    for i, image in enumerate(generated):
        text = cosine(model.encode_image(transform(image)[None]), model.encode_text(tokenize([texts[i]]))).item()
        assert found["text"][i] == pytest.approx(text, abs=1e-5)
        for name, encode in (
            ("image", lambda x: model.encode_image(transform(x)[None])),
            ("identity", lambda x: identity(pixels(x, 64, [0.5] * 3, [0.5] * 3))),
            ("dino", lambda x: dino(pixels(x, 32, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))),
        ):
            each = [cosine(encode(image), encode(other)).item() for other in real]
            assert found[name][i] == pytest.approx(np.mean(each), abs=1e-5), name


def test_judges_of_ones_own(dino_folder, pico, tmp_path):
    """Each has a column wherever the measures are: scores, report, release; what cannot be had is said by the plan."""
    (tmp_path / "cow").mkdir()
    for i, image in enumerate(pictures(2, 1)):
        image.save(tmp_path / "cow" / f"{i}.png")
    (tmp_path / "dino").symlink_to(dino_folder[0])
    content = {
        "base": str(pico),
        "output": str(tmp_path / "out"),
        "concepts": [{"name": "cow", "images": "cow", "class_word": "cow"}],
        "training": {"steps": 1, "batch_size": 2, "views": 2, "regularization": "none"},
        "evaluation": {"clip": str(MINIATURE / "clip"), "samples": 2, "steps": 1, "judges": {"dino": "dino"}},
    }
    (tmp_path / "batch.yaml").write_text(yaml.safe_dump(content))
    batch = load_batch(tmp_path / "batch.yaml")
    made = run(batch, Local())
    assert 0 < abs(made.summary["concepts"]["cow"]["dino_gain_merged"]) < 1
    assert "Dino alignment" in (made.report.read_text() if made.report else "")
    manifest = json.loads((Path(made.release) / "manifest.json").read_text())
    assert {"text", "image", "dino"} == set(manifest["provenance"]["measures"]["overall"])
    assert manifest["provenance"]["spec"]["evaluation"]["judges"] == {"dino": "dino"}
    (merged,) = [stage for stage in make_plan(batch).of(Evaluate) if stage.model == "merged"]
    assert merged.judges == {"dino": judge_digest(str(dino_folder[0]))}
    for judges, message in (
        ({"dino": "vit_no"}, r"evaluation\.judges\.dino: timm model 'vit_no': give"),
        ({"dino": "clip:no/such"}, r"evaluation\.judges\.dino: CLIP model"),
        ({"text": "dino"}, "evaluation.judges: a judge's name"),
        ({"seed": "dino"}, "evaluation.judges: a judge's name"),
    ):
        evaluation = content["evaluation"] | {"judges": judges}
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content | {"evaluation": evaluation}))
        with pytest.raises(ValueError, match=message):
            make_plan(load_batch(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_small_patch16_224.dina", "give <name>.<pretrained tag>"),
        ("/no/where", r"/no/where: no config.json and no model.safetensors there"),
    ],
)
def test_timm_models_that_are_not_there(model, message):
    with pytest.raises(ValueError, match=message):
        load_timm(model)


def test_timm_weights_that_do_not_fit(dino_folder, tmp_path):
    (tmp_path / "config.json").write_text(
        (dino_folder[0] / "config.json").read_text().replace('"depth": 2', '"depth": 3')
    )
    (tmp_path / "model.safetensors").write_bytes((dino_folder[0] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="could not be loaded"):
        load_timm(str(tmp_path))


def test_a_network_without_images_or_with_unscaled_features(clip):
    with pytest.raises(ValueError, match="no images to encode"):
        identity_judge().features([])
    images = pictures(3, 0)
    np.testing.assert_allclose(unit(clip_tower(clip).features(images)), clip.encode_images(images), atol=1e-6)


# --- intervals -----------------------------------------------------------------------------------------


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for i in range(200):
        estimate = intervals.mean(rng.exponential(2.0, 60), resamples=400, seed=i)
        held += estimate.low < 2.0 < estimate.high
    assert 0.88 < held / 200 < 0.99
    assert intervals.mean(np.array([1.0, 3.0])).value == 2 and intervals.mean(np.array([1.0, 3.0])).samples == 2
    one = intervals.mean(np.array([5.0]))
    assert one.value == 5 and np.isnan(one.low) and one.samples == 1
    same = intervals.mean(np.full(4, 0.25))
    assert (same.low, same.high) == (0.25, 0.25)
    with pytest.raises(ValueError, match="finite values"):
        intervals.mean(np.array([1.0, np.nan]))


def test_scores_are_summarized_per_concept_per_prompt_and_overall():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        itertools.product(("base", "merged"), ("cat", "pot"), ("a {}", "the {}"), range(5)),
        columns=["method", "concept", "prompt", "seed"],
    )
    table["text"], table["image"] = rng.random((2, len(table)))
    found = intervals.summarize(table, ["text", "image"]).set_index(["method", "concept", "prompt", "measure"])
    assert len(found) == 2 * 2 * (1 + 2 + 4)
    for (method, concept, prompt, measure), row in found.iterrows():
        own = table[(table.method == method)]
        own = own[(own.concept == concept) | (concept == "")]
        own = own[(own.prompt == prompt) | (prompt == "")][measure]
        assert row.value == pytest.approx(own.mean()) and row.samples == len(own)
        assert own.min() <= row.low < row.value < row.high <= own.max()


# --- KID -----------------------------------------------------------------------------------------------


def _mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Binkowski et al., equation 4, sum by sum."""

    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    same_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same_x + same_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_unbiased_mmd(clip):
    network = clip_tower(clip)
    drawn, real = network.features(pictures(12, 0)), network.features(pictures(12, 1, "bus", "twemoji"))
    estimate = kid(drawn, real, resamples=50)
    assert estimate.value == pytest.approx(_mmd(drawn.astype(float), real.astype(float)), rel=1e-6)
    assert estimate.low < estimate.value < estimate.high and estimate.samples == 12
    assert estimate.value > 5 * abs(kid(drawn, network.features(pictures(12, 5)), resamples=50).value)
    before = torch.random.get_rng_state()
    assert kid(drawn, real, resamples=50) == estimate
    assert torch.equal(before, torch.random.get_rng_state())


def test_kid_of_sets_of_different_size_and_its_interval():
    """In Gaussian features the distance is known: 3 |a - b|^2 / d + …, here by a large sample."""
    rng = np.random.default_rng(0)
    shift = np.full(8, 0.6)
    truth = kid(rng.normal(size=(1000, 8)) + shift, rng.normal(size=(1000, 8)), resamples=2).value
    held, values = 0, []
    for i in range(25):
        estimate = kid(rng.normal(size=(60, 8)) + shift, rng.normal(size=(60, 8)), resamples=30, seed=i)
        values.append(estimate.value)
        held += estimate.low < truth < estimate.high
    assert held >= 20 and abs(np.mean(values) - truth) < 4 * np.std(values) / np.sqrt(25) + 0.1 * truth
    unequal = [kid(rng.normal(size=(40, 8)), rng.normal(size=(70, 8)), resamples=2, seed=i).value for i in range(60)]
    assert abs(np.mean(unequal)) < 4 * np.std(unequal) / np.sqrt(60)
    for x, y, message in (
        (np.ones((3, 4)), np.ones((3, 5)), "found .3, 4. and .3, 5."),
        (np.ones((1, 4)), np.ones((3, 4)), "two images or more"),
    ):
        with pytest.raises(ValueError, match=message):
            kid(x, y)


# --- retention -----------------------------------------------------------------------------------------


def test_the_moongate_effect_as_a_number():
    """A model whose "cow" became the concept's cow, against one whose cows stayed what they were."""
    judge = identity_judge()
    training = judge.features(pictures(4, 0, style="streamline-emojis"))
    base = judge.features(pictures(8, 1, style="noto"))
    drifted = judge.features(pictures(8, 1, style="streamline-emojis"))
    kept = judge.features(pictures(8, 2, style="noto"))
    bad, good = retention.moongate(drifted, base, training), retention.moongate(kept, base, training)
    assert bad.low > 0.2 and good.low < 0.1 and abs(good.value) < 0.1 and bad.samples == 8
    by_hand = [
        np.mean(
            [
                a @ t / np.linalg.norm(a) / np.linalg.norm(t) - b @ t / np.linalg.norm(b) / np.linalg.norm(t)
                for t in training
            ]
        )
        for a, b in zip(drifted, base, strict=True)
    ]
    assert bad.value == pytest.approx(np.mean(by_hand), abs=1e-6)
    with pytest.raises(ValueError, match="the same images before and after"):
        retention.change(np.ones(3), np.ones(4))


def test_diversity_within_a_prompt(clip):
    network = clip_tower(clip)
    features = network.features(pictures(5, 0) + [pictures(1, 3)[0]] * 3)
    prompts = ["many"] * 5 + ["one"] * 3
    found = retention.diversity(features, prompts)
    own = torch.from_numpy(features[:5])
    pairs = [1 - torch.cosine_similarity(own[i], own[j], dim=0).item() for i, j in itertools.combinations(range(5), 2)]
    assert found["many"].value == pytest.approx(np.mean(pairs), abs=1e-6)
    assert found["many"].low < found["many"].value < found["many"].high and found["many"].samples == 5
    assert found["one"].value == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="prompt 'b': diversity needs two"):
        retention.diversity(np.ones((3, 2)), ["a", "a", "b"])
    with pytest.raises(ValueError, match="2 prompts and 3 images"):
        retention.diversity(np.ones((3, 2)), ["a", "a"])


# --- composition ---------------------------------------------------------------------------------------


def scenes(left: tuple[str, str], right: tuple[str, str], count: int, seed: int) -> list[Image.Image]:
    """Rendered images of two objects beside each other, as the miniature's world has them."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        sprites = tuple(
            Sprite(*what, float(rng.uniform(26, 34)), 64 * (0.27 + 0.46 * k) + rng.uniform(-2, 2), rng.uniform(24, 42))
            for k, what in enumerate((left, right))
        )
        images.append(render(Scene(sprites, "on the grass", int(rng.integers(2**31)), ""))[0])
    return images


def test_composition_finds_which_concepts_are_in_an_image(clip):
    """Rendered scenes, where the truth is known: concepts of held-out styles, the base's of the styles it saw."""
    judge = identity_judge()
    own_cow, own_bus = ("cow", "streamline-emojis"), ("bus", "fxemoji")
    real = [pictures(5, 0, *own_cow), pictures(5, 1, *own_bus)]
    seen = ("noto", "twemoji", "emojione")
    base = [image for i, style in enumerate(seen) for image in scenes(("cow", style), ("bus", style), 15, 10 + i)]
    truth = {
        "both": scenes(own_cow, own_bus, 20, 4),
        "first": scenes(own_cow, ("bus", "emojione"), 20, 5),
        "neither": scenes(("cow", "emojione"), ("bus", "emojione"), 20, 6),
    }
    known = appearance(judge, base, real)
    pairs = [
        Composed(name, ("own-cow", "own-bus"), ("cow", "bus"), appearance(judge, drawn, real), known)
        for name, drawn in truth.items()
    ]
    alike = Composed("both", ("cow-a", "cow-b"), ("cow", "cow"), pairs[0].drawn, pairs[0].base)
    table = composition([*pairs, alike], clip)
    assert list(table["second"]) == ["cow-b", "own-bus", "own-bus", "own-bus"]  # similar categories first
    assert table.class_similarity[0] == pytest.approx(1) and table.class_similarity[1] < 0.99
    found = table[1:].set_index("method")
    assert found.both_appear["both"] > 0.8 > 0.2 > found.both_appear["first"]
    assert found.first_appears["first"] > 0.8 and found.second_appears["first"] < 0.2
    assert found.first_appears["neither"] < 0.2 and found.second_appears["neither"] < 0.2
    assert (found.both_appear_low < found.both_appear_high).all() and set(found.samples) == {20}
    with pytest.raises(ValueError, match="both, own-cow and own-bus: appearances are not of the same images"):
        composition([Composed("both", ("own-cow", "own-bus"), ("cow", "bus"), (np.ones(2), np.ones(3)), known)], clip)


def test_windows_cover_the_image():
    image = Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3))
    parts = windows(image)
    assert [p.size for p in parts] == [(64, 48)] + [(32, 24)] * 9
    assert parts[9].tobytes() == image.crop((32, 24, 64, 48)).tobytes()


def test_prompt_suites_of_two_concepts(tmp_path):
    (tmp_path / "pets.txt").write_text("A photo of the {0} and {1}.\n{1} playing with {0}. \n")
    assert read_prompts(tmp_path / "pets.txt", TWO_PLACES) == ("A photo of the {0} and {1}.", "{1} playing with {0}.")
    (tmp_path / "pets.txt").write_text("{0} at dawn with {0} sleeping\n")
    with pytest.raises(ValueError, match=r"pets.txt:1: .*by '\{0\}' and '\{1\}'"):
        read_prompts(tmp_path / "pets.txt", TWO_PLACES)
