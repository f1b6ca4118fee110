"""How many concepts one merged model holds, on the miniature:

    python bench/capacity.py --store capacity                 # 4, 16 and 30 concepts; about 25 minutes on two cores
    python bench/capacity.py --store capacity --counts 16 --drifts 0.1

Trains concepts of art styles that the base never saw (kept in `--store`, so that a second run only merges and draws),
merges the first so many of them by the exact form and with each drift allowed, and judges images of the first four:
cosine of the identity judge with the concept's pictures, and CLIP's with the prompt.

`unseen` is the error of the merged change on prompts that were no constraint, ||(W^ - W_i) c|| / ||(W_i - W_0) c|| over
all layers and the positions from V* to end-of-text: 0, the merged model does what the concept's own does; 1, it does
nothing.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path[0] = str(Path(__file__).parents[1])  # else bench/retrieval.py would hide the package

from pipeline.evaluation.networks import identity_judge, unit  # noqa: E402
from pipeline.merge.constraints import constraint_of, regularization_rows  # noqa: E402
from pipeline.merge.solve import merge  # noqa: E402
from pipeline.miniature import world  # noqa: E402
from pipeline.sampling import draw  # noqa: E402
from pipeline.spec import MINIATURE, Merge  # noqa: E402
from retrieval.clip import load_clip  # noqa: E402
from training.backbone import Backbone, load_backbone  # noqa: E402
from training.features import concept_features, regularization_features  # noqa: E402
from training.loop import train  # noqa: E402
from training.run import Member, TrainingConcept, TrainingSettings  # noqa: E402
from training.weights import ConceptWeights  # noqa: E402

JUDGED = [(cls, "streamline-emojis") for cls in ("bus", "umbrella", "cow", "cat")]
PROMPTS, SAMPLES = ("photo of a {}", "photo of a {} on the beach"), 8
UNSEEN = (
    "photo of a {} on the beach",
    "a {} in the snow",
    "a very small {} at sunset",
    "two dogs beside a {} in the rain",
    "close up photo of a {} in a flower field",
    "a {} and a pizza on the grass",
    "my {} in the night sky",
)
PACK = 10
Sprite = tuple[str, str]


def sprites(count: int) -> list[Sprite]:
    """(class, style) of the concepts: the judged ones, then others in a fixed shuffled order."""
    others = [(c, s) for s in world.HELD_OUT_STYLES for c in world.CLASSES if s in world.styles_of(c, (s,))]
    others = [sprite for sprite in others if sprite not in JUDGED]
    np.random.default_rng(5).shuffle(others)
    return [*JUDGED, *(tuple(map(str, other)) for other in others)][:count]


def pictures(sprite: Sprite) -> list:
    return world.concept_images(*sprite, 5, seed=0)


def member(backbone: Backbone, i: int, sprite: Sprite) -> Member:
    """Concept i: its five pictures as they are, and twelve of its class beside them; 40 steps at 3e-4."""
    cls, _ = sprite
    features = concept_features(
        backbone, pictures(sprite), [f"{i:02d}{k}" * 20 for k in range(5)], views=1, augment=False, seed=0
    )
    rng, prior = np.random.default_rng(i), []
    for _ in range(12):
        styles = world.styles_of(cls)
        style = styles[rng.integers(len(styles))]
        prior.append((world.concept_images(cls, style, 1, int(rng.integers(1e6)))[0], f"photo of {world.article(cls)}"))
    settings = TrainingSettings(
        steps=40,
        batch_size=4,
        learning_rate=3e-4,
        token_learning_rate=3e-4,
        weight_decay=0.0,
        max_grad_norm=1.0,
        prior_weight=1.0,
        prompt="photo of a {}",
        seed=0,
        optimizer="adamw",
        checkpoint_every=10**6,
        sample_every=10**6,
    )
    concept = TrainingConcept(f"c{i}", f"<new{i}>", i, cls, features, regularization_features(backbone, prior, seed=0))
    return Member([concept], settings, Path(tempfile.mkdtemp()))


def trained(backbone: Backbone, concepts: list[Sprite], store: Path) -> list[ConceptWeights]:
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
    return [ConceptWeights.load(file) for file in files]


def phrase(weights: ConceptWeights) -> str:
    (concept,) = weights.metadata["concepts"]
    return f"{concept['token']} {concept['class_word']}"


@torch.no_grad()
def unseen_error(backbone: Backbone, weights: ConceptWeights, deltas: dict[str, torch.Tensor]) -> float:
    """Of one concept in a merged change; see the module."""
    missed = demanded = 0.0
    with backbone.changed({}, weights.tokens):
        for prompt in UNSEEN:
            caption = prompt.format(phrase(weights))
            first = len(backbone.tokenizers[0](prompt.partition("{}")[0]).input_ids) - 1
            rows = backbone.encode_text([caption]).hidden[0, first : backbone.num_tokens(caption) + 1]
            for layer, delta in weights.deltas.items():
                own = rows @ delta.T
                missed += float((rows @ deltas[layer].T - own).square().sum())
                demanded += float(own.square().sum())
    return (missed / demanded) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="where trained concepts are kept")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 16, 30], help="concepts merged (default: 4 16 30)")
    parser.add_argument(
        "--drifts", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3], help="drifts that are allowed"
    )
    arguments = parser.parse_args()
    backbone, judge, clip = load_backbone(MINIATURE / "model"), identity_judge(), load_clip(str(MINIATURE / "clip"))
    concepts = sprites(max(arguments.counts))
    weights = trained(backbone, concepts, arguments.store)
    tokens = {token: rows for each in weights for token, rows in each.tokens.items()}
    constraints = [constraint_of(backbone, each, Merge().prompts)[0] for each in weights]
    rng = np.random.default_rng(0)
    captions = [world.sample_scene(rng).caption for _ in range(Merge().captions)]
    rows = regularization_rows(backbone, captions)
    base = {name: layer.weight.data for name, layer in backbone.layers.items()}

    def judged(deltas_of: Callable[[int], dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means over the judged concepts, drawn with these changes and all tokens."""
        scores = []
        for i, (sprite, own) in enumerate(zip(JUDGED, weights, strict=False)):
            asked = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
            with backbone.changed(deltas_of(i), tokens):
                images = draw(
                    backbone, [p.format(phrase(own)) for p in asked], seeds=range(len(asked)), steps=20, guidance=3.0
                )
            identity = (unit(judge.features(images)) @ unit(judge.features(pictures(sprite))).T).mean()
            text = (clip.encode_images(images) * clip.encode_text([p.format(sprite[0]) for p in asked])).sum(1).mean()
            scores.append((identity, text))
        identity, text = np.mean(scores, 0)
        return {"identity": round(float(identity), 4), "text": round(float(text), 4)}

    alone = judged(lambda i: weights[i].deltas)
    print(f"alone: {alone}", flush=True)
    figures: dict[str, object] = {"alone": alone}
    for count in arguments.counts:
        ways: dict[str, dict] = {"exact": {"form": "hard"}}
        ways |= {f"drift {drift:g}": {"form": "soft", "max_drift": drift} for drift in arguments.drifts}
        for name, way in ways.items():
            try:
                model, told = merge(constraints[:count], rows, base, **way)
            except ValueError as error:
                print(f"{count} concepts, {name}: {error}", flush=True)
                continue
            deltas = {layer: delta.float() for layer, delta in model.deltas.items()}
            found = judged(lambda _, deltas=deltas: deltas) | {
                "drift": round(told.drift, 4),
                "penalty": told.penalty,
                "worst_residual": round(max(told.residuals.values()), 4),
                "unseen": round(float(np.mean([unseen_error(backbone, w, deltas) for w in weights[: len(JUDGED)]])), 3),
            }
            figures[f"{count} {name}"] = found
            print(f"{count} concepts, {name}: {found}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
