"""A study: variants of one batch measured on the same concepts, prompts and seeds, as tables and figures.

A study file has what all share (`batch`, as in a batch file), the seeds, and tables of variants, each a batch with some
settings changed. Every case is planned like any batch, so what a store has is not made again.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.checks import check_pair
from pipeline.evaluation.composition import Composed, composition
from pipeline.evaluation.intervals import Estimate, mean, share
from pipeline.evaluation.kid import kid
from pipeline.evaluation.measures import measures_in
from pipeline.evaluation.networks import clip_tower, unit
from pipeline.evaluation.prompts import TWO_PLACES, check_prompt
from pipeline.evaluation.retention import diversity
from pipeline.failure import StageFailed
from pipeline.limits import Limits
from pipeline.places import located
from pipeline.plan import Plan, make_plan
from pipeline.reading import LONGEST_NAME, shown
from pipeline.runner import Runner
from pipeline.sampling import grid
from pipeline.spec import BatchFile, Place, Section, Seed, batch_from, clip_path, local_folder, read_mapping, validated
from pipeline.stages.compose import Compose
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.features import Features
from pipeline.stages.merge import Merge
from pipeline.stages.regularization import Regularization
from pipeline.stages.stage import Stage
from pipeline.stages.train import Train
from pipeline.store import Store
from retrieval.clip import ClipModel, load_clip
from training.backbone import Backbone, load_backbone
from training.images import list_images
from training.methods import METHODS

HEADS = {
    "kid": "KID × 1000",
    "drift": "class text, change",
    "moongate": "class image, change",
    "diversity": "diversity",
}
"""Measure of more than an image -> head of its column, after those of images; see docs/evaluation.md."""
BASE = "base"
"""Variant that every table has: nothing trained."""


class Variant(Section):
    name: str = Field(min_length=1)
    """Its row in the table."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Of the batch: `{training: {method: dreambooth}}`."""
    together: int | None = Field(None, gt=0, le=1_000_000)
    """How many of the table's concepts, in their order, make a batch; all when empty."""
    beside: int = Field(0, ge=0, le=1_000_000)
    """Further concepts of the study in each batch, which are not measured."""
    line: str = ""
    """Variants of one line are joined in the plot; see `against`."""


class Table(Section):
    name: str = Field(pattern=r"^[a-z0-9-]+$", max_length=LONGEST_NAME)
    """Of its files."""
    title: str = ""
    """Heading above it."""
    model: Literal["single", "merged"] = "single"
    """What is measured: each concept's own weights, or all the concepts' together."""
    concepts: tuple[str, ...] = ()
    """Of the batch's; all when empty."""
    seeds: tuple[Seed, ...] = ()
    """Of the training; the study's when empty."""
    pair_prompts: tuple[str, ...] = ()
    """Prompts with `{0}` and `{1}`: how often both concepts of a batch of two appear in one image."""
    against: Literal["", "concepts", "megabytes", "steps", "seconds"] = ""
    """What the measures are plotted against; text against image alignment when empty."""
    note: str = ""
    """What the table says, in words; stands under it."""
    variants: tuple[Variant, ...] = Field(min_length=1)
    """What is compared, a row each."""

    @field_validator("pair_prompts")
    @classmethod
    def _both_are_named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_prompt(prompt, TWO_PLACES) for prompt in value)

    @model_validator(mode="after")
    def _pairs_are_two(self) -> Table:
        odd = [v.name for v in self.variants if self.pair_prompts and (v.together != 2 or v.beside)]
        if odd or (self.pair_prompts and (self.model == "single" or len(self.concepts) % 2 or not self.concepts)):
            raise ValueError(
                "pair_prompts: need an even number of `concepts`, `model: merged`, and `together: 2` in each variant"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Table:
        names = [BASE, *(variant.name for variant in self.variants)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"variants need names of their own, and {BASE!r} is the base model; found {twice[0]!r} again"
            )
        return self


class Study(Section):
    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME)
    """Stands in `store`."""
    output: Annotated[str, AfterValidator(local_folder)] = "docs/study"
    """Folder of tables and figures, relative to the working directory."""
    store: Place = ""
    """As a batch's; `runs/<name>/store` in the working directory when empty."""
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    """Of the training; the images' seeds are the same for all."""
    batch: dict[str, Any]
    """What all variants share, as in a batch file."""
    tables: tuple[Table, ...] = Field(min_length=1)
    """What is measured, a table each."""

    @model_validator(mode="after")
    def _tables_have_files_of_their_own(self) -> Study:
        names = [name for table in self.tables for name in (table.name, f"{table.name}-samples")]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tables need names of their own, for their files; found {twice[0]!r} again")
        return self


