"""What a killed machine leaves: checkpoints in scratch folders, half-built artifacts, stores that lie."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hostile.bases import POINTER
from hostile.case import Case, Check, Seen, accepted, words, write
from hostile.common import finished, planned

NAME = "checkpoint.safetensors"


def prepare() -> None:
    finished()


def _store():
    """The finished store's features in one of its own, nothing trained."""
    from pipeline.store import Store

    shutil.copytree(finished() / "out/store/features", "runs/store/features")
    text = (finished() / "batch.yaml").read_text().replace(f"output: {finished()}/out", "output: runs")
    text = text.replace("steps: 2", "steps: 4").replace("views: 1", "views: 1, checkpoint_every: 2")
    write(**{"runs/batch.yaml": text})
    plan = planned("runs/batch.yaml")
    return plan, Store(plan.batch.store_url)


def checkpoint(name: str, spoil: Callable[[Path], Any]) -> Case:
    """A checkpoint of the first of two trainings of a pack, after half of its steps, then spoilt: both are trained."""

    def give():
        from pipeline.stages.pack import train_pack
        from pipeline.stages.train import Train

        plan, store = _store()
        first, second = plan.of(Train)
        place = store.scratch(first.key) / NAME

        class Killed(Exception):
            pass

        def progress(stage: Any, what: str, done: int, total: int) -> None:
            if done == 3 and place.exists():
                raise Killed

        with contextlib.suppress(Killed):
            train_pack([first], store, progress)
        assert place.exists(), "no checkpoint was made"
        spoil(place)
        return lambda: train_pack([first, second], store, lambda *_: None)

    def trained(seen: Seen) -> bool:
        from training.weights import ConceptWeights

        found = [ConceptWeights.load(p) for p in Path("runs/store/train").glob("*/weights.safetensors")]
        finite = all(t.isfinite().all() for w in found for t in w.deltas.values())
        return seen.result == {} and len(found) == 2 and finite and all(w.metadata["steps"] == 4 for w in found)

    return Case(f"checkpoint: {name}", give, right=trained, changes=("runs",), seconds=60)


def replaced(content: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def rewritten(change: Callable[[dict[str, torch.Tensor], dict[str, str]], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(path)
        change(tensors, metadata)
        path.unlink()
        save_file(tensors, path, metadata)

    return spoil


def _first(tensors: dict[str, torch.Tensor], start: str) -> str:
    return next(name for name in tensors if name.startswith(start))


def _unlinked(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), make(path))


CHECKPOINTS = [
    checkpoint("whole", lambda _: None),
    checkpoint("empty, as after a power cut", replaced(b"")),
    checkpoint("cut off", lambda path: os.truncate(path, path.stat().st_size // 2)),
    checkpoint("zeros of its length", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    checkpoint("text", replaced("hello")),
    checkpoint("a Git LFS pointer", replaced(POINTER)),
    checkpoint("a tensor missing", rewritten(lambda t, _: t.pop(_first(t, "weight.")))),
    checkpoint(
        "the optimizer's state missing",
        rewritten(lambda t, _: [t.pop(k) for k in list(t) if k.startswith("optimizer.")]),
    ),
    checkpoint("a tensor of another shape", rewritten(lambda t, _: t.update({_first(t, "weight."): torch.ones(3)}))),
    checkpoint("NaN", rewritten(lambda t, _: t.update({_first(t, "weight."): t[_first(t, "weight.")] * float("nan")}))),
    checkpoint("no losses", rewritten(lambda _, m: m.pop("losses"))),
    checkpoint("losses that are none", rewritten(lambda _, m: m.update(losses="{"))),
    checkpoint("losses that are words", rewritten(lambda _, m: m.update(losses='["x"]'))),
    checkpoint("losses of more steps than there are", rewritten(lambda _, m: m.update(losses=json.dumps([0.1] * 99)))),
    checkpoint("a folder", _unlinked(Path.mkdir)),
    checkpoint("a link to nothing", _unlinked(lambda path: path.symlink_to("/gone"))),
    checkpoint("half of a new one beside it", lambda path: path.with_name(f".{NAME}.1.part").write_bytes(b"x")),
]


def stored(
    name: str, spoil: Callable[[Path], Any], refused: str | tuple[str, ...] = (), right: Check | None = None
) -> Case:
    """An artifact of a store, spoilt, and whether it counts as done or can be read."""

    def give():
        plan, store = _store()
        stage = next(stage for stage in plan if stage.kind == "features")
        spoil(store.local / stage.kind / stage.key)

        def used() -> Any:
            store.sweep()
            has = store.has(stage.kind, stage.key)
            return has, store.manifest(stage.kind, stage.key) if has else None

        return used

    return Case(f"store: {name}", give, words(refused), right, changes=("runs/store/.building",))


def _building(name: str) -> Callable[[Path], None]:
    return lambda path: write(**{str(path.parents[1] / ".building" / name / "x"): "x"})


STORED = [
    stored(
        "an artifact without its manifest",
        lambda p: (p / "manifest.json").unlink(),
        right=lambda s: s.result[0] is False,
    ),
    stored(
        "a manifest that is empty, as after a power cut",
        lambda p: (p / "manifest.json").write_text(""),
        "manifest.json",
        lambda s: s.result[0] is False,
    ),
    stored(
        "a manifest that is nested",
        lambda p: (p / "manifest.json").write_text("[" * 100_000),
        "manifest.json",
        lambda s: s.result[0] is False,
    ),
    stored("a half-built artifact of an odd name", _building("x"), right=accepted),
    stored(
        "a half-built artifact of a process of 10^30", _building(f"{os.uname().nodename}.{10**30}.x"), right=accepted
    ),
    stored("a half-built artifact of an Arabic process", _building(f"{os.uname().nodename}.٣.x"), right=accepted),
    stored(
        "a file among the half-built",
        lambda p: write(**{str(p.parents[1] / ".building" / "file"): "x"}),
        right=accepted,
    ),
    stored(
        "a loop of links among the half-built",
        lambda p: ((p.parents[1] / ".building").mkdir(), (p.parents[1] / ".building/loop").symlink_to("loop")),
        right=accepted,
    ),
]


class _Yes(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"{}")

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def _says_yes():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Yes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    text = (finished() / "batch.yaml").read_text() + f"store: http://127.0.0.1:{server.server_port}/store\n"
    write(**{"batch.yaml": text})

    def used() -> Any:
        from pipeline.store import Store

        plan = planned()
        return plan.todo(Store(plan.batch.store_url))

    return used


def _bracket():
    def used() -> Any:
        from pipeline.store import Store

        store = Store("memory://bucket/st[1]", cache=Path("runs").absolute())
        with store.create("train", "abc", {}) as folder:
            (folder / "x").write_text("x")
        shutil.rmtree("runs")
        return store.has("train", "abc"), (store.path("train", "abc") / "x").read_text()

    return used


REMOTE = [
    Case("store: a server that answers 200 to all", lambda: _says_yes(), ("store",)),
    Case("store: a bucket's folder in brackets", _bracket, right=lambda s: s.result == (True, "x")),
]

CASES = [*CHECKPOINTS, *STORED, *REMOTE]
