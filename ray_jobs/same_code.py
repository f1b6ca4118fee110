"""Whether all nodes of a cluster run the same code and packages. A stage's key says what was asked for, not what made
it: a node with other code would put something else under the same key."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch")


class OtherCode(ValueError):
    """A node runs something else than the driver; the message says which, and how they differ."""


def code_here() -> dict[str, str]:
    """What this process would run: a hash of the project's modules, and the versions of what decides about results.
    What a version says of the machine, as in 2.9.0+cpu, is left out; `commit` and `host` are for people."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("pipeline", "ray_jobs", "retrieval", "training"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}
    commit = os.environ.get("GIT_COMMIT", "")
    return {"code": digest.hexdigest()[:12], **versions, "commit": commit, "host": platform.node()}


class SameCode:
    """Asks each node once, also those that come later."""

    def __init__(self, driver: dict[str, str]) -> None:
        self.driver = driver
        self.asked: dict[str, Any] = {}

    def check(self, seconds: float = 0) -> None:
        """Raises: OtherCode when one of the nodes that have answered within so many seconds differs from the driver."""
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] not in self.asked:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(code_here).options(num_cpus=0, scheduling_strategy=there, name="which code")
                self.asked[node["NodeID"]] = task.remote()
        waiting = [ref for ref in self.asked.values() if ref is not None]
        done = set(ray.wait(waiting, num_returns=len(waiting), timeout=seconds)[0] if waiting else ())
        for node_id, ref in self.asked.items():
            if ref in done:
                self.asked[node_id] = None
                self._compare(ref)

    def _compare(self, ref: Any) -> None:
        try:
            found = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # it has no such function, or not these packages
            found = {"host": "a node", "code": f"of another version ({error.cause or error})"}
        except ray.exceptions.RayError:  # the node has gone again
            return
        differing = [key for key in self.driver if key not in ("commit", "host") and self.driver[key] != found.get(key)]
        if differing:
            raise OtherCode(
                f"{found['host']} runs another image or other code than this driver on {self.driver['host']}: "
                f"{_shown(self.driver, differing)} here, {_shown(found, differing)} there. Give all nodes of the "
                "cluster the same; on Kubernetes pods keep the image they were started with until they are deleted"
            )


def _shown(code: dict[str, str], keys: Iterable[str]) -> str:
    shown = [f"{key} {code[key]}" for key in keys if key in code]
    return ", ".join([*shown, f"commit {code['commit']}"] if code.get("commit") else shown)
