"""What each stage does: plain functions from artifacts to an artifact; `run_stage` finds inputs, keeps results."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.evaluation.alignment import Judges, scores
from pipeline.merge.compress import in_half, shared_factors, weighted_factors
from pipeline.merge.factors import SHARED, MergedModel
from pipeline.merge.solve import Constraint, constraint_of, damped_gram, merge, regularization_rows, report
from pipeline.miniature.corpus import serve_corpus, write_corpus
from pipeline.plan import Stage
from pipeline.release.card import CardConcept, write_card
from pipeline.release.formats import write_formats
from pipeline.sampling import draw, grid
from pipeline.store import Store
from retrieval.clip import load_clip
from retrieval.corpus import precomputed, read_corpus
from retrieval.download import download
from retrieval.images import perceptual_hash
from retrieval.index import build_index, build_index_from_embeddings
from retrieval.regularization import RegularizationSet
from retrieval.select import candidates
from training.attention import training_dtype, use_attention
from training.backbone import Backbone, load_backbone
from training.features import (
    ConceptFeatures,
    RegularizationFeatures,
    concept_features,
    regularization_features,
)
from training.images import load_images
from training.loop import TrainingConcept, TrainingSettings, train
from training.weights import ConceptWeights

Progress = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and how many there are."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage function gets: its stage, where its inputs lie, where to write, where to keep checkpoints."""

    stage: Stage
    inputs: dict[str, list[Path]]
    out: Path
    scratch: Path
    progress: Progress

    def input(self, kind: str) -> Path:
        (path,) = self.inputs[kind]
        return path


def run_stage(stage: Stage, store: Store, progress: Progress) -> Path:
    """Make a stage's artifact unless the store has it; its inputs must be there. Returns its local folder."""
    if not store.has(stage.kind, stage.key):
        inputs: dict[str, list[Path]] = {}
        for upstream in stage.inputs:
            inputs.setdefault(upstream.kind, []).append(store.path(upstream.kind, upstream.key))
        with store.create(stage.kind, stage.key, {"name": stage.name, "params": stage.params}) as out:
            FUNCTIONS[stage.kind](Work(stage, inputs, out, store.scratch(stage.key), progress))
    return store.path(stage.kind, stage.key)


@functools.lru_cache(maxsize=1)
def _backbone(path: str, dtype: torch.dtype) -> Backbone:
    """One resident base model a process: a Ray worker that runs several stages loads it once."""
    return load_backbone(path, dtype=dtype)


# --- retrieval -----------------------------------------------------------------------------------------


def index(work: Work) -> None:
    corpus = work.stage.places["corpus"]
    if corpus == "miniature":
        rows = int(work.stage.params["corpus"].rsplit("-", 1)[1])
        corpus = str(work.scratch / "corpus.parquet")
        write_corpus(Path(corpus), rows, seed=0)
    pairs = precomputed(corpus)
    if pairs:
        build_index_from_embeddings(pairs, work.out / "index")
    else:
        clip = load_clip(work.stage.places["clip"])
        build_index(read_corpus(corpus), clip.encode_text, work.out / "index", model=clip.digest)


def retrieve(work: Work) -> None:
    params = work.stage.params
    table = candidates(
        work.input("index") / "index",
        load_clip(work.stage.places["clip"]),
        params["prompt"],
        params["count"],
        max_nsfw=params["max_nsfw"],
        blocked_sha256=params["block_list"],
    )
    pq.write_table(table, work.out / "candidates.parquet")


def regularization(work: Work) -> None:
    params = work.stage.params
    own = [perceptual_hash(image) for image in load_images(work.stage.places["images"]).images]
    with contextlib.ExitStack() as stack:
        base_url = stack.enter_context(serve_corpus()) if params["miniature"] else params["base_url"] or None
        found = download(
            pq.read_table(work.input("candidates") / "candidates.parquet"),
            work.out / "set",
            count=params["images"],
            image_size=params["size"],
            local=params["local"],
            base_url=base_url,
            exclude=own,
            blocked_sha256=params["block_list"],
        )
    if not found.got:
        raise ValueError(f"no regularisation image could be had: {found.shortfall}")


def regularization_set(artifact: Path) -> RegularizationSet:
    """The set in an artifact of the stage `regularization`."""
    return RegularizationSet.load(artifact / "set")


# --- training ------------------------------------------------------------------------------------------


def features(work: Work) -> None:
    params, backbone = work.stage.params, _backbone(work.stage.places["base"], torch.float32)
    own = load_images(work.stage.places["images"])
    made = concept_features(
        backbone, own.images, own.digests, views=params["views"] or 1, augment=params["views"] > 0, seed=params["seed"]
    )
    made.save(work.out / "concept.safetensors")
    for path in work.inputs.get("regularization", []):
        samples = regularization_set(path)
        regularization_features(backbone, samples, seed=params["seed"]).save(work.out / "regularization.safetensors")


