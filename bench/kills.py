"""Kills a small batch and a small retraining again and again, at random moments, and starts them again until they end:
what comes out is to be what an undisturbed run makes, bit by bit, with nothing left over and nothing done twice.

    python bench/kills.py                             # an hour: about 100 kills on two idle cores
    python bench/kills.py --minutes 5 --kills 3       # whichever comes first
    python bench/kills.py --seed 7                    # other moments; the same seed draws the same ones

1. Crash points. The store, checkpoints, publishing, leases and the end of both jobs run in a forked process that dies
   right before one of its file operations (open to write, rename, remove, mkdir, fsync): every one in turn. Once more
   with the files that were not synced emptied, as a power failure may leave them; and at writes that end in the middle
   of a file. After each: is all that looks whole whole? Then the same again, to its end, and compare.
2. Kills. The batch starts from an empty store, the retraining from one release; a moment is a time or the n-th file
   operation of any of the job's processes. Killed are all processes at once, the driver, a worker, or a process of
   Ray's (SIGKILL), or the driver is asked to end (SIGTERM, SIGINT). Every fourth start is a fresh Python; the others
   are forked off this process, which has imported everything: that is most of a start.

Compared are all files but TensorBoard's logs, and of manifests and figures all but dates and seconds. Prints a line a
kill. The last line printed is one JSON object:

    kills, crash_points   how many
    differing             files that are not those of the undisturbed run, or look whole and are not
    leftovers             files, processes and folders for temporary files that the undisturbed run does not leave
    tracebacks            runs that printed one
    exits                 runs that ended with another exit code than docs promise, or not at all
    repeated              artifacts and checkpoints that were made a second time
    minutes               taken
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTROL = "KILLS_CONTROL"
"""Environment variable of all processes of a run: the folder by which they and this process talk."""
RECORD = 256
"""Bytes of a line in the log of file operations: a line's place says its number."""
WAIT = 60.0
"""Seconds that processes are given to end by themselves."""

Snapshot = dict[str, Any]

# --- watching file operations --------------------------------------------------------------------------


