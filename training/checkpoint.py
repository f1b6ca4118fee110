"""Checkpoints as safetensors: model, optimizer and step, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retrieval.regular import open_regular
from training.durable import replace


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file to a temporary name, then rename it: a reader never sees half a file, nor does one after
    a power failure. Equal tensors and metadata make equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata)
        if metadata and len(metadata) > 1:
            _sort_metadata(part)
        part.chmod(0o644)  # safetensors leaves files that only their owner reads
        replace(part, path)
    except SafetensorError as error:  # it hides the operating system's error, a full disk's too
        raise OSError(errno.EIO, str(error), str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, where they stand: safetensors writes them in a random one."""
    with path.open("r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise RuntimeError(f"{path}: its header is {size} bytes long, {len(text)} in order")
        f.seek(8)
        f.write(text)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises: FileNotFoundError when there is none; ValueError when it is damaged, or something else.
    """
    with _opened(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (a file, not a dict)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_numbers(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """As `load_tensors`, of a file that may be a stranger's.

    Raises: ValueError, too, for tensors of whole or complex numbers, or of fewer bits than float16, and for NaN and
        infinite values.
    """
    tensors, metadata = load_tensors(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name!r} is {_short(tensor.dtype)}; expected {', '.join(map(_short, FLOATS))}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name!r} holds values that are not finite")
    return tensors, metadata


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, whose tensors are not read. Raises: as `load_tensors`."""
    with _opened(path) as f:
        return f.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        open_regular(path).close()
    except (ValueError, IsADirectoryError):
        raise ValueError(f"{path}: not a regular file") from None
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    except OSError as error:  # without the file's name
        raise OSError(errno.EIO, str(error), str(path)) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors, keyed `optimizer.<parameter index>.<name>`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        # bitsandbytes' parameters share their code tables (qmap), which a file may not
        f"optimizer.{i}.{k}": v.clone() if k.startswith("qmap") else torch.as_tensor(v)
        for i, parameter in enumerate(parameters)
        for k, v in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; other keys are ignored.

    Each in the memory format of its parameter, which files do not keep: a fused step reads both in memory's order.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            # bitsandbytes counts its steps in plain numbers
            state.setdefault(int(index), {})[name] = value.item() if value.dtype == torch.int64 else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
