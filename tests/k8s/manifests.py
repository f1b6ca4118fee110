"""The manifests as `kubectl apply --kustomize` would send them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())


@functools.cache
def render(folder: str) -> list[dict[str, Any]]:
    """The objects of a folder of k8s/, without those within a ConfigMap."""
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", ROOT / "k8s" / folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def objects(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay, and the RayJob that its CronJob creates."""
    found = list(render(f"overlays/{overlay}"))
    return found + [yaml.safe_load(m["data"]["rayjob.yaml"]) for m in found if "rayjob.yaml" in m.get("data", {})]


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings of an object, itself first."""
    if isinstance(node, dict):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(value)
