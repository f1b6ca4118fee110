"""What each rank does in `test_strategies.py`: `python -m torch.distributed.run … ranks.py cases.pt BASE`.

Each case is (members, strategy, DeepSpeed's arguments); its weights, or why it diverged, go to `<case>.pt` beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from training.backbone import load_backbone
from training.loop import train
from training.strategies import DDP, DeepSpeed, deepspeed_config


def main(file: Path, base: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name, (member, strategy, options) in torch.load(file, weights_only=False).items():
        backbone = load_backbone(base)
        size = member.settings.batch_size // dist.get_world_size()
        config = deepspeed_config(size, member.settings.max_grad_norm, **options) if options else {}
        if options.get("zero") == 3:  # or DeepSpeed would leave all of the tiny base whole
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 4000
        chosen = DDP() if strategy == "ddp" else DeepSpeed(config)
        resident = sum(p.numel() for p in backbone.unet.parameters())
        ((_, result),) = train(backbone, [member], strategy=chosen)
        if strategy == "deepspeed":
            resident = sum(p.numel() for p in backbone.unet.parameters())
        sizes: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(sizes, resident)
        if dist.get_rank() == 0:
            torch.save({"result": result, "resident": sizes}, file.with_name(f"{name}.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
