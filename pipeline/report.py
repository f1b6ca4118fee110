"""The run report: the figures of a finished batch (`summary`) and one HTML file that shows them (`write_report`).

The file stands alone: its pictures are in it, it runs no scripts and loads nothing, so it can be mailed or archived.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from pipeline.evaluation.measures import Measure, measures_in
from pipeline.places import masked
from pipeline.plan import Plan
from pipeline.stages.candidates import Candidates
from pipeline.stages.drawn import Model
from pipeline.stages.evaluate import Evaluate, measures
from pipeline.stages.generated import Generated
from pipeline.stages.merge import Merge
from pipeline.stages.pack import Trained
from pipeline.stages.regularization import Regularization
from pipeline.stages.train import Train
from pipeline.store import Store
from retrieval.regularization import RegularizationSet
from training.images import load_images
from training.methods import METHODS

CHART: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters as text: small, and in the reader's own font
    "svg.hashsalt": "polyconcept",
    "font.family": "sans-serif",
    "font.size": 10,
    # greys and hues that are legible on white and on black: a picture cannot know the page's colours
    "text.color": "#767b84",
    "axes.edgecolor": "#767b84",
    "axes.labelcolor": "#767b84",
    "xtick.color": "#767b84",
    "ytick.color": "#767b84",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#767b84",
    "grid.alpha": 0.2,
}
COLOURS: dict[Model, str] = {"base": "#8b9099", "single": "#3b82d6", "merged": "#e07a2f"}


# --- figures -------------------------------------------------------------------------------------------


def summary(plan: Plan, store: Store, release: str) -> dict[str, Any]:
    """The figures of a finished batch, JSON values; what cannot be computed (an error from one image, …) is None.

    Keys: `name`, `release`, `seconds` (kind -> stage -> seconds), `seconds_per_kind`, `seconds_total`, `concepts`
    (name -> token, class_word, measures of each model, the comparisons of `compare`, regularization), `overall` (means
    over the concepts), `left_out` (what retrieval did not use, in sentences), `worst` (the least favourable concept of
    each comparison), `merge`, `unseen` (what the merged model misses of a concept's change on prompts that were no
    constraint), `moved` (other captions), `residuals` and `drift` (before and after compression) and `bytes`.
    """
    (merge,) = plan.of(Merge)
    made = merge.result(store)
    merged = made.report()
    seconds: dict[str, dict[str, float]] = {}
    for stage in plan:
        seconds.setdefault(stage.kind, {})[stage.name] = store.manifest(stage.kind, stage.key)["seconds"]
    sizes = dict(merged["bytes"])
    if made.full_file.exists():
        sizes["merged_factors"] = made.full_file.stat().st_size
    concepts = {name: _figures(stages, plan, store) for name, stages in plan.evaluations().items()}
    figures = {
        "name": plan.batch.name,
        "release": masked(release),
        "seconds": seconds,
        "seconds_per_kind": {kind: round(sum(values.values()), 3) for kind, values in seconds.items()},
        "seconds_total": round(sum(sum(values.values()) for values in seconds.values()), 3),
        "concepts": concepts,
        "left_out": _left_out(plan, store),
        "overall": _overall(concepts),
        "worst": _worst(concepts),
        "merge": {key: merged[key] for key in ("form", "rows", "regularization_captions", "condition")}
        | {"compression_error": merged["compressed"]["error"]},
        "unseen": merged["unseen"],
        "moved": merged["moved"],
        "residuals": {"before": merged["residuals"], "after": merged["compressed"]["residuals"]},
        "drift": {"before": merged["drift"], "after": merged["compressed"]["drift"]},
        "bytes": sizes | {"ratio": sizes["merged"] / sizes["concepts"]},
    }
    return _finite(figures)


def compare(table: pd.DataFrame) -> dict[str, float]:
    """What the models of a concept's scores changed; NaN where it cannot be said.

    All models drew the same prompts from the same seeds, so gains over the base are means of differences image
    by image:

    <measure>_gain_<single|merged>              mean difference to the base, of all measures but text
    <measure>_gain_<single|merged>_se           the same in standard errors of that mean
    text_ratio_<single|merged>                  text alignment as a share of the base's
    """
    result = {}
    for score in (measure.name for measure in measures_in(table)):
        wide = table.pivot(index=["prompt", "seed"], columns="model", values=score)
        means = wide.mean()
        for model in ("single", "merged"):
            if score == "text":
                result[f"text_ratio_{model}"] = _ratio(means[model], means["base"])
            else:
                gain = wide[model] - wide["base"]
                error = gain.std(ddof=1) / np.sqrt(len(gain))
                result[f"{score}_gain_{model}"] = float(gain.mean())
                result[f"{score}_gain_{model}_se"] = _ratio(gain.mean(), error)
    return result


def _figures(stages: dict[Model, Evaluate], plan: Plan, store: Store) -> dict[str, Any]:
    tables = [stage.result(store).table() for stage in stages.values()]
    stage = stages["merged"]
    figures: dict[str, Any] = {**stage.phrase._asdict(), **measures(tables), **compare(pd.concat(tables))}
    regularization = _regularization(stage.concept, plan, store)
    if regularization is not None:
        keys = ("asked", "got", "statuses", "shortfall")
        figures["regularization"] = {key: getattr(regularization, key) for key in keys}
    return figures


def _regularization(concept: str, plan: Plan, store: Store) -> RegularizationSet | None:
    for stage in (*plan.of(Regularization), *plan.of(Generated)):
        if stage.name == concept:
            return stage.result(store).load()
    return None


def _left_out(plan: Plan, store: Store) -> list[str]:
    """What retrieval did not use of the corpus and of the captions and images it found, other than dead links."""
    said: list[str] = []
    why = {
        "nsfw": "have an NSFW score above max_nsfw",
        "unscored": "have no NSFW score, which max_nsfw asks for",
        "blocked": "are on the block list",
    }
    for stage in plan.of(Candidates):
        found = stage.result(store)
        if not said and (counts := found.corpus_rows()):  # of all the same corpus
            rows, used = counts
            if used < rows:
                said.append(
                    f"The corpus: {rows - used} of {rows} rows are left out: they have no url or caption, text that is "
                    "not UTF-8, or a broken embedding."
                )
        dropped = found.left_out()
        said += [
            f"“{stage.name}”: {dropped[reason]} captions are left out: they {words}."
            for reason, words in why.items()
            if reason in dropped
        ]
    for source in plan.of(Regularization):
        if blocked := source.result(store).load().statuses.get("blocked"):
            said.append(f"{source.name}: {blocked} downloaded images are left out: they are on the block list.")
    return said


def _overall(concepts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over concepts: of each model's scores, and of the comparisons."""
    entries = list(concepts.values())
    result: dict[str, Any] = {}
    for key, value in entries[0].items():
        if isinstance(value, float):
            result[key] = float(np.mean([entry[key] for entry in entries]))
        elif isinstance(value, dict) and "samples" in value:
            means = {m.name: float(np.mean([entry[key][m.name] for entry in entries])) for m in measures_in(value)}
            result[key] = means
    return result


