"""How many concepts one merged model holds, on the miniature:

    python bench/capacity.py --store capacity            # 3 to 128 concepts, an hour on two cores
    python bench/capacity.py --store capacity --counts 8 32

Trains concepts of art styles that the base never saw (kept in `--store`, so that a second run only merges and draws):
the twelve of distinct classes that the autoencoder keeps best, then others, then the same in other colours. Merges so
many of them at a time, in each form, and judges images of the twelve.

Prints a line for each merge, and writes `--store`/capacity.png. The last line printed is one JSON object:

    identity_N, text_N    the merged model's identity and text alignment over those of each concept alone
    gain_N                what it keeps of the identity that each concept alone gains over the base, and `gain_N_low`,
                          `gain_N_high`, the 95 % interval over concepts
    unseen_N, padding_N   what it misses of a concept's change on prompts that were no constraint (`missed`)
    moved_N, empty_N      what it moves that speaks of no concept: words of other captions, the empty prompt
    paper_…               the same of equation 4 as published, while it has room
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

sys.path[0] = str(Path(__file__).parents[1])  # else bench/retrieval.py would hide the package

from pipeline.evaluation.networks import identity_judge, unit  # noqa: E402
from pipeline.merge.constraints import (  # noqa: E402
    Constraint,
    constraint_of,
    held_out_rows,
    regularization_rows,
    unseen_of,
)
from pipeline.merge.factors import MergedModel  # noqa: E402
from pipeline.merge.solve import Form, merge, missed, moved  # noqa: E402
from pipeline.miniature import world  # noqa: E402
from pipeline.sampling import draw  # noqa: E402
from pipeline.spec import MINIATURE, Merge  # noqa: E402
from retrieval.clip import load_clip  # noqa: E402
from training.backbone import Backbone, load_backbone  # noqa: E402
from training.features import concept_features  # noqa: E402
from training.loop import train  # noqa: E402
from training.run import Member, TrainingConcept, TrainingSettings  # noqa: E402
from training.weights import ConceptWeights  # noqa: E402

JUDGED, PROMPTS, SAMPLES, PACK = 12, ("photo of a {}", "photo of a {} on the beach", "a {} in the snow"), 4, 8
COLOURS = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
Sprite = tuple[str, str, int]
"""Class, style, and which of `COLOURS`."""


def pictures(sprite: Sprite) -> list[Image.Image]:
    cls, style, colours = sprite
    images = world.concept_images(cls, style, 5, seed=0)
    return [Image.fromarray(np.asarray(image)[..., COLOURS[colours]]) for image in images]


@torch.no_grad()
def sprites(backbone: Backbone, judge) -> list[Sprite]:
    """All there are, the judged ones first: of distinct classes, and of those what the autoencoder returns nearest to
    what it was given, by the identity judge."""
    found = [
        (cls, style, 0) for style in world.HELD_OUT_STYLES for cls in world.CLASSES if world.styles_of(cls, (style,))
    ]
    kept = {}
    for sprite in found:
        own = pictures(sprite)
        pixels = (
            torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in own]).permute(0, 3, 1, 2) / 127.5 - 1
        )
        decoded = backbone.vae(pixels).sample.clamp(-1, 1).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
        again = judge.features([Image.fromarray(image) for image in decoded])
        kept[sprite] = float((unit(again) * unit(judge.features(own))).sum(1).mean())
    first: list[Sprite] = []
    for sprite in sorted(found, key=lambda sprite: -kept[sprite]):
        if len(first) < JUDGED and sprite[0] not in {cls for cls, _, _ in first}:
            first.append(sprite)
    others = [sprite for sprite in found if sprite not in first]
    np.random.default_rng(5).shuffle(others)
    others = [(str(cls), str(style), 0) for cls, style, _ in others]
    return [*first, *others, *((cls, style, k) for k in (1, 2) for cls, style, _ in (*first, *others))]


def member(backbone: Backbone, i: int, sprite: Sprite) -> Member:
    """Concept i: its five pictures as they are, 100 steps at 1e-4, four samples each."""
    features = concept_features(
        backbone, pictures(sprite), [f"{i:03d}{k}" * 16 for k in range(5)], views=1, augment=False, seed=0
    )
    settings = TrainingSettings(
        steps=100,
        batch_size=4,
        learning_rate=1e-4,
        token_learning_rate=3e-4,
        weight_decay=0.0,
        max_grad_norm=1.0,
        prior_weight=1.0,
        prompt="photo of a {}",
        seed=0,
        optimizer="adamw",
        checkpoint_every=10**6,
        sample_every=None,
    )
    concept = TrainingConcept(f"c{i}", f"<new{i}>", i, sprite[0], features, None)
    return Member([concept], settings, Path(tempfile.mkdtemp()))


def trained(backbone: Backbone, concepts: Sequence[Sprite], store: Path) -> list[ConceptWeights]:
    """The weights of all concepts; those that the store lacks are trained, `PACK` at once."""
    store.mkdir(parents=True, exist_ok=True)
    files = [store / f"{i}.safetensors" for i in range(len(concepts))]
    todo = [i for i, file in enumerate(files) if not file.exists()]
    for start in range(0, len(todo), PACK):
        members = [member(backbone, i, concepts[i]) for i in todo[start : start + PACK]]
        for ended, weights in train(backbone, members):
            if not isinstance(weights, ConceptWeights):
                raise weights
            weights.save(store / f"{ended.concepts[0].name[1:]}.safetensors")
        print(f"trained {min(start + PACK, len(todo))} of {len(todo)}", flush=True)
    return [ConceptWeights.load(file) for file in files]


def phrase(weights: ConceptWeights) -> str:
    (concept,) = weights.metadata["concepts"]
    return f"{concept['token']} {concept['class_word']}"


def groups(count: int) -> list[list[int]]:
    """Merges of so many concepts, in which each judged one is once."""
    most = min(count, JUDGED)
    found = []
    for start in range(0, JUDGED, most):
        own = list(range(start, min(start + most, JUDGED)))
        found.append(own + list(range(JUDGED, JUDGED + count - len(own))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="where trained concepts are kept")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 8, 16, 32, 64, 128], help="concepts merged")
    arguments = parser.parse_args()
    backbone, judge, clip = load_backbone(MINIATURE / "model"), identity_judge(), load_clip(str(MINIATURE / "clip"))
    concepts = sprites(backbone, judge)[: max(*arguments.counts, JUDGED)]
    weights = trained(backbone, concepts, arguments.store)
    tokens = {token: rows for each in weights for token, rows in each.tokens.items()}
    base = {name: layer.weight.data for name, layer in backbone.layers.items()}
    rng = np.random.default_rng(0)
    captions = [world.sample_scene(rng).caption for _ in range(Merge().captions)]
    unseen, held_out = [unseen_of(backbone, each)[0] for each in weights[:JUDGED]], held_out_rows(backbone)
    own = [unit(judge.features(pictures(sprite))) for sprite in concepts[:JUDGED]]

    def judged(i: int, deltas: dict[str, torch.Tensor], what: str) -> tuple[float, float]:
        """Identity and text alignment of one concept's images."""
        asked = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
        with backbone.changed(deltas, tokens):
            images = draw(backbone, [p.format(what) for p in asked], seeds=range(len(asked)), steps=15, guidance=3.0)
        identity = (unit(judge.features(images)) @ own[i].T).mean()
        said = clip.encode_text([p.format(concepts[i][0]) for p in asked])
        return float(identity), float((clip.encode_images(images) * said).sum(1).mean())

    untaught = np.array([judged(i, {}, concepts[i][0]) for i in range(JUDGED)])
    alone = np.array([judged(i, weights[i].deltas, phrase(weights[i])) for i in range(JUDGED)])
    print(f"base: {untaught.mean(0).round(3)}, alone: {alone.mean(0).round(3)} (identity, text)", flush=True)
    figures = {"identity_base": untaught[:, 0].mean(), "identity_alone": alone[:, 0].mean()}
    figures |= {"text_base": untaught[:, 1].mean(), "text_alone": alone[:, 1].mean()}

    forms: dict[Form, str] = {"soft": "", "paper": "paper_"}
    for form, prefix in forms.items():
        exact = form == "paper"
        constraints: list[Constraint] = [constraint_of(backbone, each, exact=exact)[0] for each in weights]
        rows = regularization_rows(backbone, captions, exact=exact)
        for count in arguments.counts:
            scores, told = np.zeros((JUDGED, 2)), []
            try:
                for group in groups(count):
                    model, _ = merge([constraints[i] for i in group], rows, base, form=form)
                    mine = [i for i in group if i < JUDGED]
                    for i in mine:
                        scores[i] = judged(i, model.deltas, phrase(weights[i]))
                    told.append(_functions(model, [unseen[i] for i in mine], held_out, base))
            except ValueError as error:
                print(f"{count} concepts, {form}: {error}", flush=True)
                continue
            found = _compared(scores, alone, untaught) | {k: float(np.mean([t[k] for t in told])) for k in told[0]}
            figures |= {
                f"{prefix}{key}_{count}" if "@" not in key else prefix + key.replace("@", str(count)): v
                for key, v in found.items()
            }
            print(f"{count} concepts, {form}: { {k: round(v, 3) for k, v in found.items()} }", flush=True)
    _plot(figures, arguments.counts, arguments.store / "capacity.png")
    print(json.dumps({key: round(float(value), 4) for key, value in figures.items()}))