@dataclass(frozen=True)
class Case:
    """A variant with a seed. stages: concept -> `base`, `tuned` (with the concept), `class` (the tuned model asked for
    the bare class) -> its evaluation. pairs: of two concepts in one image, `base` and `tuned`."""

    table: str
    variant: str
    seed: int
    plan: Plan
    stages: dict[str, dict[str, Evaluate]]
    pairs: tuple[dict[str, Compose], ...] = ()


def load_study(path: Path) -> Study:
    """Raises: ValueError naming the file, the key, what was found and what is allowed."""
    written = read_mapping(path, "study file (.yaml)", "tables")
    return validated(Study, written.value, path, written)


def store_of(study: Study, path: Path) -> Store:
    """path: of the study's file."""
    place = located(study.store, path.parent) or "runs/{name}/store"
    return Store(place.replace("{name}", study.name))


def check_output(study: Study, made: Sequence[Case]) -> None:
    """Raises: ValueError when tables and figures would go where images of concepts are read."""
    folder = Path(study.output).expanduser()
    for stage in (stage for case in made for stage in case.plan.of(Features)):
        for image in list_images(list(stage.places.images)):
            if os.path.realpath(image.parent) == os.path.realpath(folder):
                raise ValueError(f"output: {folder} is the folder of {image}, which is read; give another folder")


def cases(study: Study, path: Path) -> Iterator[Case]:
    """Plan all of a study. path: of its file, which relative places are relative to.

    Raises: ValueError naming the table and the variant whose batch is not right.
    """
    for table in study.tables:
        for variant in table.variants:
            for seed in table.seeds or study.seeds:
                try:
                    data = _changed(study.batch, variant.changes)
                    data = _changed(data, {"name": study.name, "training": {"seed": seed}})
                    for group in _groups(data, table, variant):
                        file = BatchFile(path, data | {"concepts": group})
                        yield _case(table, variant.name, seed, make_plan(batch_from(file)))
                except ValueError as error:
                    raise ValueError(f"{path}: table {table.name}, variant {variant.name!r}: {error}") from None