def changes_of(event: str, args: tuple[Any, ...]) -> str | None:
    """The path that an audit event is about to change; None when it changes none, or by another process's names."""
    if event == "open":
        path, _, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    elif event == "os.rename":
        path, writes = args[1], True
    else:
        path, writes = args[0] if args else None, event in ("os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
    if not writes or not isinstance(path, str | bytes | os.PathLike):
        return None
    with contextlib.suppress(FileNotFoundError):  # this process stands in a folder that was removed
        return os.path.abspath(os.fsdecode(path))
    return None


def watch() -> None:
    """Log this process's changes below the run's folder, and wait at the one that the folder `CONTROL` names."""
    control = os.environ.get(CONTROL)
    if not control:
        return
    place = (Path(control) / "place").read_text()
    log = os.open(f"{control}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event != "open" and not event.startswith(("os.", "shutil.")):
            return
        path = changes_of(event, args)
        if not path or not path.startswith(place):
            return
        line = f"{os.getpid()} {event} {path[len(place) + 1 :]}"[: RECORD - 1].ljust(RECORD - 1) + "\n"
        os.write(log, line.encode(errors="replace")[:RECORD].ljust(RECORD, b" "))
        number = os.lseek(log, 0, os.SEEK_CUR) // RECORD
        with contextlib.suppress(OSError, ValueError), open(f"{control}/at") as file:
            if int(file.read()) != number:
                return
            Path(control, "reached").touch()
            until = time.monotonic() + WAIT
            while os.path.exists(f"{control}/reached") and time.monotonic() < until:
                time.sleep(0.002)

    sys.addaudithook(hook)


# --- what a run made -----------------------------------------------------------------------------------


def snapshot(folder: Path) -> Snapshot:
    """Relative path -> what is to be the same in every run; of a folder without anything in it, None."""
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "tensorboard/" in name:
            continue
        if path.is_dir():
            if not any(path.iterdir()) and path.name not in (".building", ".scratch"):
                found[f"{name}/"] = None
        elif path.parent.name in (".lease", ".publish") and path.name[:-5].isdecimal():  # numbered on and on
            found[f"{path.parent.relative_to(folder)}/lease {sum('/lease ' in n for n in found)}"] = None
        else:
            found[name] = content(path)
    return found


def content(path: Path) -> Any:
    """Of a file, without times."""
    data = path.read_bytes()
    if path.name == "manifest.json.sig":  # of a manifest with a date; `damaged` looks whether it is one
        return "signature"
    if path.name == "report.html":  # its pictures; its charts have random names in them, and it says seconds
        text = data.decode(errors="replace")
        return [hashlib.sha256(uri.encode()).hexdigest() for uri in re.findall(r"data:image/webp[^\"]*", text)] + [
            text.rstrip().endswith("</html>")
        ]
    if path.name in ("manifest.json", "summary.json", "latest.json"):
        try:
            values = json.loads(data)
            seconds = {"seconds", "seconds_per_kind", "seconds_total", "created", "sum", "time", "signature"}
            values = {key: value for key, value in values.items() if key not in seconds}
            if "files" in values:
                values["files"] = {k: v for k, v in values["files"].items() if not k.startswith("tensorboard/")}
            return values
        except ValueError:
            pass
    return hashlib.sha256(data).hexdigest()


def damaged(folder: Path, key: str = "") -> list[str]:
    """What looks whole below a run's folder and is not: artifacts, releases, `latest`, checkpoints. key: PEM file that
    what is signed is signed with."""
    from pipeline.release.publish import verify
    from training.checkpoint import load_tensors

    problems = []
    for manifest in folder.rglob("manifest.json"):
        inside, name = manifest.parent, manifest.relative_to(folder).parent
        if any(part.startswith(".") for part in name.parts):
            continue
        if "releases" in name.parts:
            problems += [
                f"{name}: {problem}"
                for problem in verify(str(inside), key if (inside / "manifest.json.sig").exists() else "")
            ]
            continue
        try:
            files = json.loads(manifest.read_bytes())["files"]
        except (ValueError, KeyError) as error:
            problems.append(f"{name}/manifest.json: {error!r}")
            continue
        for file, digest in files.items():
            if not (inside / file).is_file() or hashlib.sha256((inside / file).read_bytes()).hexdigest() != digest:
                problems.append(f"{name}/{file}: not what the manifest says")
    for latest in folder.rglob("latest.json"):
        try:
            version = json.loads(latest.read_bytes())["version"]
            if not (latest.parent / version / "manifest.json").exists():
                problems.append(f"{latest.relative_to(folder)}: names {version}, which is not there")
        except (ValueError, KeyError) as error:
            problems.append(f"{latest.relative_to(folder)}: {error!r}")
    for checkpoint in folder.rglob("checkpoint*.safetensors"):
        try:
            load_tensors(checkpoint)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            problems.append(f"{checkpoint.relative_to(folder)}: {error}")
    return problems


@dataclass
class Tally:
    """What was found; see the module."""

    kills: int = 0
    crash_points: int = 0
    differing: int = 0
    leftovers: int = 0
    tracebacks: int = 0
    exits: int = 0
    repeated: int = 0
    said: collections.Counter[str] = field(default_factory=collections.Counter)

    def found(self, what: str, where: str, message: str) -> None:
        """Count one; it is printed, but of those alike (but for numbers) the first three only."""
        setattr(self, what, getattr(self, what) + 1)
        alike = f"{what}: {re.sub(r'[0-9a-f]{8,}|[0-9]+', '#', message)}"
        self.said[alike] += 1
        if self.said[alike] <= 3:
            print(f"  {what}: {where}: {message}", flush=True)

    def compare(self, where: str, made: Snapshot, expected: Snapshot) -> None:
        for name in sorted(expected.keys() | made.keys()):
            if name not in expected:
                self.found("leftovers", where, name)
            elif name not in made:
                self.found("differing", where, f"{name}: missing")
            elif made[name] != expected[name]:
                a, b = made[name], expected[name]
                both = isinstance(a, dict) and isinstance(b, dict)
                keys = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)) if both else ["content"]
                self.found("differing", where, f"{name}: another {', '.join(keys)}")


