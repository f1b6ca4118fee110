"""Strategies: how the processes (ranks) of one training share its steps.

A step's samples are drawn from the seed and the step's number and split among the ranks, so that the weights that come
out are those that one process would have made, and any strategy goes on from any other's checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.backbone import Backbone
from training.pack import Layers
from training.run import Checkpoint, Member, Run, find_checkpoint


class Single:
    """One process; the only strategy that trains packs of more than one member."""

    rank, ranks = 0, 1
    recomputes = True
    """Whether activations may be thrown away and computed again in the backward pass."""

    def start(
        self,
        member: Member,
        backbone: Backbone,
        layers: Layers,
        tokens: Sequence[nn.Parameter],
        span: slice,
    ) -> Run:
        """The member's run, from its checkpoint where there is one; see `Run`."""
        found = self._found(member, backbone, layers, tokens)
        return Run(member, backbone, layers, tokens, span, found, writes=self.rank == 0)

    def _found(
        self, member: Member, backbone: Backbone, layers: Layers, tokens: Sequence[nn.Parameter]
    ) -> Checkpoint | None:
        return find_checkpoint(member, backbone, layers, tokens)

    def wrap(self, objective: nn.Module, runs: Sequence[Run]) -> nn.Module:
        """The objective as it is to be called; once the members' weights are the objective's."""
        return objective

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses of all ranks, averaged."""
        return losses.detach()


class DDP(Single):
    """Each rank holds the whole model; gradients of what trains, and nothing else, are averaged."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def _found(
        self, member: Member, backbone: Backbone, layers: Layers, tokens: Sequence[nn.Parameter]
    ) -> Checkpoint | None:
        # the ranks may be on machines that do not share the scratch folder
        box = [super()._found(member, backbone, layers, tokens) if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wrap(self, objective: nn.Module, runs: Sequence[Run]) -> nn.Module:
        # every rank has read the same base and been given the same checkpoint: there is nothing to broadcast
        return DistributedDataParallel(objective, init_sync=False, forward_sync_buffers=False)

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        total = losses.detach().clone()
        dist.all_reduce(total)
        return total / self.ranks


class DeepSpeed(DDP):
    """ZeRO: the ranks share out the optimizer's state (stage 1), the gradients too (2), the whole model too (3).

    config: DeepSpeed's, whole; see `deepspeed_config`. The backbone is used up: with stage 3 it stays shared out.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        import deepspeed

        super().__init__()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self.config = config
        # recomputing would look at parameters whose shares were put away again (DeepSpeed's hooks are of modules)
        self.recomputes = config.get("zero_optimization", {}).get("stage", 0) < 3

    def start(
        self,
        member: Member,
        backbone: Backbone,
        layers: Layers,
        tokens: Sequence[nn.Parameter],
        span: slice,
    ) -> Run:
        found = self._found(member, backbone, layers, tokens)
        return _ZeroRun(member, backbone, layers, tokens, span, found, writes=self.rank == 0)

    def wrap(self, objective: nn.Module, runs: Sequence[Run]) -> nn.Module:
        import deepspeed

        (run,) = runs
        assert isinstance(run, _ZeroRun)
        optimizer = run.adopt_parameters()
        objective.to(memory_format=torch.contiguous_format)  # DeepSpeed sends parameters as rows of bytes
        self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=self.config)
        run.engine = self.engine
        return self.engine

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)


class _ZeroRun(Run):
    """A run whose weights and optimizer are in the hands of DeepSpeed's engine."""

    engine: Any

    def __init__(
        self,
        member: Member,
        backbone: Backbone,
        layers: Layers,
        tokens: Sequence[nn.Parameter],
        span: slice,
        found: Checkpoint | None,
        *,
        writes: bool,
    ) -> None:
        super().__init__(member, backbone, layers, tokens, span, found, writes=writes)
        self.layers, self.tokens = layers, tokens
        self.state = {k: v for k, v in found[0].items() if k.startswith("optimizer.")} if found else {}

    def adopt_parameters(self) -> torch.optim.Optimizer:
        """The model's own parameters in place of views of them, and an optimizer of theirs."""
        self.matrices = {name: layer.weight for name, layer in self.layers.items()}
        self.rows = list(self.tokens)
        self.trained = [*self.matrices.values(), *self.rows]
        self.optimizer = self.make_optimizer(list(self.matrices.values()), self.rows)
        return self.optimizer

    def take_gradients(self, place: int, layers: Layers, tokens: Sequence[nn.Parameter]) -> None:
        """The engine has them."""

    def update(self, loss: float) -> None:
        self.check(loss, 0.0)
        if self.state:
            self._restore()
            return
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        self.check(loss, norm)
        self.record(loss, norm)

    def _restore(self) -> None:
        """DeepSpeed makes the optimizer's state in its first step; that one is taken with a learning rate of zero,
        then the state is put in place. The step is not counted."""
        from deepspeed.utils import safe_set_full_optimizer_state

        groups = self.engine.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        self.engine.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self._link_states()
        for i, parameter in enumerate(self.trained):
            for name in ("exp_avg", "exp_avg_sq"):
                value = self.state[f"optimizer.{i}.{name}"].to(self.engine.device)
                safe_set_full_optimizer_state(parameter, value.reshape(_shape(parameter)), name)
        for state in self.engine.optimizer.optimizer.state.values():
            state["step"].fill_(float(self.state["optimizer.0.step"]))
        self.state = {}

    def _link_states(self) -> None:
        """DeepSpeed (0.19) notes the places of all groups' states in the first step of stages 1 and 2, after its first
        group has made its own and before the others have."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def values(self) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        matrices = {n: self.layers[n].value_of(safe_get_full_fp32_param(w)) for n, w in self.matrices.items()}
        return matrices, [safe_get_full_fp32_param(rows) for rows in self.rows]

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        tensors = {}
        layers = list(self.layers.values())
        for i, parameter in enumerate(self.trained):
            for name in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(parameter, name)
                tensors[f"optimizer.{i}.{name}"] = layers[i].value_of(value) if i < len(layers) else value
            tensors[f"optimizer.{i}.step"] = torch.tensor(float(self.step))
        return tensors


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where a rank holds a share of it only."""
    return getattr(parameter, "ds_shape", parameter.shape)


def deepspeed_config(batch_size: int, max_grad_norm: float, *, zero: Literal[1, 2, 3], offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for one rank's share of the samples.

    The optimizer is PyTorch's, on the CPU too, so that all strategies make the same weights.
    """
    # DeepSpeed sets its buffer aside whole, by default 2 GB on a GPU: more than what is shared out of K/V
    sharing: dict[str, Any] = {"stage": zero, "reduce_bucket_size": 50_000_000}
    if offload:
        sharing["offload_optimizer"] = {"device": "cpu"}
        if zero == 3:
            sharing["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": sharing,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def complete_deepspeed_config(
    config: Any, where: str, batch_size: int, ranks: int, max_grad_norm: float
) -> dict[str, Any]:
    """A DeepSpeed configuration of the user's own, completed with what the batch says. where: it is from, for messages.
    batch_size: of a step.

    Raises: ValueError when it is none, shares nothing out, or asks for what the batch says otherwise.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected a JSON object")
    config = dict(config)
    for key in ("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast"):
        if key in config:
            raise ValueError(f"{where}: {key!r} is not used: learning rates and precision are `training`'s")
    _check_zero(config.get("zero_optimization"), where, sorted(config))
    own = deepspeed_config(batch_size // ranks, max_grad_norm, zero=1, offload=False)
    del own["zero_optimization"]
    fixed = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    for key, value in {"train_batch_size": batch_size, **{key: own[key] for key in fixed}}.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ValueError(f"{where}: {key!r} is {config[key]!r}; by the batch file it is {value}: leave it out")
        config[key] = value
    return own | config


def _check_zero(zero: Any, where: str, keys: list[str]) -> None:
    """keys: of the configuration it is in."""
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (1, 2, 3):
        found = f"{zero!r}" if zero is not None else f"no such key among {keys}"
        raise ValueError(f"{where}: 'zero_optimization' has to be an object with a 'stage' of 1, 2 or 3; found {found}")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        lines = [f"{where}: zero_optimization.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError("\n".join(lines)) from None
