"""A Ray cluster, or one that is started on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import utils as ray_utils

from pipeline.terminal import print
from ray_jobs import holds


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """The cluster this process belongs to, or one started here and stopped afterwards. Raises: OSError when there is
    neither; ValueError in a folder that Ray's workers cannot start from."""
    if holds(Path.cwd(), "ray_jobs"):
        raise ValueError(
            f"{Path.cwd()}: has a module `ray_jobs` of its own, which Ray's workers would import in place of "
            "polyconcept's; start the command in another folder"
        )
    os.environ.setdefault("RAY_DISABLE_USAGE_STATS", "1")
    if ray.is_initialized():
        yield
        return
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster and os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        print(
            "note: RAY_AUTH_MODE=disabled lets other users of this machine run code in this Ray; unset it",
            file=sys.stderr,
        )
    # "local": without it Ray also takes up a cluster that someone once started on this machine
    options: dict[str, Any] = {} if on_cluster else {"address": "local", "include_dashboard": False}
    with contextlib.nullcontext() if on_cluster else _loopback_only():
        try:
            with _own_signals():
                ray.init(logging_level="ERROR", log_to_driver=False, **options)
        except Exception as error:  # of every kind: the machine's limits, a cluster's other version, a wrong token
            place = (
                f"the cluster at {os.environ['RAY_ADDRESS']} could not be joined" if on_cluster else "Ray did not start"
            )
            raise OSError(f"{place}: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray starts without its handlers of SIGTERM, which end the process with exit codes of their own, saying nothing.
    Those in Python are not set; in the place of that of its core, which aborts, the one from before is put again."""
    set_handler, on_term = ray_utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = set_handler
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that is started here listens at the loopback address only: it does so where it makes no clusters, as on
    macOS. The processes that join it have to know, too, also those that its workers start."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    inherited = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if inherited is None:
            del os.environ[name]
        else:
            os.environ[name] = inherited