def _changed(base: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Raises: ValueError where a mapping is to change what is none."""
    if not isinstance(base, dict):
        raise ValueError(f"expected a mapping with the keys of {', '.join(changes)}; found {shown(base)}")
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        merged[key] = _changed(merged.get(key) or {}, value) if isinstance(value, dict) else value
    return merged


def _groups(data: dict[str, Any], table: Table, variant: Variant) -> list[list[dict[str, Any]]]:
    """The concepts of each batch: as many together as the variant says; each alone where it has to be.

    New tokens are made of the names: by their place, a concept would be another training in each batch."""
    method = METHODS.get(str(data["training"].get("method", "custom_diffusion")))
    concepts = data.get("concepts")
    if not isinstance(concepts, list) or not all(isinstance(concept, dict) for concept in concepts):
        raise ValueError(f"batch.concepts: expected a list of mappings, found {shown(concepts)}")
    named = {str(concept.get("name")): concept for concept in concepts}
    if method is not None and method.token == "new":
        named = {
            name: concept if concept.get("new_category") else {"token": f"<{name}>"} | concept
            for name, concept in named.items()
        }
    if missing := set(table.concepts) - set(named):
        raise ValueError(f"no concept {min(missing)!r} in the study's batch")
    chosen = [concept for name, concept in named.items() if not table.concepts or name in table.concepts]
    alone = table.model == "single" and method is not None and not method.mergeable
    size = 1 if alone else variant.together or len(chosen)
    others = [concept for concept in named.values() if concept not in chosen]
    if variant.beside > len(others):
        raise ValueError(f"beside: {variant.beside}, but the study's batch has only {len(others)} further concepts")
    return [chosen[i : i + size] + others[: variant.beside] for i in range(0, len(chosen), size)]


def _case(table: Table, variant: str, seed: int, plan: Plan) -> Case:
    stages = {}
    for concept, models in plan.evaluations().items():
        if not table.concepts or concept in table.concepts:
            tuned = models[table.model]
            stages[concept] = {"base": models["base"], "tuned": tuned, "class": tuned.of_bare_class()}
    pairs: tuple[dict[str, Compose], ...] = ()
    if table.pair_prompts:
        try:
            check_pair(plan.batch, plan.batch.concepts, table.pair_prompts)
        except ValueError as error:
            raise ValueError(f"pair_prompts: {error}") from None
        first, second = stages.values()
        pairs = ({m: Compose.of(first[m], second[m], table.pair_prompts) for m in ("base", "tuned")},)
    wanted: list[Stage[Any]] = [stage for each in stages.values() for stage in each.values()]
    wanted += [stage for pair in pairs for stage in pair.values()]
    needed: dict[str, Stage[Any]] = {}

    def need(stage: Stage[Any]) -> None:
        for source in stage.inputs:
            need(source)
        needed[stage.key] = stage

    for stage in wanted:
        need(stage)
    return Case(table.name, variant, seed, Plan(plan.batch, tuple(needed.values()), plan.notes), stages, pairs)


def pairs_of(made: Sequence[Case], store: Store, clip: ClipModel) -> pd.DataFrame:
    """How often two concepts appear in one image: `composition.composition` over all seeds, and `table`. Empty where no
    table has pairs."""
    found: list[pd.DataFrame] = []
    for (table, variant), group in _grouped(made):
        drawn: dict[tuple[str, str], dict[str, list[pd.DataFrame]]] = {}
        words: dict[tuple[str, str], tuple[str, str]] = {}
        for case in group:
            for pair in case.pairs:
                first, second = pair["tuned"].concepts
                one, other = pair["tuned"].phrases
                words[first, second] = one.class_word, other.class_word
                own = drawn.setdefault((first, second), {"base": [], "tuned": []})
                for model, stage in pair.items():
                    own[model].append(stage.result(store).table())
        composed = []
        for names, models in drawn.items():
            tuned, base = pd.concat(models["tuned"]), models["base"][0]  # the base is one, whatever the seed
            both = [tuple(table[place].to_numpy() for place in ("first", "second")) for table in (tuned, base)]
            composed.append(Composed(variant, names, words[names], *both))
        if composed:
            found.append(composition(composed, clip).assign(table=table))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def results(made: Sequence[Case], store: Store, clip: ClipModel) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What was measured, of each table's variants and its base: scores, a row per image (`table`, `variant`, `seed` of
    the training, `concept`, `prompt`, `image_seed`, the scores, `drift`, `moongate`), and summary, a row per table,
    variant and measure (`value`, `low`, `high`, `samples`)."""
    tower = clip_tower(clip)
    real: dict[str, np.ndarray] = {}
    for case in made:
        for stage in case.plan.of(Regularization):
            if stage.name not in real:
                images = [image for image, _ in stage.result(store).load()]
                real[stage.name] = _directions(tower.features(images))
    seen: dict[str, np.ndarray] = {}

    def features(stage: Evaluate) -> np.ndarray:
        """Of its images; tables share evaluations."""
        if stage.key not in seen:
            seen[stage.key] = tower.features(stage.result(store).images())
        return seen[stage.key]

    frames, summaries = [], []
    for (table, variant), group in _grouped([*_bases(made), *made]):
        scores = pd.concat([_scores(case, concept, store) for case in group for concept in case.stages])
        frames.append(scores)
        found: dict[str, Estimate] = {}
        for measure in (*_names(scores), "drift", "moongate"):
            if measure in scores:
                found[measure] = mean(scores[measure].to_numpy())
        distances: list[Estimate] = []
        spreads: list[Estimate] = []
        for concept in dict.fromkeys(concept for case in group for concept in case.stages):
            own = [case.stages[concept] for case in group if concept in case.stages]
            if concept in real:
                drawn = np.concatenate([_directions(features(s["class"])) for s in own])
                distances.append(kid(drawn, real[concept], resamples=100))
            for stages in own:
                prompts = stages["tuned"].result(store).table()["prompt"].tolist()
                if len(prompts) > len(set(prompts)):
                    spreads += diversity(features(stages["tuned"]), prompts).values()
        if distances:
            found["kid"] = _average(distances, 1000.0)
        if spreads:
            found["diversity"] = _average(spreads)
        summaries += [{"table": table, "variant": variant, "measure": m} | asdict(e) for m, e in found.items()]
    return pd.concat(frames, ignore_index=True), pd.DataFrame(summaries)


def _names(columns: Iterable[object]) -> list[str]:
    """Measures of single images among them."""
    return [measure.name for measure in measures_in(columns) if measure.name not in HEADS]


def _head(measure: str) -> str:
    return HEADS.get(measure) or next(m.title for m in measures_in([measure]))


def _bases(made: Sequence[Case]) -> Iterator[Case]:
    """Of each table, the base as one more variant: it is the same for all seeds."""
    for table, cases_of in itertools.groupby(made, lambda case: case.table):
        own = list(cases_of)
        stages = {concept: dict.fromkeys(models, models["base"]) for c in own for concept, models in c.stages.items()}
        yield Case(table, BASE, own[0].seed, own[0].plan, stages)


def _directions(features: np.ndarray) -> np.ndarray:
    """Features (n, d) at length sqrt(d): of CLIP only directions mean something, and so x·y / d is the cosine."""
    return unit(features) * features.shape[1] ** 0.5


def _grouped(made: Sequence[Case]) -> list[tuple[tuple[str, str], list[Case]]]:
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in made:
        groups.setdefault((case.table, case.variant), []).append(case)
    return list(groups.items())


def _scores(case: Case, concept: str, store: Store) -> pd.DataFrame:
    base, tuned, bare = (case.stages[concept][which].result(store).table() for which in ("base", "tuned", "class"))
    place = {"table": case.table, "variant": case.variant, "seed": case.seed, "concept": concept}
    frame = tuned.drop(columns="model").rename(columns={"seed": "image_seed"}).assign(**place)
    return frame.assign(drift=bare["text"] - base["text"], moongate=bare["image"] - base["image"])


def _average(estimates: Sequence[Estimate], scale: float = 1.0) -> Estimate:
    """Mean of independent estimates, with the interval that their intervals give it."""
    value = float(np.mean([e.value for e in estimates]))
    half = float(np.sqrt(np.square([(e.high - e.low) / 2 for e in estimates]).sum()) / len(estimates))
    return Estimate(scale * value, scale * (value - half), scale * (value + half), sum(e.samples for e in estimates))


def weight_changes(made: Sequence[Case], store: Store, backbone: Backbone) -> pd.DataFrame:
    """Where whole UNets trained: the mean over layers of ||W - W_0|| / ||W_0|| by type (figure 2 of the paper).

    Returns: a row per case and type of layer: `table`, `variant`, `seed`, `layers`, `change`, `count`.
    """
    weights = dict(backbone.unet.named_parameters())
    rows = []
    for case in made:
        if METHODS[case.plan.batch.training.method].unet != "all":
            continue
        for stage in case.plan.of(Train):
            deltas = stage.result(store).weights().deltas
            changes: dict[str, list[float]] = {}
            for name, delta in deltas.items():
                plain = name.removeprefix("unet.")
                weight = weights.get(plain, weights.get(f"{plain}.weight"))
                if weight is None or weight.ndim < 2 or not torch.any(weight):
                    continue
                kind = "cross-attention" if ".attn2." in name else "self-attention" if ".attn1." in name else "the rest"
                changes.setdefault(kind, []).append(float(delta.float().norm() / weight.float().norm()))
            place = {"table": case.table, "variant": case.variant, "seed": case.seed}
            rows += [place | {"layers": k, "change": float(np.mean(v)), "count": len(v)} for k, v in changes.items()]
    return pd.DataFrame(rows, columns=["table", "variant", "seed", "layers", "change", "count"])


def write_study(study: Study, made: Sequence[Case], store: Store, backbone: Backbone, folder: Path) -> None:
    """`README.md` with a table and a plot for each of the study's, `scores.parquet`, `summary.parquet`, pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = made[0].plan.batch
    clip = load_clip(clip_path(batch.evaluation.clip, batch.folder))
    scores, summary = results(made, store, clip)
    scores.to_parquet(folder / "scores.parquet")
    summary.to_parquet(folder / "summary.parquet")
    changes = weight_changes(made, store, backbone)
    pairs = pairs_of(made, store, clip)
    if len(pairs):
        pairs.to_parquet(folder / "composition.parquet")
    text = [f"# {study.name}", ""]
    concepts = list(dict.fromkeys(concept for case in made for concept in case.stages))
    seeds = ", ".join(map(str, study.seeds))
    text += [
        f"{len(concepts)} concepts ({', '.join(concepts)}), training seeds {seeds}. Means with 95 % intervals by "
        "bootstrap over images; what each measure is: docs/evaluation.md.",
        "",
    ]
    for table in study.tables:
        own = summary[summary.table == table.name]
        costs = _costs(table, [case for case in made if case.table == table.name], store)
        if table.against:
            _curves(table, own, costs, folder / f"{table.name}.png")
        else:
            _plot(table, own, folder / f"{table.name}.png")
        _samples(table, made, store, folder / f"{table.name}-samples.png")
        text += [f"## {table.title or table.name}", ""]
        if table.seeds:
            text += [f"Training seeds {', '.join(map(str, table.seeds))} only.", ""]
        text += [*_markdown(table, own, costs), ""]
        if table.pair_prompts:
            text += [*_pairs_markdown(pairs[pairs.table == table.name]), ""]
        if table.note:
            text += [table.note.strip(), ""]
        text += [f"![{table.against or 'text against image alignment'}]({table.name}.png)", ""]
        text += [f"![samples: a row per variant]({table.name}-samples.png)", ""]
        if len(moved := changes[changes.table == table.name]):
            text += ["| variant | layers | mean relative change |", "| --- | --- | --- |"]
            for (variant, layers), rows in moved.groupby(["variant", "layers"], sort=False):
                text.append(f"| {variant} | {layers} | {rows.change.mean():.2e} |")
            text.append("")
    (folder / "README.md").write_text("\n".join(text))


def _costs(table: Table, made: Sequence[Case], store: Store) -> pd.DataFrame:
    """By variant, means over its batches: `concepts` in a model, `steps`, `seconds` of training a concept, `megabytes`
    of the file that is measured (the trained weights, or the merged file)."""
    rows = []
    for case in made:
        trained = case.plan.of(Train)
        if table.model == "merged":
            (merged,) = case.plan.of(Merge)
            files = [merged.result(store).file]
        else:
            files = [stage.result(store).file for stage in trained]
        count = sum(len(stage.concepts) for stage in trained)
        rows.append(
            {
                "variant": case.variant,
                "concepts": count if table.model == "merged" else 1,
                "steps": np.mean([stage.training.steps for stage in trained]),
                "seconds": sum(store.manifest(s.kind, s.key)["seconds"] for s in trained) / count,
                "megabytes": np.mean([file.stat().st_size for file in files]) / 1e6,
            }
        )
    return pd.DataFrame(rows).groupby("variant").mean()


def _pairs_markdown(pairs: pd.DataFrame) -> Iterator[str]:
    """Pairs of the most similar class words first, and all together."""
    yield "| | pair | likeness of the words | first appears | second appears | both appear | images |"
    yield "| --- " * 7 + "|"
    for row in pairs.sort_values(["class_similarity", "first"], ascending=False, kind="stable").itertuples():
        cells = [row.method, f"{row.first}, {row.second}", f"{row.class_similarity:.2f}"]
        cells += [f"{row.first_appears:.2f}", f"{row.second_appears:.2f}"]
        cells += [f"{row.both_appear:.2f} ({row.both_appear_low:.2f} – {row.both_appear_high:.2f})", str(row.samples)]
        yield f"| {' | '.join(cells)} |"
    for method, rows in pairs.groupby("method", sort=False):
        count = int(rows.samples.sum())
        both = share(round(float((rows.both_appear * rows.samples).sum())), count)
        cells = [method, "all", "", f"{rows.first_appears.mean():.2f}", f"{rows.second_appears.mean():.2f}"]
        cells += [f"{both.value:.2f} ({both.low:.2f} – {both.high:.2f})", str(count)]
        yield f"| {' | '.join(cells)} |"


def _markdown(table: Table, own: pd.DataFrame, costs: pd.DataFrame) -> Iterator[str]:
    measures = _names(own.measure.unique()) + [measure for measure in HEADS if measure in set(own.measure)]
    yield f"| | {' | '.join(map(_head, measures))} | images | seconds of training a concept | MB |"
    yield "| --- " * (len(measures) + 4) + "|"
    for name in (BASE, *(variant.name for variant in table.variants)):
        rows = own[own.variant == name].set_index("measure")
        cells = []
        for measure in measures:
            if measure in rows.index:
                row = rows.loc[measure]
                cells.append(f"{row.value:.3f} ({row.low:.3f} – {row.high:.3f})")
            else:
                cells.append("")
        cells.append(str(int(rows.loc["text"].samples)))
        cells += ["", ""] if name == BASE else [f"{costs.loc[name].seconds:.0f}", f"{costs.loc[name].megabytes:.3g}"]
        yield f"| {name} | {' | '.join(cells)} |"


def _curves(table: Table, own: pd.DataFrame, costs: pd.DataFrame, path: Path) -> None:
    """Each score against what the table says, a line for each of its lines; the base as a level."""
    across = _names(own.measure.unique())
    figure, axes = plt.subplots(1, len(across), figsize=(4.5 * len(across), 4), squeeze=False)
    lines: dict[str, list[str]] = {}
    for variant in table.variants:
        lines.setdefault(variant.line, []).append(variant.name)
    for axis, score in zip(axes[0], across, strict=True):
        rows = own[own.measure == score].set_index("variant")
        for line, names in lines.items():
            names = sorted(names, key=lambda name: costs.loc[name, table.against])
            values = rows.loc[names]
            spread = [values.value - values.low, values.high - values.value]
            axis.errorbar(costs.loc[names, table.against], values.value, yerr=spread, fmt="o-", label=line or None)
        axis.axhline(rows.loc[BASE].value, color="k", linestyle=":", label=BASE)
        axis.set(xlabel=table.against, ylabel=_head(score))
        axis.set_xscale("log", base=2 if table.against in ("concepts", "steps") else 10)
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _plot(table: Table, own: pd.DataFrame, path: Path) -> None:
    """Text alignment against image alignment (figure 8 of the paper), beside identity where it is measured."""
    across = [score for score in _names(own.measure.unique()) if score != "text"]
    figure, axes = plt.subplots(1, len(across), figsize=(5 * len(across), 4), squeeze=False)
    wide = {measure: rows.set_index("variant") for measure, rows in own.groupby("measure")}
    for axis, score in zip(axes[0], across, strict=True):
        for variant in table.variants:
            x, y = wide[score].loc[variant.name], wide["text"].loc[variant.name]
            axis.errorbar(
                [x.value],
                [y.value],
                xerr=[[x.value - x.low], [x.high - x.value]],
                yerr=[[y.value - y.low], [y.high - y.value]],
                fmt="o",
                label=variant.name,
            )
        axis.plot([wide[score].loc[BASE].value], [wide["text"].loc[BASE].value], "k*", label=BASE)
        axis.set(xlabel=_head(score), ylabel=_head("text"))
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _samples(table: Table, made: Sequence[Case], store: Store, path: Path) -> None:
    """A row per variant: the first image of each prompt, of each concept and the first seed."""
    rows, labels = [], []
    first = next(case.seed for case in made if case.table == table.name)
    for variant in table.variants:
        row: list[Image.Image] = []
        for case in made:
            if (case.table, case.variant, case.seed) == (table.name, variant.name, first):
                for stages in case.stages.values():
                    drawn = stages["tuned"].result(store)
                    images, prompts = drawn.images(), drawn.table()["prompt"]
                    row += [images[i] for i in range(len(images)) if i == 0 or prompts[i] != prompts[i - 1]]
        rows.append(row[:12])
        labels.append(variant.name)
    grid(rows, labels=labels, side=80).save(path)


def run_study(path: Path, runner: Runner) -> Path:
    """Do all that a study file asks for and is not done yet; returns the folder of its tables.

    Raises: ValueError for bad input, before anything runs; StageFailed naming what failed.
    """
    study = load_study(path)
    made = list(cases(study, path))
    check_output(study, made)
    store = store_of(study, path)
    stages = {stage.key: stage for case in made for stage in case.plan}
    if not all(stage.is_in(store) for stage in stages.values()):
        with runner.session():
            if failed := runner.run([case.plan for case in made], store, Limits()):
                raise StageFailed("\n".join(failed))
    folder = Path(study.output).expanduser()
    write_study(study, made, store, load_backbone(made[0].plan.batch.base_path), folder)
    return folder
