"""Prints the table of docs/scaling.md: what 10, 1 000 and 100 000 concepts would take on 8 to 512 GPUs, modelled.

Stable Diffusion 1.4's shapes, the default settings, 512 pixels, 400 million captions; see `pipeline.scaling` for the
model and the assumptions about a cluster. The last line printed is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import shapes
import torch

from pipeline.miniature.world import concept_images
from pipeline.plan import make_plan
from pipeline.scaling import Cluster, duration, predict
from pipeline.spec import ConceptBatch

CAPTIONS = 400_000_000
CONCEPTS = (10, 1_000, 100_000)
NODES = (1, 8, 64)


def main() -> None:
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shapes.stable_diffusion(torch.bfloat16).pipe.save_pretrained(root / "model")
        for i, image in enumerate(concept_images("cat", "streamline-emojis", 5, seed=0)):
            image.save(root / f"{i}.png")
        batch = {
            "name": "scaling",
            "base": str(root / "model"),
            "concepts": [{"name": "cat", "images": str(root), "class_word": "cat"}],
            "retrieval": {"corpus": str(root / "corpus.parquet"), "clip": "ViT-B-32/laion2b_s34b_b79k"},
            "training": {"precision": "bf16", "regularization": "none"},
            "evaluation": {"clip": "ViT-B-32/laion2b_s34b_b79k"},
        }
        plan = make_plan(ConceptBatch.model_validate(batch))
        # planned without a corpus, which is not at hand; predicted with one
        real = plan.batch.model_copy(
            update={"training": plan.batch.training.model_copy(update={"regularization": "real"})}
        )
        plan = dataclasses.replace(plan, batch=real)
        for concepts in CONCEPTS:
            for nodes in NODES:
                cluster = Cluster(nodes=nodes, devices=8, memory_gib=80, tflops=200, network_gbit=100)
                phases, packed = predict(plan, cluster, concepts=concepts, captions=CAPTIONS)
                if not figures:
                    print(f"| concepts | GPUs | {' | '.join(p.kind for p in phases)} | all | TiB moved | longest |")
                    print("| --- " * (len(phases) + 5) + "|")
                total, longest = sum(p.seconds for p in phases), max(phases, key=lambda p: p.seconds)
                print(
                    f"| {concepts:,} | {8 * nodes} | {' | '.join(duration(p.seconds) for p in phases)} "
                    f"| {duration(total)} | {sum(p.gib for p in phases) / 1024:.1f} "
                    f"| {longest.kind}, {100 * longest.seconds / total:.0f} % ({longest.limit}) |"
                )
                figures |= {f"hours_{concepts}_{8 * nodes}": total / 3600, "packed": packed}
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