# --- crash points --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: its signal or exit code as `subprocess` says it, its last words, the file operations
    it did, and the inodes it synced."""

    code: int
    words: str
    operations: int
    synced: frozenset[int]


def in_child(act: Callable[[], None], folder: Path, *, die_at: int = 0, most_bytes: int | None = None) -> Ended:
    """Run a function in a forked process, which dies right before its file operation number `die_at` below the folder,
    or at the write that makes a file larger than `most_bytes`."""
    (said, say), (counted, count) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(say, 1), os.dup2(say, 2)
        for descriptor in (said, counted, say):
            os.close(descriptor)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = 0
        try:
            _count_operations(str(folder), die_at, count)
            if most_bytes is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            act()
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    os.close(say), os.close(count)
    with os.fdopen(said, "rb") as words, os.fdopen(counted, "rb") as numbers:
        text = words.read().decode(errors="replace")  # few: they fit the pipe of the numbers meanwhile
        lines = numbers.read().split()
    _, status = os.waitpid(pid, 0)
    synced = frozenset(int(line) for line in lines if line != b"o")
    return Ended(os.waitstatus_to_exitcode(status), text, lines.count(b"o"), synced)


def _count_operations(folder: str, die_at: int, out: int) -> None:
    """Tell `out` of each file operation of this process below the folder, and die right before one."""
    operations = 0

    def count() -> None:
        nonlocal operations
        operations += 1
        if operations == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(out, b"o\n")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        path = changes_of(event, args) if event == "open" or event.startswith(("os.", "shutil.")) else None
        # within rmtree names are relative to a descriptor
        if path and (path.startswith(folder) or event in ("os.remove", "os.rmdir")):
            count()

    real = os.fsync

    def fsync(descriptor: Any) -> None:
        count()
        real(descriptor)
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        os.write(out, f"{os.fstat(number).st_ino}\n".encode())

    os.fsync = fsync
    sys.addaudithook(hook)


def _files(folder: Path) -> dict[Path, os.stat_result]:
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: info for path, info in found.items() if stat.S_ISREG(info.st_mode)}


@dataclass(frozen=True)
class Act:
    """Something that is to be done whole or not at all, and can be done again.

    prepare: fills a folder; do: acts in it, to be killed; again: does it after a crash (the same, when None).
    """

    name: str
    prepare: Callable[[Path], None]
    do: Callable[[Path], None]
    again: Callable[[Path], None] | None = None
    is_bucket: bool = False
    """Its objects are written whole or not at all; a version that is not whole keeps its number."""
    clean: Callable[[Path], None] = lambda _: None
    """What people do about leftovers after a day."""
    key: str = ""
    """As of `damaged`."""


def _a_day_later(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (0, time.time() - 2 * 86_400))


def _remove_old(folder: Path) -> None:
    """What people do about a job's leftovers."""
    from pipeline.release.versions import gc

    _a_day_later(folder)
    if any((folder / "out/releases").glob("v*")):
        gc(str(folder / "out/releases"))


def _ranked(made: Snapshot) -> Snapshot:
    """With versions numbered without gaps."""
    numbers = sorted({match[0] for name in made if (match := re.search(r"\bv\d{4}\b", name))})
    text = json.dumps(made)
    for rank, number in enumerate(numbers, 1):
        text = text.replace(number, f"v{rank:04d}")
    return {name: value for name, value in json.loads(text).items() if not name.endswith("latest.json")}