def _functions(
    model: MergedModel,
    unseen: Sequence[tuple[Constraint, Constraint]],
    held_out: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
) -> dict[str, float]:
    words, padding = (np.mean([missed(model, parts[k]) for parts in unseen]) for k in (0, 1))
    return {
        "unseen": float(words),
        "padding": float(padding),
        "moved": moved(model, held_out["words"], base),
        "empty": moved(model, held_out["empty"], base),
    }


def _compared(merged: np.ndarray, alone: np.ndarray, untaught: np.ndarray) -> dict[str, float]:
    """Of (concepts, [identity, text]) each."""
    gained, could = merged[:, 0] - untaught[:, 0], alone[:, 0] - untaught[:, 0]
    picks = np.random.default_rng(0).integers(len(gained), size=(2000, len(gained)))
    low, high = np.percentile(gained[picks].sum(1) / could[picks].sum(1), [2.5, 97.5])
    return {
        "identity": merged[:, 0].mean() / alone[:, 0].mean(),
        "text": merged[:, 1].mean() / alone[:, 1].mean(),
        "gain": gained.sum() / could.sum(),
        "gain_@_low": low,
        "gain_@_high": high,
    }


def _plot(figures: dict[str, float], counts: Sequence[int], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, key, title in zip(
        axes, ("gain", "text"), ("gain in identity kept", "text alignment, of alone"), strict=True
    ):
        for prefix, label in (("", "soft"), ("paper_", "paper's form")):
            made = [count for count in counts if f"{prefix}{key}_{count}" in figures]
            values = [figures[f"{prefix}{key}_{count}"] for count in made]
            axis.plot(made, values, marker="o", label=label)
            if key == "gain":
                low, high = ([figures[f"{prefix}gain_{count}_{end}"] for count in made] for end in ("low", "high"))
                axis.fill_between(made, low, high, alpha=0.2)
        axis.axhline(1, color="grey", linewidth=0.7)
        axis.set(xscale="log", xlabel="concepts in one model", title=title, ylim=(-0.2, 1.2))
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