def _worst(concepts: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Comparison -> the concept with the lowest value."""
    result = {}
    for key, value in next(iter(concepts.values())).items():
        if not isinstance(value, float):
            continue
        values = {name: entry[key] for name, entry in concepts.items()}
        if any(math.isnan(v) for v in values.values()):
            continue
        name = min(values, key=lambda n: values[n])
        result[key] = {"concept": name, "value": values[name]}
    return result


def _ratio(value: float, by: float) -> float:
    # a spread of 1e-17 is rounding, not a spread
    return float(value / by) if abs(by) > 1e-12 else math.nan


def _finite(value: Any) -> Any:
    """NaN and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the page ------------------------------------------------------------------------------------------


def write_report(plan: Plan, store: Store, release: str, path: Path) -> None:
    """Write the report of a finished batch as one HTML file. The more concepts, the fewer pictures of each."""
    figures = summary(plan, store, release)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": _size, "duration": _duration, "number": _number, "power": _power}
    kept = figures["merge"]["form"] == "kept"
    names = {
        "base": "Base",
        "single": "Joint" if plan.batch.training.composition == "joint" else "Alone",
        "merged": "Released" if kept else "Merged",
    }
    page = environment.get_template("report.html.jinja").render(
        figures=figures,
        concepts=_concepts(plan, store, figures),
        models=names,
        scores={measure.name: _heading(measure) for measure in _measures(figures["concepts"])},
        remarks=_remarks(figures),
        notes=plan.notes,
        base=plan.batch.base,
        method=METHODS[plan.batch.training.method],
        charts=_alignment_charts(figures["concepts"]),
        colours=COLOURS,
        spec=masked(yaml.safe_dump(plan.batch.model_dump(mode="json"), sort_keys=False, allow_unicode=True)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # of names of files that are no UTF-8 the bytes are shown
    part.write_text(page, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def _concepts(plan: Plan, store: Store, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page shows of each concept."""
    evaluations = plan.evaluations()
    count = len(evaluations)
    thumbnails, prompts = max(3, min(12, 150 // count)), max(1, min(8, 40 // count))
    shown: list[dict[str, Any]] = []
    trainings: dict[str, str] = {}
    for name, stages in evaluations.items():
        stage = stages["single"]
        own = load_images(list(stage.places.images)).images
        regularization = _regularization(name, plan, store)
        nearest = itertools.islice(regularization or [], thumbnails)
        (trained,) = stage.inputs_of(Train)
        first = trainings.setdefault(trained.key, name)
        shown.append(
            {
                "name": name,
                "figures": figures["concepts"][name],
                "images": [_thumbnail(image) for image in own[:thumbnails]],
                "image_count": len(own),
                "regularization": [(_thumbnail(image), caption) for image, caption in nearest],
                "trained_as": trained.name,
                # concepts trained together share a curve, shown once
                "training": _training(trained.result(store)) if first == name else None,
                "training_at": first,
                "prompts": _drawn(stages, store)[:prompts],
                "prompt_count": len(stage.prompts),
            }
        )
    return shown


def _training(made: Trained) -> dict[str, Any]:
    """Loss curve and up to six sample grids, the last among them."""
    losses, grids = made.losses(), made.grids()
    chosen = sorted({round(i) for i in np.linspace(0, len(grids) - 1, min(6, len(grids)))})
    return {
        "steps": len(losses),
        "chart": _loss_chart(losses),
        "grids": [(step, _data_uri(Image.open(file))) for step, file in (grids[i] for i in chosen)],
    }


def _drawn(stages: dict[Model, Evaluate], store: Store) -> list[dict[str, Any]]:
    """Per prompt, the row of images that each model drew from the same seeds."""
    prompts = stages["merged"].prompts
    grids = {model: stages[model].result(store).grid().convert("RGB") for model in COLOURS}
    side = grids["base"].height // len(prompts)
    phrase = " ".join(stages["merged"].phrase)
    return [
        {
            "prompt": prompt.replace("{}", phrase),
            "rows": {
                model: _data_uri(grid.crop((0, i * side, grid.width, (i + 1) * side))) for model, grid in grids.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]


def _remarks(figures: dict[str, Any]) -> list[str]:
    """What deserves a look, in words."""
    remarks = []
    for name, entry in figures["concepts"].items():
        gain, ratio = entry["image_gain_merged_se"], entry["text_ratio_merged"]
        if gain is not None and gain < 2:
            remarks.append(
                f"{name}: the merged model’s image alignment is {gain:+.1f} standard errors from the base’s: "
                "the concept was not clearly learnt."
            )
        if ratio is not None and ratio < 0.9:
            remarks.append(
                f"{name}: the merged model keeps {ratio:.0%} of the base’s text alignment: it follows prompts less."
            )
        shortfall = entry.get("regularization", {}).get("shortfall")
        if shortfall:
            remarks.append(f"{name}, regularisation: {shortfall}.")
    remarks += figures["left_out"]
    for name, residual in figures["residuals"]["after"].items():
        if residual > 0.01:
            remarks.append(f"{name}: {residual:.1%} of its change is not met after merging and compression.")
    return remarks


# --- pictures ------------------------------------------------------------------------------------------


def _loss_chart(losses: Sequence[float]) -> str:
    """Loss by step, raw and as a running mean over a tenth of the steps."""
    steps = np.arange(1, len(losses) + 1)
    smooth = pd.Series(losses).rolling(max(1, len(losses) // 10), center=True, min_periods=1).mean()
    with rc_context(CHART):
        figure = Figure(figsize=(4.4, 2.3), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, color=COLOURS["base"], linewidth=0.7, alpha=0.6, label="each step")
        axes.plot(steps, smooth, color=COLOURS["single"], linewidth=2, label="running mean")
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
        axes.legend(frameon=False, loc="upper right", ncols=2, fontsize=9)
        return _svg_uri(figure)


def _alignment_charts(concepts: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Score -> chart of dots with standard errors, a line per concept."""
    return {measure.name: _dots(measure, concepts) for measure in _measures(concepts)}


def _measures(concepts: Mapping[str, dict[str, Any]]) -> list[Measure]:
    """Of what it looks like first, as people ask that first."""
    return sorted(measures_in(next(iter(concepts.values()))["base"]), key=lambda measure: measure.name == "text")


def _heading(measure: Measure) -> str:
    return measure.title[0].upper() + measure.title[1:]


def _dots(measure: Measure, concepts: Mapping[str, dict[str, Any]]) -> str:
    with rc_context(CHART):
        figure = Figure(figsize=(3.6, 0.7 + 0.42 * len(concepts)), layout="constrained")
        axes = figure.subplots()
        for offset, (model, colour) in zip((-0.18, 0, 0.18), COLOURS.items(), strict=True):
            axes.errorbar(
                [entry[model][measure.name] for entry in concepts.values()],
                np.arange(len(concepts)) + offset,
                xerr=[entry[model][f"{measure.name}_se"] for entry in concepts.values()],
                fmt="o",
                markersize=5,
                color=colour,
            )
        axes.set_title(_heading(measure), fontsize=10)
        axes.set_ylim(len(concepts) - 0.5, -0.5)
        # `$` would start a formula
        axes.set_yticks(range(len(concepts)), [name.replace("$", r"\$") for name in concepts])
        return _svg_uri(figure)


def _svg_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _thumbnail(image: Image.Image, side: int = 192) -> str:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _data_uri(small)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "webp", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- words ---------------------------------------------------------------------------------------------


def _size(count: float) -> str:
    """1234567 -> `1.23 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    """3725 -> `1 h 02 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float | None, form: str = ".3f") -> str:
    """Formatted with a real minus; a dash for None."""
    return "–" if value is None else format(value, form).replace("-", "−")


def _power(value: float | None) -> str:
    """4.2e-10 -> `4.2 × 10⁻¹⁰`."""
    if value is None or value == 0 or 0.01 <= abs(value) < 1000:
        return _number(value, ".3g")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