def train_concepts(work: Work) -> None:
    params, places = work.stage.params, work.stage.places
    values = dict(params["training"])
    backbone = _backbone(places["base"], training_dtype(values.pop("precision")))
    use_attention(backbone.unet, places["attention"])
    values.pop("regularization")
    settings = TrainingSettings(
        **values, checkpoint_every=places["checkpoint_every"], sample_every=places["sample_every"]
    )
    concepts = []
    for (name, (token, class_word, initializer)), folder in zip(
        params["concepts"].items(), work.inputs["features"], strict=True
    ):
        prior = folder / "regularization.safetensors"
        concepts.append(
            TrainingConcept(
                name,
                token,
                initializer,
                class_word,
                ConceptFeatures.load(folder / "concept.safetensors"),
                RegularizationFeatures.load(prior) if prior.exists() else None,
            )
        )

    def sample(path: Path, step: int) -> None:
        prompts = [settings.prompt.format(f"{c.token} {c.class_word}") for c in concepts for _ in range(4)]
        images = draw(backbone, prompts, seeds=list(range(len(prompts))), steps=20, guidance=3.0)
        rows = [images[i : i + 4] for i in range(0, len(images), 4)]
        grid(rows, labels=[f"{c.name}, step {step}" for c in concepts]).save(path)

    weights = train(
        backbone,
        concepts,
        settings,
        scratch=work.scratch,
        sample=sample,
        progress=lambda step, loss: work.progress("steps", step, settings.steps),
    )
    weights.save(work.out / "weights.safetensors")
    shutil.copytree(work.scratch / "tensorboard", work.out / "tensorboard")
    for path in sorted(work.scratch.glob("samples-*.png")):
        shutil.copy(path, work.out)


# --- merge ---------------------------------------------------------------------------------------------


