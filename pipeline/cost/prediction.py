"""What a batch would take on a cluster that is not at hand: a small cost model, stage by stage.

Operations and bytes are counted (`pipeline.cost.model_size`); how fast a cluster does them is what its file says. Kinds
of stages follow one another, since nearly all work of one waits for that of the one before (features for downloads, the
merge for the last training).
"""

from __future__ import annotations

from pipeline.cost.cluster import Cluster, Forecast, Phase
from pipeline.plan import Plan
from pipeline.stages import STAGES
from pipeline.stages.train import Train


def predict(plan: Plan, cluster: Cluster, *, concepts: int, captions: int) -> tuple[list[Phase], int]:
    """The phases of a batch of so many concepts like the plan's, each of a class of its own, over a corpus of so many
    captions; and the sets of weights that a GPU trains at once. Steps and prompts are the mean of the plan's concepts.

    Raises: ValueError when a training has more ranks than there are GPUs.
    """
    training = plan.of(Train)[0]
    forecast = Forecast(cluster, plan.batch, training, training.size(), concepts, captions)
    if training.places.ranks > forecast.gpus:
        ranks = training.places.ranks
        raise ValueError(f"training.ranks: {ranks} ranks need a GPU each, and the cluster has {forecast.gpus}")
    return [phase for kind in STAGES if (phase := kind.phase(forecast))], forecast.packed


def describe(phases: list[Phase], packed: int, cluster: Cluster) -> list[str]:
    """The prediction as a table, with what takes longest and what does not fit a GPU named."""
    lines = [f"{'stage':15} {'time':>10} {'moved, GiB':>12} {'GiB of a GPU':>13}  limited by"]
    for p in phases:
        memory = "" if p.device_gib is None else f"{p.device_gib:.1f}"
        lines.append(f"{p.kind:15} {duration(p.seconds):>10} {p.gib:12,.1f} {memory:>13}  {p.limit}")
    longest = max(phases, key=lambda p: p.seconds)
    total = sum(p.seconds for p in phases)
    lines.append(f"{'all':15} {duration(total):>10} {sum(p.gib for p in phases):12,.1f}")
    lines.append(
        f"packs of up to {packed}; longest: {longest.kind} ({100 * longest.seconds / total:.0f} %, {longest.limit}). "
        "Modelled, not measured."
    )
    for p in phases:
        if p.device_gib and p.device_gib > cluster.memory_gib:
            lines.append(
                f"does not fit: {p.kind} needs {p.device_gib:.1f} GiB of a GPU, which has {cluster.memory_gib:g}"
            )
    return lines


def duration(seconds: float) -> str:
    """Readable: "3.4 h"."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