def crash_everywhere(act: Act, folder: Path, tally: Tally, rng: random.Random, until: float) -> None:
    """Let an act die at each of its file operations, and at writes; in an order by chance, as far as time allows."""

    def prepared() -> dict[tuple[int, int, int], Path]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made = in_child(lambda: act.prepare(folder), folder)
        if made.code:
            raise RuntimeError(f"{act.name}: not prepared: {made.words}")
        return {(info.st_ino, info.st_mtime_ns, info.st_size): path for path, info in _files(folder).items()}

    before = prepared()
    whole = in_child(lambda: act.do(folder), folder)
    if whole.code:
        raise RuntimeError(f"{act.name}: {whole.words}")
    in_child(lambda: act.clean(folder), folder)
    expected = snapshot(folder)
    sizes = {
        info.st_size for info in _files(folder).values() if (info.st_ino, info.st_mtime_ns, info.st_size) not in before
    }
    points = [("operation", i) for i in range(1, whole.operations + 1)]
    if not act.is_bucket:
        points += [("power", i) for i in range(2, whole.operations + 1)] + [("power", 0)]
        points += [("bytes", size) for size in sorted({at for s in sizes for at in (0, s // 2, s - 1) if at >= 0})]
    rng.shuffle(points)
    done = 0
    for kind, at in points:
        if time.monotonic() > until:
            break
        before = prepared()
        limits = {"most_bytes": at} if kind == "bytes" else {"die_at": at}
        ended = in_child(lambda: act.do(folder), folder, **limits)
        where = f"{act.name}, {kind} {at}"
        if ended.code not in (0, -signal.SIGKILL, -signal.SIGXFSZ):
            tally.found("tracebacks", where, ended.words.strip().splitlines()[-1] if ended.words.strip() else "?")
        done += 1
        if kind == "power":
            for path, info in _files(folder).items():
                if (info.st_ino, info.st_mtime_ns, info.st_size) not in before and info.st_ino not in ended.synced:
                    os.truncate(path, 0)
        for problem in damaged(folder, act.key):
            if kind != "power" or "checkpoint" not in problem:  # those are read with care
                tally.found("differing", where, problem)
        again = in_child(lambda: (act.again or act.do)(folder), folder)
        if again.code:
            tally.found("tracebacks", f"{where}, again", again.words.strip().splitlines()[-1])
            continue
        _a_day_later(folder)
        in_child(lambda: act.clean(folder), folder)
        made = snapshot(folder)
        if act.is_bucket:
            made, expected = _ranked(made), _ranked(expected)
        tally.compare(where, made, expected)
    tally.crash_points += done
    print(f"{act.name}: {done} of {len(points)} crash points", flush=True)


def _write_release(folder: Path, text: str) -> Path:
    (folder / "comfyui").mkdir(parents=True)
    (folder / "README.md").write_text(text)
    (folder / "comfyui" / "weights.safetensors").write_bytes(b"weights" * 3000)
    return folder


def small_acts(work: Path) -> Iterator[Act]:
    """Of the store, of publishing, of leases."""
    import fsspec
    import torch
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    from pipeline.release import lease, publish, versions
    from pipeline.store import Store
    from training.checkpoint import load_tensors, save_tensors

    class Bucket(DirFileSystem):
        """A folder that is not known for one."""

        protocol = "s3"  # a storage that places may name; nothing is sent anywhere

        def __init__(self, **options: Any) -> None:
            super().__init__(path=str(work / "crash"), fs=LocalFileSystem(auto_mkdir=True), **options)

        def _join(self, path: Any) -> Any:
            whole = super()._join(path)
            return f"{whole}/" if isinstance(path, str) and path.endswith("/") else whole  # copies what is in it

    fsspec.register_implementation("s3", Bucket, clobber=True)
    key = work / "key.pem"
    in_child(lambda: _write_key(key), work)

    def local(name: str) -> str:
        return str(work / "crash" / name)

    def remote(name: str) -> str:
        return f"s3://{name}"

    for place in (local, remote):
        is_bucket = place is remote
        of = "a bucket" if is_bucket else "a folder"

        def build(folder: Path, place: Any = place) -> None:
            store = Store(place("store"), cache=folder / "cache")
            store.sweep()
            for name in ("first", "second"):
                if store.has("train", name):
                    continue
                with store.create("train", name, {"params": {"name": name}}) as out:
                    checkpoint = store.scratch(name) / "checkpoint.safetensors"
                    for step in range(2):
                        save_tensors(checkpoint, {"x": torch.full((500,), step)}, {"step": str(step)})
                    save_tensors(out / "weights.safetensors", load_tensors(checkpoint)[0])
                    (out / "images").mkdir()
                    (out / "images" / "0.png").write_bytes(b"image" * 100)
            store.path("train", "second")

        yield Act(f"store in {of}", lambda _: None, build, is_bucket=is_bucket)

        def fetch(folder: Path, place: Any = place) -> None:
            store = Store(place("store"), cache=folder / "other")
            store.sweep()
            store.path("train", "second")

        if is_bucket:
            yield Act(f"store in {of}, fetched", build, fetch)

        def first(folder: Path, place: Any = place) -> None:
            publish.publish(_write_release(folder / "one", "one"), place("releases"), {"batch": "x"}, str(key))
            _write_release(folder / "two", "two")

        def second(folder: Path, place: Any = place) -> None:
            publish.publish(folder / "two", place("releases"), {"batch": "x"}, str(key))

        def clean(folder: Path, place: Any = place) -> None:
            if (folder / "releases").exists():
                versions.gc(place("releases"), 9)

        signed = {"is_bucket": is_bucket, "clean": clean, "key": str(key)}

        yield Act(f"publishing to {of}", first, second, **signed)

        def empty(folder: Path) -> None:
            _write_release(folder / "two", "two")

        yield Act(f"publishing to {of}, the first", empty, second, **signed)

        def unsigned(folder: Path, place: Any = place) -> None:
            empty(folder)
            publish.publish(folder / "two", place("releases"), {"batch": "x"})

        yield Act(f"signing in {of}", unsigned, second, **signed)

        def both(folder: Path, place: Any = place) -> None:
            first(folder, place)
            second(folder, place)

        def back(folder: Path, place: Any = place) -> None:
            versions.promote(f"{place('releases')}/v0001")

        yield Act(f"promoting in {of}", both, back, **signed)

        def keep(folder: Path, place: Any = place) -> None:
            publish.keep_candidate(folder / "two", place("releases"), "candidate", {"batch": "x"}, str(key))

        yield Act(f"keeping a candidate in {of}", first, keep, **signed)

        def kept(folder: Path, place: Any = place) -> None:
            first(folder, place)
            keep(folder, place)

        def promote(folder: Path, place: Any = place) -> None:
            versions.promote(f"{place('releases')}/candidates/candidate", signing_key=str(key))

        yield Act(f"promoting a candidate in {of}", kept, promote, **signed)

        def remove(folder: Path, place: Any = place) -> None:
            versions.gc(place("releases"), 1)

        yield Act(f"removing from {of}", both, remove, **signed)

        def hold(folder: Path, place: Any = place) -> None:
            with lease.lease(place("releases"), 0.4, wait=5) as held:
                held.renew()
                held.check()

        yield Act(f"lease in {of}", hold, hold, is_bucket=is_bucket)


def _write_key(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(encoding, form, serialization.NoEncryption()))


def large_acts(batch: Job, retraining: Job, place: Path) -> Iterator[Act]:
    """The training of a pack, and the ends of both jobs: from the finished store to the report."""
    from pipeline.batch import run
    from pipeline.plan import make_plan
    from pipeline.retraining import retrain
    from pipeline.spec import load_batch, load_retraining
    from pipeline.stages.pack import member_of
    from pipeline.stages.resident import resident_base
    from pipeline.stages.train import Train
    from pipeline.store import Store
    from ray_jobs.runner import OnRay
    from training.loop import train

    def prepare(job: Job, *patterns: str) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            shutil.copytree(job.made, folder, dirs_exist_ok=True)
            for pattern in patterns:
                for path in [*folder.glob(pattern)]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

        return fill

    shutil.copytree(batch.made, place, dirs_exist_ok=True)
    plan = make_plan(load_batch(place / "batch.yaml"))
    trainings = plan.of(Train)
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        backbone = resident_base(trainings[0].places.base)

    def teach(folder: Path) -> None:
        store = Store(str(folder / "out/store"))
        members = [member_of(stage, store) for stage in trainings]
        of = {id(member): stage.name for member, stage in zip(members, trainings, strict=True)}
        shutil.rmtree(folder / "weights", ignore_errors=True)
        (folder / "weights").mkdir()
        for member, result in train(backbone, members):
            result.save(folder / "weights" / f"{of[id(member)]}.safetensors")
        shutil.rmtree(store.local / ".scratch")

    yield Act("training a pack", prepare(batch, "out/store/train", "out/releases"), teach)

    def finish(folder: Path) -> None:
        run(load_batch(folder / "batch.yaml"), OnRay())

    report = ("out/report.html", "out/summary.json")
    yield Act("end of the batch", prepare(batch, "out/releases", *report), finish, clean=_remove_old)

    def bring_up_to_date(folder: Path) -> None:
        asked = load_retraining(folder / "retrain.yaml").model_copy(update={"lease": 0.5})
        retrain(asked, OnRay(), wait=10)

    first_night = ("out/releases/v0002", "out/releases/latest.json", *report)
    prepare_night = prepare(retraining, *first_night)

    def after_first_night(folder: Path) -> None:
        prepare_night(folder)
        (folder / "out/releases/latest.json").write_text('{\n "version": "v0001"\n}\n')

    yield Act("end of the retraining", after_first_night, bring_up_to_date, clean=_remove_old)


def crash_points(work: Path, place: Path, jobs: tuple[Job, Job], tally: Tally, seconds: float, seed: int) -> None:
    """Let all acts die everywhere. In a process of its own, as the model is loaded: runs are forked off one that has
    computed nothing."""
    answer = work / "answer.json"
    pid = os.fork()
    if pid:
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("the crash points ended by themselves")
        for name, value in json.loads(answer.read_text()).items():
            setattr(tally, name, collections.Counter(value) if name == "said" else value)
        return
    code = 1
    try:
        shutil.rmtree(place)
        place.mkdir()
        acts = [(act, work / "crash") for act in small_acts(work)] + [(act, place) for act in large_acts(*jobs, place)]
        until = time.monotonic() + seconds
        for number, (act, folder) in enumerate(acts):
            share = (until - time.monotonic()) / (len(acts) - number)
            crash_everywhere(act, folder, tally, random.Random(f"{seed} {number}"), time.monotonic() + share)
        answer.write_text(json.dumps(vars(tally)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


# --- kills ---------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A batch or retraining: how it starts, in a folder that is prepared; and what an undisturbed run made there."""

    name: str
    command: list[str]
    start: Path
    made: Path
    expected: Snapshot = field(default_factory=dict)
    seconds: float = 0.0
    operations: int = 0
    checkpoints: collections.Counter[str] = field(default_factory=collections.Counter)


def write_jobs(work: Path, place: Path) -> tuple[Job, Job]:
    """Two jobs that run in the folder `place`: keys and cards have it in them."""
    import yaml

    examples = ROOT / "examples/miniature"
    small = {
        "output": str(place / "out"),
        "training": {"steps": 4, "batch_size": 1, "views": 2, "learning_rate": 1e-4, "checkpoint_every": 1},
        "publish": {"made_by": "kills"},
    }
    batch = work / "batch"
    for name in ("bus", "cow"):
        for number in (1, 2):
            (batch / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(examples / name / f"{number}.png", batch / name)
    concepts = [{"name": name, "images": str(place / name), "class_word": name} for name in ("bus", "cow")]
    retrieval = {"images": 2, "oversample": 2, "miniature_captions": 100}
    evaluation = {"samples": 1, "steps": 1}
    spec = small | {"name": "batch", "concepts": concepts, "retrieval": retrieval, "evaluation": evaluation}
    (batch / "batch.yaml").write_text(yaml.safe_dump(spec))
    night = work / "retraining"
    for name in ("bus", "cow"):
        shutil.copytree(batch / name, night / "catalogue" / name)
    # the second night has another concept
    (night / "catalogue/bus/concept.yaml").write_text("class_word: bus\n")
    spec = small | {"name": "retraining", "catalogue": str(place / "catalogue"), "lease": 5}
    spec["training"] = small["training"] | {"regularization": "none"}
    spec |= {"evaluation": {"samples": 2, "steps": 1}, "gate": {"image": 2, "text": 2, "retention": 2}}
    (night / "retrain.yaml").write_text(yaml.safe_dump(spec))
    return (
        Job("batch", ["ray_jobs.concept_batch", "batch.yaml"], batch, work / "batch-made"),
        Job("retraining", ["ray_jobs.retrain", "retrain.yaml", "--wait", "2"], night, work / "retraining-made"),
    )


class Run:
    """One start of a job, until it ends or is killed."""

    def __init__(self, job: Job, place: Path, control: Path, *, fresh: bool) -> None:
        self.control, self.began = control, time.monotonic()
        self.output = control / "output"
        names = {CONTROL: str(control), "TMPDIR": str(control / "tmp"), "RAY_TMPDIR": str(control / "ray")}
        (control / "at").write_text("0")
        (control / "reached").unlink(missing_ok=True)
        for folder in ("tmp", "ray"):
            (control / folder).mkdir(exist_ok=True)
        names["PYTHONPATH"] = f"{control}:{ROOT}"
        self.code: int | None = None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        os.chdir(place)
        os.environ |= names
        tempfile.tempdir = None
        out = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", *job.command])
        os._exit(_as_command(job))

    def poll(self) -> int | None:
        """Exit code or signal, as `subprocess` says it; None while it runs."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def wait(self, seconds: float) -> int | None:
        until = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return code

    def operations(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.control / "log").read_text(errors="replace").splitlines()
        return []

    def processes(self) -> dict[int, str]:
        """All of it that live: number -> command line."""
        marker, found = f"{CONTROL}={self.control}".encode(), {}
        for entry in os.scandir("/proc"):
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError, IndexError):
                pid, folder = int(entry.name), Path(entry.path)
                own = (
                    self.code is None and os.getsid(pid) == self.pid
                )  # once it was reaped, its number may be another's
                state = (folder / "stat").read_text().rsplit(")")[-1].split()[0]
                if state != "Z" and (own or marker in (folder / "environ").read_bytes().split(b"\0")):
                    found[pid] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def end(self) -> None:
        """Kill all that live."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.poll()

    def stage(self) -> str:
        """What its workers are at, or else its last file operation."""
        titles = [title for title in self.processes().values() if title.startswith("ray::")]
        tasks = [title[5:] for title in titles if not re.match(r"ray::(IDLE|Board|\w+Agent$)", title)]
        last = self.operations()[-1:]
        what = "; ".join(sorted(tasks)) or ("between stages" if titles else "no Ray")
        return f"{what}, last {' '.join(last[0].split()[1:]) if last else 'nothing'}"


def _as_command(job: Job) -> int:
    """What `python -m` does, in a process that has imported everything."""
    from ray_jobs.cli import main

    module, *arguments = job.command
    sys.argv = [module, *arguments]
    code = 0
    try:
        watch()
        main([{"ray_jobs.concept_batch": "run", "ray_jobs.retrain": "retrain"}[module], *arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    return code


KINDS = {"all": 6, "driver": 4, "worker": 4, "SIGTERM": 3, "SIGINT": 3, "ray": 1}
"""What is killed -> how often, relative to the others."""
ENDED_BY = {"SIGTERM": (0, 143, -signal.SIGTERM), "SIGINT": (0, 130)}
"""Exit codes of a driver that was asked to end (0: it was done)."""


class Campaign:
    """Runs both jobs again and again in one folder, killing them."""

    def __init__(self, work: Path, place: Path, tally: Tally, rng: random.Random) -> None:
        self.work, self.place, self.tally, self.rng = work, place, tally, rng
        self.control = work / "c"
        self.starts = 0
        self.last: Run | None = None

    def fresh(self, job: Job) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.rmtree(self.control, ignore_errors=True)
        shutil.copytree(job.start, self.place)
        self.control.mkdir()
        (self.control / "place").write_text(str(self.place))
        loader = f"""import sys, types
module = sys.modules["kills"] = types.ModuleType("kills")
module.__file__ = {__file__!r}
exec(compile(open(module.__file__).read(), module.__file__, "exec"), module.__dict__)
module.watch()
"""
        (self.control / "sitecustomize.py").write_text(loader)

    def undisturbed(self, job: Job) -> None:
        """Run a job whole and keep what it made."""
        self.last = run = Run(job, self.place, self.control, fresh=False)
        code = run.wait(900)
        if code:
            raise RuntimeError(f"{job.name}, undisturbed, ended with {code}:\n{run.output.read_text()}")
        job.seconds, job.operations = time.monotonic() - run.began, len(run.operations())
        job.checkpoints = _checkpoints(run.operations())
        self.gone(run, "undisturbed")
        job.expected = self.state()
        shutil.copytree(self.place, job.made, dirs_exist_ok=True)
        print(f"{job.name}: {job.seconds:.0f} s undisturbed, {job.operations} file operations", flush=True)

    def state(self) -> Snapshot:
        """What the job made, and what lies in the folder for temporary files."""
        temporary = {re.sub(r"tmp[a-z0-9_]{8}", "*", path.name) for path in (self.control / "tmp").iterdir()}
        return snapshot(self.place) | {f"temporary: {name}": None for name in temporary}

    def chain(self, job: Job, until: float, most: int) -> None:
        """From the start to an undisturbed end, with kills between."""
        self.fresh(job)
        stamps: dict[Path, tuple[int, int]] = {}
        killed, code, failed = 0, None, 0
        while code != 0 and failed < 3:
            self.starts += 1
            calm = killed >= 8 or self.tally.kills >= most or time.monotonic() > until
            self.last = run = Run(job, self.place, self.control, fresh=self.starts % 4 == 0)
            before = killed
            code, killed = self.life(job, run, killed, calm, most)
            text = run.output.read_text(errors="replace")
            if re.search(r"^Traceback \(most recent|^\*\*\* SIG|Fatal Python error|core dumped", text, re.MULTILINE):
                lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
                self.tally.found("tracebacks", f"{job.name} {self.tally.kills}", lines[-1][:200])
                self.keep(run, "traceback")
            if killed == before and code != 0:
                failed += 1
                self.tally.found("exits", f"{job.name} {self.tally.kills}", f"started again: {code}: {text[-200:]!r}")
                self.keep(run, "exit")
            for path in self.place.glob("out/store/*/*/manifest.json"):
                info = path.stat()
                now = (info.st_ino, info.st_mtime_ns)
                if stamps.setdefault(path, now) != now:
                    self.tally.found("repeated", f"{job.name} {self.tally.kills}", str(path.relative_to(self.place)))
                    stamps[path] = now
            for problem in damaged(self.place) if not run.processes() else ():
                self.tally.found("differing", f"{job.name} {self.tally.kills}", problem)
        where = f"{job.name} {self.tally.kills}"
        self.gone(run, where)
        for key, count in _checkpoints(run.operations()).items():
            # one may have been announced before the kill and not written
            if count > job.checkpoints[key] + killed:
                self.tally.found("repeated", where, f"{count} checkpoints of {key}, of {job.checkpoints[key]}")
        if code == 0:
            _remove_old(self.place)
            self.tally.compare(where, self.state(), job.expected)
        print(f"{job.name}: ended with {code} after {killed} kills", flush=True)

    def keep(self, run: Run, what: str) -> None:
        """Keep a run's output to be looked at."""
        kept = self.work / "outputs"
        kept.mkdir(exist_ok=True)
        shutil.copy(run.output, kept / f"{self.tally.kills}-{what}.txt")

    def life(self, job: Job, run: Run, killed: int, calm: bool, most: int) -> tuple[int | None, int]:
        """Let a run live until it ends or is killed; returns its exit code and how many were killed until now."""
        workers = 0
        while not calm and self.tally.kills < most:
            kind = self.rng.choices([*KINDS], [*KINDS.values()])[0]
            at = self.moment(job, run)
            if at is None:
                break
            pids = run.processes()
            victims = [p for p, title in pids.items() if title.startswith("ray::") or "retrieval.fetch" in title]
            if kind == "worker" and (not victims or workers >= 2):
                kind = "driver"
            if kind == "ray":
                victims = [p for p, title in pids.items() if re.search(r"/(gcs_server|raylet)\b", title.split(" ")[0])]
                kind = kind if victims else "all"
            victim = self.rng.choice(victims) if kind in ("worker", "ray") else run.pid
            what = Path(pids[victim].split(" --")[0]).name if kind in ("worker", "ray") else ""
            stage = run.stage()
            self.tally.kills += 1
            killed += 1
            if kind == "all":
                run.end()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, getattr(signal, kind, signal.SIGKILL))
            (run.control / "reached").unlink(missing_ok=True)
            lived = f"{time.monotonic() - run.began:.1f} s"
            line = f"kill {self.tally.kills}: {job.name}, {kind} {what} at {at}, {lived}, {stage}"
            if kind == "worker":
                workers += 1
                print(line, flush=True)
                continue
            code = run.wait(WAIT)
            print(f"{line}: {code}", flush=True)
            if code is None:
                self.tally.found("exits", line, f"still there after {WAIT:.0f} s")
                self.keep(run, "hangs")
                run.end()
                return -signal.SIGKILL, killed
            expected = ENDED_BY.get(kind, (0, 2) if kind == "ray" else (0, -signal.SIGKILL))
            if code not in expected:
                self.tally.found("exits", f"kill {self.tally.kills}", f"{kind}: ended with {code}")
                self.keep(run, f"{kind}-{code}")
            return code, killed
        code = run.wait(900)
        if code is None:
            self.tally.found("exits", job.name, "does not end")
            self.keep(run, "hangs")
            run.end()
        elif code and workers:
            self.tally.found("exits", f"kill {self.tally.kills}", f"a worker was killed: ended with {code}")
            self.keep(run, f"worker-{code}")
        return code, killed

    def moment(self, job: Job, run: Run) -> str | None:
        """Wait for a moment by chance in what is to be done yet; None when the run ends before."""
        made = len([*self.place.glob("out/store/*/*/manifest.json")])
        whole = sum(name.startswith("out/store/") and name.endswith("manifest.json") for name in job.expected)
        left = max(0.15, 1 - made / whole)
        until, at = float("inf"), ""
        if self.rng.random() < 0.4:
            seconds = self.rng.uniform(0, job.seconds * max(0.5, left))
            until, at = time.monotonic() + seconds, f"{seconds:.1f} s"
        else:
            number = len(run.operations()) + self.rng.randint(1, max(2, round(job.operations * left)))
            (run.control / "at").write_text(str(number))
            at = f"operation {number}"
        while run.poll() is None:
            if time.monotonic() >= until or (run.control / "reached").exists():
                return at
            time.sleep(0.005)
        return None

    def gone(self, run: Run, where: str) -> None:
        """Wait for the processes of all runs to end; those that do not are counted, and ended."""
        until = time.monotonic() + WAIT
        while (left := run.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        for title in left.values():
            self.tally.found("leftovers", where, f"process {title[:80]}")
        run.end()


def _checkpoints(operations: list[str]) -> collections.Counter[str]:
    """Training -> how many checkpoints it wrote."""
    found = [re.search(r" os\.rename out/store/\.scratch/(\w+)/checkpoint\.safetensors", line) for line in operations]
    return collections.Counter(match[1] for match in found if match)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="time given (default: 60)")
    parser.add_argument(
        "--kills", type=int, default=10**6, help="stop after so many (default: when time is up); 0: crash points"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    end = began + 60 * arguments.minutes
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_DISABLE_USAGE_STATS": "1"}
    os.environ |= {"RAY_worker_niceness": "0"}  # Ray's workers stand back behind everything else by default
    os.environ |= {"GIT_COMMIT": "kills"}  # manifests have it, and somebody may work here meanwhile
    os.environ.pop("RAY_ADDRESS", None)
    sys.path[0] = str(ROOT)  # this folder has modules of the packages' names
    import ray_jobs.runner  # noqa: F401 (what runs are forked with)

    work = Path(tempfile.mkdtemp(prefix="k-"))  # short: the names of Ray's sockets have room for 107 letters
    place, tally, rng = work / "run", Tally(), random.Random(arguments.seed)
    campaign = Campaign(work, place, tally, rng)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        batch, retraining = write_jobs(work, place)
        campaign.fresh(batch)
        campaign.undisturbed(batch)
        campaign.fresh(retraining)
        campaign.undisturbed(retraining)  # the first night
        shutil.rmtree(retraining.start)
        shutil.copytree(place, retraining.start)
        shutil.rmtree(retraining.made)
        (retraining.start / "catalogue/cow/concept.yaml").write_text("class_word: cow\n")
        campaign.fresh(retraining)
        campaign.undisturbed(retraining)
        share = (end - time.monotonic()) / (4 if arguments.kills else 1)
        crash_points(work, place, (batch, retraining), tally, share, arguments.seed)
        while time.monotonic() < end and tally.kills < arguments.kills:
            campaign.chain(rng.choice([batch, retraining]), end, arguments.kills)
    finally:
        if campaign.last:
            campaign.last.end()
    for said, count in tally.said.most_common():
        print(f"{count:5} x {said}")
    if (work / "outputs").exists():
        print(f"what runs printed that ended otherwise: {work / 'outputs'}")
        for name in ("run", "c", "crash", "batch", "batch-made", "retraining", "retraining-made"):
            shutil.rmtree(work / name, ignore_errors=True)
    else:
        shutil.rmtree(work)
    figures = {name: getattr(tally, name) for name in Tally.__dataclass_fields__ if name != "said"}
    print(json.dumps(figures | {"minutes": round((time.monotonic() - began) / 60, 1)}))


if __name__ == "__main__":
    main()
