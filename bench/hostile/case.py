"""A hostile input: how it is made, what is right, and the judging of what came of it.

Each case runs in a forked process in an empty folder of its own, through the command's own handling of errors, so that
what it prints is what a user would read. Limits are of that process: one that hangs or swells is ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

MEMORY = 2**30
"""Bytes that a case may take beyond what its process began with."""
PROCESS = 800 * 2**20
"""Bytes that a process started by a case begins with, with PyTorch imported."""
MESSAGE, LINE = 12_000, 6_000
"""Letters of an error message, and of a line of it, that somebody still reads."""
ESCAPES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x9b\u202e]")
"""What makes a terminal do something else than show text. (Carriage returns are progress bars'.)"""


@dataclass
class Seen:
    """What came of a case. text: standard output and error. result: what its function returned."""

    code: int
    text: str
    result: Any = None


Check = Callable[[Seen], object]
"""Says whether the input was used rightly: anything false, or an exception, says that it was not."""


@dataclass(frozen=True)
class Case:
    """One input.

    give: makes the input in the current folder and returns what hands it to the project.
    refused: words that the error has to have, where the input is to be refused; `|` separates equally good ones.
    right: what has to be true where it is to be used. With `refused` beside it, both are good.
    never: texts that must not be shown, nor be in any new file: secrets, misleading lines.
    writes: beginnings of paths that may be new afterwards, in the folder or in `~/`; when None, `runs` if the input may
        be used, and nothing if it may not.
    changes: beginnings of paths there that may be changed or removed.
    seconds: allowed; of what starts processes, more.
    """

    name: str
    give: Callable[[], Callable[[], Any]]
    refused: tuple[str, ...] = ()
    right: Check | None = None
    never: tuple[str, ...] = ()
    writes: tuple[str, ...] | None = None
    changes: tuple[str, ...] = ()
    seconds: float = 20


@dataclass(frozen=True)
class Verdict:
    """how: `right`, `refused`, `refused_wrongly`, `tracebacks` or `harm`. why: for the last three, in words."""

    how: str
    why: str = ""
    text: str = field(default="", repr=False)
    seconds: float = 0.0


def words(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def accepted(_: Seen) -> bool:
    """For inputs of which nothing is to be checked but that they are taken."""
    return True


def polyconcept(*arguments: str | Path) -> None:
    """The command, in this process."""
    from ray_jobs import cli

    try:
        cli.app([str(argument) for argument in arguments])
    except SystemExit as end:  # click ends the process also when all went well
        if end.code:
            raise


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder -> what it is; of regular files the hash."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            what = f"{stat.S_IFMT(mode):o}"
            if stat.S_ISLNK(mode):
                what += os.readlink(path)
            elif stat.S_ISREG(mode) and os.stat(path).st_size < 2**26:
                with open(path, "rb") as file:
                    what += hashlib.file_digest(file, "sha256").hexdigest()
            found[os.path.relpath(path, folder)] = what
    return found


def judge(cases: Iterable[Case], at_once: int = 2) -> Iterator[tuple[Case, Verdict]]:
    """Run cases, each in a process of its own and within its limits; yields them as they end."""
    waiting, running = list(cases)[::-1], list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Running(waiting.pop()))
            for one in list(running):
                if verdict := one.verdict():
                    running.remove(one)
                    yield one.case, verdict
            time.sleep(0.02)
    finally:
        for one in running:  # the campaign is cut off
            one.end()
            _remove(one.box)


class _Running:
    """A case at work in its process."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.box = Path(tempfile.mkdtemp(prefix="hostile-"))
        for name in ("work", "home", "tmp"):
            (self.box / name).mkdir()
        self.outcome = self.box / "verdict.json"
        self.start = time.monotonic()
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.setsid()
                verdict = _run(case, self.box)
                self.outcome.write_text(json.dumps(vars(verdict)), encoding="utf-8", errors="backslashreplace")
            finally:
                os._exit(0)
        self.watched = psutil.Process(self.process)
        self.began = self.watched.memory_info().rss

    def verdict(self) -> Verdict | None:
        """None while it is at work. One that is beyond its limits is ended."""
        if os.waitpid(self.process, os.WNOHANG)[0]:
            why = ""
        elif why := self._beyond():
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        else:
            return None
        self.end()
        output = self.box / "output"
        text = output.read_text(errors="replace")[-3000:] if output.exists() else ""
        if why:
            found = Verdict("harm", why, text)
        elif self.outcome.exists():
            found = Verdict(**json.loads(self.outcome.read_text()))
        else:
            found = Verdict("tracebacks", "the process died", text)
        _remove(self.box)
        return found

    def end(self) -> None:
        """End it with what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process, signal.SIGKILL)

    def _beyond(self) -> str:
        seconds = time.monotonic() - self.start
        if seconds > self.case.seconds + 15:
            return f"was not done after {seconds:.0f} s"
        with contextlib.suppress(psutil.Error):
            held = [self.watched.memory_info().rss - self.began]
            held += [child.memory_info().rss - PROCESS for child in self.watched.children(recursive=True)]
            if max(held) > 1.3 * MEMORY:
                return f"held more than {1.3 * MEMORY / 2**30:.1f} GiB"
        return ""


