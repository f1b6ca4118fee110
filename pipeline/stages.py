"""What each stage does: plain functions from artifacts to an artifact; `run_stage` finds inputs, keeps results.
Training is the exception: `train_pack` makes the artifacts of several stages at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import operator
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.evaluation.alignment import Judges, scores
from pipeline.evaluation.composition import appearance
from pipeline.evaluation.networks import clip_tower, identity_judge
from pipeline.merge.compress import rounded, shared_factors, truncated_factors, weighted_factors
from pipeline.merge.constraints import (
    Constraint,
    constraint_of,
    load_constraints,
    regularization_rows,
    save_constraints,
)
from pipeline.merge.factors import SHARED, MergedModel
from pipeline.merge.files import load_weights
from pipeline.merge.solve import Sums, damped_gram, merge, merge_sums, report
from pipeline.miniature.corpus import serve_corpus, write_corpus
from pipeline.plan import Stage
from pipeline.release.card import CardConcept, write_card
from pipeline.release.formats import write_formats, write_whole
from pipeline.release.manifest import public
from pipeline.sampling import draw, grid
from pipeline.store import Store, file_digest
from retrieval.clip import load_clip
from retrieval.corpus import corpus_rows, precomputed, read_corpus
from retrieval.download import download
from retrieval.images import perceptual_hash
from retrieval.index import build_index, build_index_from_embeddings, read_header, search
from retrieval.regularization import RegularizationSet
from retrieval.select import Search, candidates_by_class
from training.attention import training_dtype, use_attention
from training.backbone import Backbone, load_backbone
from training.checkpoint import load_tensors, save_tensors
from training.features import (
    ConceptFeatures,
    RegularizationFeatures,
    concept_features,
    regularization_features,
)
from training.images import ConceptImages, load_images
from training.loop import train
from training.run import Member, TrainingConcept, TrainingDiverged, TrainingSettings
from training.strategies import Single
from training.weights import ConceptWeights, token_tensors, tokens_from

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


def _planned_images(places: list[str], digests: list[str]) -> ConceptImages:
    """A concept's images, which are to be those that the plan saw: the artifact's key says so.

    Raises: ValueError when they were changed since.
    """
    found = load_images(places)
    if found.digests != digests:
        raise ValueError(f"{', '.join(places)}: the images changed during the run; run again")
    return found


# --- retrieval -----------------------------------------------------------------------------------------


def index(work: Work) -> None:
    corpus = work.stage.places["corpus"]
    if corpus == "miniature":
        rows = int(work.stage.params["corpus"].rsplit("-", 1)[1])
        corpus = str(work.scratch / "corpus.parquet")
        write_corpus(Path(corpus), rows, seed=0)
    clip = load_clip(work.stage.places["clip"])
    if pairs := precomputed(corpus):
        build_index_from_embeddings(pairs, work.out / "index", clip=clip)
    else:
        build_index(read_corpus(corpus), clip.encode_text, work.out / "index", model=clip.digest)
    count_rows(work.out, corpus)


def count_rows(out: Path, corpus: str) -> None:
    """Note in an artifact of the kind `index` how many rows the corpus has, beside those that could be used."""
    counts = {"rows": corpus_rows(corpus), "used": read_header(out / "index")["rows"]}
    (out / "corpus.json").write_text(json.dumps(counts))


def find_candidates(stages: Sequence[Stage], store: Store, search: Search = search) -> None:
    """Make the artifacts of stages of the kind `candidates` over one index: all class prompts are one search."""
    todo = [stage for stage in stages if not store.has(stage.kind, stage.key)]
    if not todo:
        return
    params, (index,) = todo[0].params, todo[0].inputs
    folder = store.path(index.kind, index.key)
    counts = folder / "corpus.json"
    tables = candidates_by_class(
        folder / "index",
        load_clip(todo[0].places["clip"]),
        [stage.params["prompt"] for stage in todo],
        params["count"],
        max_nsfw=params["max_nsfw"],
        blocked_sha256=params["block_list"],
        search=search,
    )
    for stage, table in zip(todo, tables, strict=True):
        with store.create(stage.kind, stage.key, {"name": stage.name, "params": stage.params}) as out:
            pq.write_table(table, out / "candidates.parquet")
            if counts.exists():  # not beside an index of earlier versions
                shutil.copy(counts, out)  # for the report, which does without the index


def regularization(work: Work) -> None:
    params = work.stage.params
    own = [perceptual_hash(image) for image in _planned_images(work.stage.places["images"], params["exclude"]).images]
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
            distributor=work.stage.places["distributor"],
        )
    if not found.got:
        raise ValueError(f"no regularisation image could be had: {found.shortfall}")


def generate(work: Work) -> None:
    """Regularisation images that the base draws with the class prompt (DreamBooth's prior preservation)."""
    params, places = work.stage.params, work.stage.places
    backbone = _backbone(places["base"], torch.float32)
    use_attention(backbone.unet, places["attention"])
    count = params["images"]
    images = draw(
        backbone,
        [params["prompt"]] * count,
        seeds=list(range(count)),
        steps=params["steps"],
        guidance=params["guidance"],
        progress=lambda done: work.progress("images", done, count),
    )
    RegularizationSet.generated(work.out / "set", images, params["prompt"])


def regularization_set(artifact: Path) -> RegularizationSet:
    """The set in an artifact of the stage `regularization` or `generated`."""
    return RegularizationSet.load(artifact / "set")


# --- training ------------------------------------------------------------------------------------------


def features(work: Work) -> None:
    params, backbone = work.stage.params, _backbone(work.stage.places["base"], torch.float32)
    own = _planned_images(work.stage.places["images"], params["images"])
    how = {"seed": params["seed"], "flip": params.get("flip", False)}
    views = {"views": params["views"] or 1, "augment": params["views"] > 0}
    made = concept_features(backbone, own.images, own.digests, **views, **how)
    made.save(work.out / "concept.safetensors")
    for path in [*work.inputs.get("regularization", []), *work.inputs.get("generated", [])]:
        samples = regularization_set(path)
        regularization_features(backbone, samples, **how).save(work.out / "regularization.safetensors")


def train_pack(
    stages: Sequence[Stage],
    store: Store,
    progress: Callable[[Stage, str, int, int], None],
    strategy: Single | None = None,
) -> dict[str, str]:
    """Train the stages as one concept pack over one resident base; those the store has are left out.

    Each artifact is written as its member ends. strategy: how the ranks that call this alike share the work.
    Returns: key -> why, of the stages whose training diverged or whose features cannot be read.
    """
    strategy = strategy or Single()
    todo = [stage for stage in stages if not store.has(stage.kind, stage.key)]
    if not todo:
        return {}
    params, places = todo[0].params, todo[0].places
    backbone = _backbone(places["base"], training_dtype(params["training"]["precision"]))
    use_attention(backbone.unet, places["attention"])
    if places["gradient_checkpointing"]:
        backbone.unet.enable_gradient_checkpointing()
    else:
        backbone.unet.disable_gradient_checkpointing()
    failures: dict[str, str] = {}
    members: list[Member] = []
    stage_of: dict[int, Stage] = {}
    for stage in todo:
        try:
            members.append(_member(stage, store))
        except (ValueError, OSError) as error:  # damaged features are to sink no other member
            if strategy.ranks > 1:  # the others would wait for this one
                raise
            failures[stage.key] = str(error)
            continue
        stage_of[id(members[-1])] = stage
    if not members:
        return failures

    def sample(member: Member, path: Path, step: int) -> None:
        prompts = [member.settings.prompt.format(c.phrase) for c in member.concepts for _ in range(4)]
        with torch.compiler.set_stance("force_eager"):  # of other shapes
            images = draw(backbone, prompts, seeds=list(range(len(prompts))), steps=20, guidance=3.0)
        rows = [images[i : i + 4] for i in range(0, len(images), 4)]
        if strategy.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            grid(rows, labels=[f"{c.name}, step {step}" for c in member.concepts]).save(path)

    def report_step(member: Member, step: int, loss: float) -> None:
        if strategy.rank == 0:
            progress(stage_of[id(member)], "steps", step, member.settings.steps)

    seconds, since, active = 0.0, time.time(), len(members)
    with backbone.compiled() if places["compile"] else contextlib.nullcontext():
        for member, result in train(backbone, members, strategy=strategy, sample=sample, progress=report_step):
            stage = stage_of[id(member)]
            now = time.time()
            seconds += (now - since) / active  # its part of the pack's
            since, active = now, active - 1
            if isinstance(result, TrainingDiverged):
                failures[stage.key] = str(result)
                continue
            if strategy.rank:
                continue  # the first rank writes
            description = {"name": stage.name, "params": stage.params, "seconds": round(seconds, 3)}
            try:
                with store.create(stage.kind, stage.key, description) as out:
                    result.save(out / "weights.safetensors")
                    if (member.scratch / "tensorboard").exists():
                        shutil.copytree(member.scratch / "tensorboard", out / "tensorboard")
                    for path in sorted(member.scratch.glob("samples-*.png")):
                        shutil.copy(path, out)
            except OSError:
                if not store.has(stage.kind, stage.key):  # else another run was first, and removed the scratch folder
                    raise
    return failures


def _member(stage: Stage, store: Store) -> Member:
    """What a stage of the kind `train` says, with the features of its concepts."""
    values = dict(stage.params["training"])
    for key in ("precision", "regularization"):
        values.pop(key)
    settings = TrainingSettings(
        **values, checkpoint_every=stage.places["checkpoint_every"], sample_every=stage.places["sample_every"]
    )
    concepts = []
    for (name, (token, class_word, initializer)), upstream in zip(
        stage.params["concepts"].items(), stage.inputs_of("features"), strict=True
    ):
        folder = store.path(upstream.kind, upstream.key)
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
    return Member(concepts, settings, store.scratch(stage.key))


# --- merge ---------------------------------------------------------------------------------------------


def constraints(work: Work) -> None:
    """All that the merge needs of a training, small beside its weights: `constraints.safetensors`, its tokens."""
    backbone = _backbone(work.stage.places["base"], torch.float32)
    file = work.input("train") / "weights.safetensors"
    weights = ConceptWeights.load(file)
    save_constraints(
        work.out / "constraints.safetensors", constraint_of(backbone, weights, work.stage.params["prompts"])
    )
    save_tensors(work.out / "tokens.safetensors", token_tensors(weights.tokens))
    described = {"concepts": weights.metadata["concepts"], "nbytes": weights.nbytes, "file": file.stat().st_size}
    (work.out / "trained.json").write_text(json.dumps(described))


def add_up(work: Work) -> None:
    Sums.over(_constraints(work)).save(work.out / "sums.safetensors")


def _constraints(work: Work) -> Iterator[Constraint]:
    """Of all inputs, one file in memory at a time."""
    for path in work.inputs["constraints"]:
        yield from load_constraints(path / "constraints.safetensors")


def merge_concepts(work: Work) -> None:
    """`full.safetensors`: the exact factors; `merged.safetensors`: rounded, within the budget; `report.json`.

    Without constraints there is nothing to solve or to factor: see `_keep`.
    """
    if "constraints" not in work.inputs:
        return _keep(work)
    settings, budget = work.stage.params["merge"], work.stage.params["compress"]
    backbone = _backbone(work.stage.places["base"], torch.float32)
    described = [json.loads((path / "trained.json").read_text()) for path in work.inputs["constraints"]]
    concepts = [concept for entry in described for concept in entry["concepts"]]
    tokens: dict[str, list[torch.Tensor]] = {}
    for path in work.inputs["constraints"]:
        file = path / "tokens.safetensors"
        tokens |= tokens_from(load_tensors(file)[0], file)
    captions = _captions(work.inputs.get("regularization", []), settings["captions"], concepts)
    rows = regularization_rows(backbone, captions)
    base = {name: layer.weight.data for name, layer in backbone.layers.items()}
    gram, _ = damped_gram(rows, settings["damping"])
    limits = {key: settings[key] for key in ("damping", "max_drift", "penalty")}
    if "train" in work.inputs:
        # one set of weights (a single concept, or joint training) needs no merge, only compression
        deltas = ConceptWeights.load(work.input("train") / "weights.safetensors").deltas
        full, _ = weighted_factors(deltas, gram)
        solved = report(full, _constraints(work), rows, base)
    elif "sums" in work.inputs:
        sums = functools.reduce(operator.add, (Sums.load(path / "sums.safetensors") for path in work.inputs["sums"]))
        full, solved = merge_sums(sums, _constraints(work), rows, base, **limits)
    else:
        full, solved = merge(list(_constraints(work)), rows, base, form=settings["form"], **limits)
    metadata = {"base": backbone.digest, "concepts": concepts}
    full = dataclasses.replace(full, tokens=tokens, metadata=metadata)
    small, error = full, 0.0
    if SHARED in full.right and (budget["max_rank"] or budget["max_bytes"]):
        # float32 and float16, see `rounded`
        per_rank = 4 * full.right[SHARED].shape[1] + 2 * sum(len(left) for left in full.left.values())
        rank = min(budget["max_rank"] or solved.rows, (budget["max_bytes"] or 2**62) // per_rank)
        if not rank:
            raise ValueError(f"compress.max_bytes {budget['max_bytes']}: one rank costs {per_rank} bytes")
        small, error = shared_factors(full, gram, rank)
    elif SHARED not in full.right and budget["spectrum"]:
        small, error = truncated_factors(full.deltas, gram, budget["spectrum"])
    elif SHARED not in full.right:
        # full-rank factors are larger than the matrices: a single set is always cut, to the paper's fifth by default
        most = budget["max_bytes"] or (None if budget["max_rank"] else described[0]["nbytes"] // 5)
        small, error = weighted_factors(full.deltas, gram, max_rank=budget["max_rank"], max_bytes=most)
    small = rounded(dataclasses.replace(small, tokens=tokens, metadata=metadata))
    final = report(small, _constraints(work), rows, base)
    full.save(work.out / "full.safetensors")
    small.save(work.out / "merged.safetensors")
    summary = {
        "form": solved.form,
        "why": solved.why,
        "rows": solved.rows,
        "regularization_captions": len(captions),
        "condition": solved.condition if math.isfinite(solved.condition) else None,
        "penalty": solved.penalty,
        "drift": solved.drift,
        "residuals": solved.residuals,
        "compressed": {"error": error, "drift": final.drift, "residuals": final.residuals},
        "bytes": {
            "concepts": sum(entry["nbytes"] for entry in described),
            "concept_files": sum(entry["file"] for entry in described),
            "merged_dense": described[0]["nbytes"],
            "merged": (work.out / "merged.safetensors").stat().st_size,
        },
    }
    (work.out / "report.json").write_text(json.dumps(summary, indent=1))


def _keep(work: Work) -> None:
    """`merged.safetensors`: one set of weights as it is, in float16, or the tokens of several; `report.json`."""
    files = [path / "weights.safetensors" for path in work.inputs["train"]]
    trained = [ConceptWeights.load(file) for file in files]
    kept = ConceptWeights(
        {name: delta.half() for name, delta in trained[0].deltas.items()},
        {token: rows for weights in trained for token, rows in weights.tokens.items()},
        {
            "base": trained[0].metadata["base"],
            "method": trained[0].metadata["method"],
            "concepts": [concept for weights in trained for concept in weights.metadata["concepts"]],
        },
    )
    kept.save(work.out / "merged.safetensors")
    summary = {
        "form": "kept",
        "why": "",
        "rows": 0,
        "regularization_captions": 0,
        "condition": None,
        "drift": None,
        "residuals": {},
        "compressed": {"error": 0.0, "drift": None, "residuals": {}},
        "bytes": {
            "concepts": sum(weights.nbytes for weights in trained),
            "concept_files": sum(file.stat().st_size for file in files),
            "merged_dense": max(weights.nbytes for weights in trained),
            "merged": (work.out / "merged.safetensors").stat().st_size,
        },
    }
    (work.out / "report.json").write_text(json.dumps(summary, indent=1))


def _captions(sets: list[Path], limit: int, concepts: list[dict[str, str]]) -> list[str]:
    """Regularisation captions for G, the same share of each concept's; without any, the bare class words."""
    if not sets:
        words = {concept["class_word"] for concept in concepts}
        return [form.format(word) for word in sorted(words) for form in ("{}", "photo of a {}", "a {}")]
    each = [regularization_set(path).captions() for path in sets]
    share = -(-limit // len(each))
    return list(dict.fromkeys(caption for captions in each for caption in captions[:share]))[:limit]


# --- measures ------------------------------------------------------------------------------------------


def evaluate(work: Work) -> None:
    """`scores.parquet`: a row per image that one model drew; `images/`: the images, in that order; `images.png`: some
    of them, a row per prompt."""
    params, places = work.stage.params, work.stage.places
    judges = Judges.load(load_clip(places["clip"]), params["evaluation"]["identity"])
    own = _planned_images(places["images"], params["images"])
    drawn, images = _draw_prompts(work, [params["phrase"]])
    values = scores(judges, images, drawn.pop("plain").tolist(), own.images)
    drawn.assign(**values).to_parquet(work.out / "scores.parquet")


def compose(work: Work) -> None:
    """`appearance.parquet`: a row per image that one model drew of two concepts, `first` and `second` being how much
    each appears; `images/`, `images.png`: as `evaluate`."""
    params, places = work.stage.params, work.stage.places
    judge = identity_judge() if params["evaluation"]["identity"] else clip_tower(load_clip(places["clip"]))
    own = [_planned_images(*each).images for each in zip(places["images"], params["images"], strict=True)]
    drawn, images = _draw_prompts(work, params["phrases"])
    first, second = appearance(judge, images, own)
    drawn.drop(columns="plain").assign(first=first, second=second).to_parquet(work.out / "appearance.parquet")


def _draw_prompts(work: Work, phrases: Sequence[Sequence[str]]) -> tuple[pd.DataFrame, list[Image.Image]]:
    """Draw a stage's prompts with its model, and keep the images. phrases: token and class word of each concept.

    Returns: a row per image with `model`, `prompt`, `seed` and `plain`, the text without tokens; and the images.
    """
    params, places = work.stage.params, work.stage.places
    settings, model = params["evaluation"], params["model"]
    backbone = _backbone(places["base"], torch.float32)
    use_attention(backbone.unet, places["attention"])
    change: ConceptWeights | MergedModel | None = None
    if model == "single":
        change = ConceptWeights.load(work.input("train") / "weights.safetensors")
    elif model != "base":
        file = {"merged_full": "full.safetensors", "merged": "merged.safetensors"}[model]
        change = load_weights(work.input("released" if "released" in work.inputs else "merge") / file)
    # the same prompts and seeds for every model: the differences are the models'
    prompts = [p for p in params["prompts"] for _ in range(settings["samples"])]
    seeds = [settings["seed"] + i for i in range(len(prompts))]
    plain = [p.format(*(class_word for _, class_word in phrases)) for p in prompts]
    named = [p.format(*(" ".join(phrase).strip() for phrase in phrases)) for p in prompts]
    with backbone.changed(*((change.deltas, change.tokens) if change else ({}, {}))):
        images = draw(
            backbone,
            named if change else plain,
            seeds=seeds,
            steps=settings["steps"],
            guidance=settings["guidance"],
            progress=lambda done: work.progress("images", done, len(prompts)),
        )
    (work.out / "images").mkdir()
    for i, image in enumerate(images):
        image.save(work.out / "images" / f"{i:05d}.png")
    _save_rows(images, params["prompts"], settings["samples"], work.out / "images.png")
    return pd.DataFrame({"model": model, "prompt": prompts, "seed": seeds, "plain": plain}), images


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
    model = load_weights(work.input("merge") / "merged.safetensors")
    if isinstance(model, MergedModel):
        write_formats(model, backbone.pipe, work.out, params["name"])
    else:
        write_whole(model, backbone, work.out, params["name"])
    tables: dict[str, list[pd.DataFrame]] = {}
    strips = []
    for stage, path in zip(work.stage.inputs_of("evaluate"), work.inputs["evaluate"], strict=True):
        tables.setdefault(stage.params["concept"], []).append(pd.read_parquet(path / "scores.parquet"))
        if stage.params["model"] == "merged":
            strips.append(path / "images.png")
    evaluated = {concept: measures(pd.concat(parts)) for concept, parts in tables.items()}
    _stacked(strips).save(work.out / "samples.png")
    merge_report = json.loads((work.input("merge") / "report.json").read_text())
    for name, content in (("spec", public(params["spec"])), ("measures", evaluated), ("merge", merge_report)):
        (work.out / f"{name}.json").write_text(json.dumps(content, indent=1))
    cards = [
        CardConcept(
            concept["name"],
            concept["token"],
            concept["class_word"],
            merge_report["compressed"]["residuals"].get(concept["name"]),
            {f"{score} alignment": value for score, value in shown(evaluated[concept["name"]]["merged"]).items()},
        )
        for concept in model.metadata["concepts"]
    ]
    write_card(
        work.out,
        cards,
        name=params["name"],
        base_model=places["base_name"],
        base_digest=backbone.digest,
        **params["license"],
        method=params["spec"]["training"]["method"],
        grid="samples.png",
        two_encoders=len(backbone.text_encoders) == 2,
    )


def shown(entry: dict[str, float]) -> dict[str, float]:
    """Of one model's measures, the scores alone."""
    return {score: entry[score] for score in ("text", "image", "identity") if score in entry}


def released(work: Work) -> None:
    """`merged.safetensors` of a published release, where the store has not what it was made of."""
    place = work.stage.places["release"]
    fs, root = fsspec.core.url_to_fs(f"{place}/merged.safetensors")
    fs.get_file(root, str(work.out / "merged.safetensors"))
    if file_digest(work.out / "merged.safetensors") != work.stage.params["sha256"]:
        raise ValueError(f"{place}: merged.safetensors is not what its manifest says; `polyconcept release verify` it")


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
    "regularization": regularization,
    "generated": generate,
    "features": features,
    "constraints": constraints,
    "sums": add_up,
    "merge": merge_concepts,
    "evaluate": evaluate,
    "compose": compose,
    "release": release,
    "released": released,
}
