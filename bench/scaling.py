"""Prints the tables of docs/scaling.md: what 10, 1 000 and 100 000 concepts would take on 8 to 512 GPUs, modelled.

Stable Diffusion 1.4's shapes, the default settings, 512 pixels, 400 million captions; see `pipeline.cost` for the
model and the assumptions about a cluster. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import shapes
import torch

from pipeline.cost.cluster import Cluster
from pipeline.cost.prediction import describe, duration, predict
from pipeline.plan import Plan, training_of
from pipeline.spec import ConceptBatch

CAPTIONS = 400_000_000
CONCEPTS = (10, 1_000, 100_000)
NODES = (1, 8, 64)


def cluster_of(nodes: int) -> Cluster:
    return Cluster(nodes=nodes, devices=8, memory_gib=80, tflops=200, network_gbit=100)


def write_base(folder: Path) -> None:
    """What a prediction reads of Stable Diffusion 1.4: the configurations of its parts, and files of as many numbers,
    of which nothing is written."""
    with torch.device("meta"):
        pipe = shapes.stable_diffusion().pipe
    pipe.save_config(folder)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    for name, write, stem in (
        ("unet", pipe.unet.save_config, "diffusion_pytorch_model"),
        ("vae", pipe.vae.save_config, "diffusion_pytorch_model"),
        ("text_encoder", pipe.text_encoder.config.save_pretrained, "model"),
    ):
        write(folder / name)
        described, end = {}, 0
        for key, tensor in getattr(pipe, name).state_dict().items():
            start, end = end, end + 2 * tensor.numel()
            described[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps(described).encode()
        with (folder / name / f"{stem}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)


def main() -> None:
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder) / "model")
        batch = {
            "name": "scaling",
            "base": f"{folder}/model",
            "concepts": [{"name": "cat", "images": folder, "class_word": "cat"}],
            "retrieval": {"corpus": f"{folder}/corpus.parquet", "clip": "ViT-B-32/laion2b_s34b_b79k"},
            "training": {"precision": "bf16"},
            "evaluation": {"clip": "ViT-B-32/laion2b_s34b_b79k"},
        }
        asked = ConceptBatch.model_validate(batch)
        plan = Plan(asked, (training_of(asked, "base", asked.concepts, ()),))  # a prediction is of the settings
        found = {
            (concepts, nodes): predict(plan, cluster_of(nodes), concepts=concepts, captions=CAPTIONS)
            for concepts in CONCEPTS
            for nodes in NODES
        }
    kinds = [phase.kind for phase in found[CONCEPTS[-1], NODES[-1]][0]]
    print(f"| concepts | GPUs | {' | '.join(kinds)} | all | TiB moved | longest |")
    print("| --- " * (len(kinds) + 5) + "|")
    for (concepts, nodes), (phases, packed) in found.items():
        times = {phase.kind: duration(phase.seconds) for phase in phases}
        total, longest = sum(p.seconds for p in phases), max(phases, key=lambda p: p.seconds)
        print(
            f"| {concepts:,} | {8 * nodes} | {' | '.join(times.get(kind, '') for kind in kinds)} "
            f"| {duration(total)} | {sum(p.gib for p in phases) / 1024:.1f} "
            f"| {longest.kind}, {100 * longest.seconds / total:.0f} % ({longest.limit}) |"
        )
        figures |= {f"hours_{concepts}_{8 * nodes}": total / 3600, "packed": packed}
    print("\n1 000 concepts on 64 GPUs:\n")
    print("\n".join(describe(*found[1_000, 8], cluster_of(8))))
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