def _run(case: Case, box: Path) -> Verdict:
    """In the forked process: make the input, hand it over, look at what came of it."""
    os.chdir(box / "work")
    os.environ |= {"HOME": str(box / "home"), "TMPDIR": str(box / "tmp"), "XDG_CACHE_HOME": str(box / "home/.cache")}
    tempfile.tempdir = None
    output = os.open(box / "output", os.O_RDWR | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        hand_over = case.give()
    except Exception:
        return Verdict("tracebacks", "the case itself could not be made", traceback.format_exc()[-3000:])
    before, start = {place: tree(box / place) for place in ("work", "home")}, time.monotonic()
    code, result = _handled(hand_over, case.seconds)
    seconds = time.monotonic() - start
    sys.stdout.flush()
    sys.stderr.flush()
    text = (box / "output").read_bytes().decode(errors="backslashreplace")
    seen = Seen(code, text, result)
    verdict = _verdict(case, seen, seconds, before, box)
    return replace(verdict, text=text[-3000:], seconds=seconds)


def _handled(hand_over: Callable[[], Any], seconds: float) -> tuple[int, Any]:
    """Exit code and result, errors handled as the command handles them."""
    import ray

    from ray_jobs import cli

    results: list[Any] = []

    def late(*_: Any) -> None:
        raise RuntimeError(f"not done after {seconds:.0f} s")

    def no_ray(*_: Any, **__: Any) -> None:
        raise RuntimeError("went on to start Ray")

    ray.init = no_ray
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    app = cli.app
    try:
        # the command itself, with this function in the place of what its arguments ask for
        cli.app = lambda *_: _with_app(cli, app, hand_over, results)
        cli.main([])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None), None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        cli.app = app
    return 0, results[0]


def _with_app(cli: Any, app: Any, hand_over: Callable[[], Any], results: list[Any]) -> None:
    cli.app = app
    try:
        results.append(hand_over())
    except SystemExit as end:
        if end.code:
            raise
        results.append(None)


def _verdict(case: Case, seen: Seen, seconds: float, before: dict[str, dict[str, str]], box: Path) -> Verdict:
    after = tree(box / "work")
    changed = [path for path, what in before["work"].items() if after.get(path) != what]
    changed = sorted(path for path in changed if not path.startswith(case.changes or "\0"))
    new = sorted(path for path in after if path not in before["work"])
    allowed = (("runs",) if case.right else ()) if case.writes is None else case.writes
    new += [f"~/{path}" for path in tree(box / "home") if path not in before["home"]]
    stray = [path for path in new if not path.startswith((*allowed, "~/.cache", "~/.config"))]
    if "went on to start Ray" in seen.text:
        return Verdict("harm", "accepted: it went on to work")
    if f"not done after {case.seconds:.0f} s" in seen.text or seconds > case.seconds:
        return Verdict("harm", f"took {seconds:.0f} s")
    if not seen.code and case.right is None and not changed:
        return Verdict("harm", f"accepted{f', and wrote {stray[0]!r}' if stray else ''}")
    if changed:
        return Verdict("harm", f"changed what was there: {changed[0]!r}")
    if stray:
        return Verdict("harm", f"wrote where it must not: {stray[0]!r}")
    for secret in case.never:
        told = [path for path in new if _holds(box / "work" / path.replace("~", "../home"), secret)]
        if secret in seen.text or told:
            return Verdict("harm", f"tells {secret!r}{f' in {told[0]}' if told else ''}")
    if "Traceback (most recent call last)" in seen.text:
        return Verdict("tracebacks", seen.text.strip().splitlines()[-1][:200])
    if escape := ESCAPES.search(re.sub(r"\x1b\[[0-9;]*[A-Zm]", "", seen.text) if seen.code == 0 else seen.text):
        return Verdict("harm", f"sends {escape[0]!r} to the terminal")
    if seen.code:
        return _refusal(case, seen)
    assert case.right
    try:
        is_right = case.right(seen)
    except Exception as error:
        return Verdict("harm", f"accepted, but then: {type(error).__name__}: {str(error)[:200]}")
    return Verdict("right") if is_right else Verdict("harm", "accepted, but used wrongly")


def _refusal(case: Case, seen: Seen) -> Verdict:
    message = seen.text.strip()
    shown = next((line for line in reversed(message.splitlines()) if "error" in line), message)[:300]
    if not message:
        return Verdict("tracebacks", f"says nothing, exit code {seen.code}")
    if len(message) > MESSAGE or max(map(len, message.splitlines())) > LINE:
        return Verdict("tracebacks", f"a message of {len(message)} letters")
    if not case.refused:
        return Verdict("refused_wrongly", shown)
    missing = [word for word in case.refused if not any(w.lower() in message.lower() for w in word.split("|"))]
    if missing:
        return Verdict("tracebacks", f"says nothing of {missing[0]!r}: {shown}")
    return Verdict("refused")


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()


def _remove(box: Path) -> None:
    for place, _, _ in os.walk(box):
        os.chmod(place, 0o755)
    shutil.rmtree(box, ignore_errors=True)


def write(**files: str | bytes) -> None:
    """Write files in the current folder. Names as keywords: `write(**{"a/b.txt": …})`."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