def merge_concepts(work: Work) -> None:
    """`full.safetensors`: the exact factors; `merged.safetensors`: float16, within the budget; `report.json`."""
    settings, budget = work.stage.params["merge"], work.stage.params["compress"]
    backbone = _backbone(work.stage.places["base"], torch.float32)
    trained = [ConceptWeights.load(path / "weights.safetensors") for path in work.inputs["train"]]
    captions = _captions(work.inputs.get("regularization", []), settings["captions"], trained)
    rows = regularization_rows(backbone, captions)
    base = {name: layer.weight.data for name, layer in backbone.layers.items()}
    gram, _ = damped_gram(rows, settings["damping"])
    constraints: list[Constraint] = []
    tokens: dict[str, list[torch.Tensor]] = {}
    concepts: list[dict[str, str]] = []
    for weights in trained:
        constraints += constraint_of(backbone, weights, settings["prompts"])
        tokens |= weights.tokens
        concepts += weights.metadata["concepts"]
    if len(trained) == 1:
        # one set of weights (a single concept, or joint training) needs no merge, only compression
        full, _ = weighted_factors(trained[0].deltas, gram)
        solved = report(full, constraints, rows, base)
    else:
        full, solved = merge(
            constraints,
            rows,
            base,
            form=settings["form"],
            damping=settings["damping"],
            penalty=settings["penalty"],
        )
    metadata = {"base": backbone.digest, "concepts": concepts}
    full = dataclasses.replace(full, tokens=tokens, metadata=metadata)
    small, error = full, 0.0
    if SHARED in full.right and (budget["max_rank"] or budget["max_bytes"]):
        per_rank = 2 * (full.right[SHARED].shape[1] + sum(len(left) for left in full.left.values()))
        rank = min(budget["max_rank"] or solved.rows, (budget["max_bytes"] or 2**62) // per_rank)
        if not rank:
            raise ValueError(f"compress.max_bytes {budget['max_bytes']}: one rank costs {per_rank} bytes")
        small, error = shared_factors(full, gram, rank)
    elif SHARED not in full.right:
        # full-rank factors are larger than the matrices: a single set is always cut, to the paper's fifth by default
        most = budget["max_bytes"] or (None if budget["max_rank"] else trained[0].nbytes // 5)
        small, error = weighted_factors(full.deltas, gram, max_rank=budget["max_rank"], max_bytes=most)
    small = in_half(dataclasses.replace(small, tokens=tokens, metadata=metadata))
    final = report(small, constraints, rows, base)
    full.save(work.out / "full.safetensors")
    small.save(work.out / "merged.safetensors")
    summary = {
        "form": settings["form"] if len(trained) > 1 else "none",
        "rows": solved.rows,
        "regularization_captions": len(captions),
        "condition": solved.condition if math.isfinite(solved.condition) else None,
        "drift": solved.drift,
        "residuals": solved.residuals,
        "compressed": {"error": error, "drift": final.drift, "residuals": final.residuals},
        "bytes": {
            "concepts": sum(weights.nbytes for weights in trained),
            "concept_files": sum((path / "weights.safetensors").stat().st_size for path in work.inputs["train"]),
            "merged_dense": sum(w.nbytes for w in trained[:1]),
            "merged": (work.out / "merged.safetensors").stat().st_size,
        },
    }
    (work.out / "report.json").write_text(json.dumps(summary, indent=1))


def _captions(sets: list[Path], limit: int, trained: list[ConceptWeights]) -> list[str]:
    """Regularisation captions for G, the same share of each concept's; without any, the bare class words."""
    if not sets:
        words = {c["class_word"] for weights in trained for c in weights.metadata["concepts"]}
        return [form.format(word) for word in sorted(words) for form in ("{}", "photo of a {}", "a {}")]
    each = [regularization_set(path).captions() for path in sets]
    share = -(-limit // len(each))
    return list(dict.fromkeys(caption for captions in each for caption in captions[:share]))[:limit]


# --- measures ------------------------------------------------------------------------------------------


def evaluate(work: Work) -> None:
    """`scores.parquet`: a row per image; `base.png`, `single.png`, `merged.png`: rows of the same prompts and seeds."""
    params, places = work.stage.params, work.stage.places
    settings = params["evaluation"]
    backbone = _backbone(places["base"], torch.float32)
    use_attention(backbone.unet, places["attention"])
    judges = Judges.load(load_clip(places["clip"]), settings["identity"])
    references = load_images(places["images"]).images
    token, class_word = params["phrase"]
    full = MergedModel.load(work.input("merge") / "full.safetensors")
    small = MergedModel.load(work.input("merge") / "merged.safetensors")
    single = ConceptWeights.load(work.input("train") / "weights.safetensors")
    models = {
        "base": ({}, {}),
        "single": (single.deltas, single.tokens),
        "merged_full": (full.deltas, full.tokens),
        "merged": (small.deltas, small.tokens),
    }
    prompts = [p for p in params["prompts"] for _ in range(settings["samples"])]
    seeds = [settings["seed"] + i for i in range(len(prompts))]
    plain = [p.format(class_word) for p in prompts]
    tables = []

    def drawn(before: int, done: int) -> None:
        work.progress("images", before + done, len(models) * len(prompts))

    for number, (model, (deltas, tokens)) in enumerate(models.items()):
        named = plain if model == "base" else [p.format(f"{token} {class_word}") for p in prompts]
        with backbone.changed(deltas, tokens):
            images = draw(
                backbone,
                named,
                seeds=seeds,
                steps=settings["steps"],
                guidance=settings["guidance"],
                progress=functools.partial(drawn, number * len(prompts)),
            )
        values = scores(judges, images, plain, references)
        tables.append(pd.DataFrame({"model": model, "prompt": prompts, "seed": seeds, **values}))
        _save_rows(images, params["prompts"], settings["samples"], work.out / f"{model}.png")
    pd.concat(tables).to_parquet(work.out / "scores.parquet")


def _save_rows(images: list[Image.Image], prompts: list[str], samples: int, path: Path) -> None:
    shown = min(samples, 6)
    rows = [images[i * samples : i * samples + shown] for i in range(len(prompts))]
    grid(rows, side=96).save(path)


def measures(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Mean and standard error of each score per model: {"merged": {"image": …, "image_se": …, "samples": …}}."""
    result = {}
    for model, rows in table.groupby("model", sort=False):
        entry: dict[str, float] = {"samples": len(rows)}
        for score in ("text", "image", "identity"):
            if score in rows:
                entry[score] = float(rows[score].mean())
                entry[f"{score}_se"] = float(rows[score].std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else 0.0
        result[str(model)] = entry
    return result


# --- release -------------------------------------------------------------------------------------------


def release(work: Work) -> None:
    """The files of a release, ready to be published: weights in all formats, spec, measures, sample grid, card."""
    params, places = work.stage.params, work.stage.places
    backbone = _backbone(places["base"], torch.float32)
    model = MergedModel.load(work.input("merge") / "merged.safetensors")
    write_formats(model, backbone.pipe, work.out, params["name"])
    evaluated = {
        stage.name: measures(pd.read_parquet(path / "scores.parquet"))
        for stage, path in zip(work.stage.inputs_of("evaluate"), work.inputs["evaluate"], strict=True)
    }
    _stacked([path / "merged.png" for path in work.inputs["evaluate"]]).save(work.out / "samples.png")
    merge_report = json.loads((work.input("merge") / "report.json").read_text())
    for name, content in (("spec", params["spec"]), ("measures", evaluated), ("merge", merge_report)):
        (work.out / f"{name}.json").write_text(json.dumps(content, indent=1))
    cards = [
        CardConcept(
            concept["name"],
            concept["token"],
            concept["class_word"],
            merge_report["compressed"]["residuals"][concept["name"]],
            {f"{score} alignment": evaluated[concept["name"]]["merged"][score] for score in ("text", "image")},
        )
        for concept in model.metadata["concepts"]
    ]
    write_card(
        work.out,
        cards,
        name=params["name"],
        base_model=places["base_name"],
        base_digest=backbone.digest,
        license=params["license"],
        grid="samples.png",
        two_encoders=len(backbone.text_encoders) == 2,
    )


def _stacked(paths: list[Path]) -> Image.Image:
    strips = [Image.open(path) for path in paths]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


FUNCTIONS: dict[str, Callable[[Work], None]] = {
    "index": index,
    "candidates": retrieve,
    "regularization": regularization,
    "features": features,
    "train": train_concepts,
    "merge": merge_concepts,
    "evaluate": evaluate,
    "release": release,
}
