"""The command itself: options, the cluster's address, closed pipes and odd environments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from hostile.case import Case, Check, accepted, polyconcept, words, write
from hostile.common import ROOT, batch_text, encoded, picture


def said(
    name: str,
    *arguments: str,
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    never: tuple[str, ...] = (),
    text: str | None = None,
    prepare: Callable[[], Any] = lambda: None,
) -> Case:
    """Arguments of the command, in this process. A batch file stands beside, `batch.yaml`."""

    def give():
        write(**{"batch.yaml": batch_text() if text is None else text, "photos/1.png": encoded(picture(1))})
        prepare()
        return lambda: polyconcept(*arguments)

    return Case(name, give, words(refused), right, never, seconds=30)


def placed(publish: str = "", images: str = "photos") -> str:
    """A batch whose output, store and releases all nodes of a cluster reach. publish: further settings there."""
    return batch_text(f"output: /nowhere/o\nstore: /nowhere/s\npublish: {{to: /nowhere/r{publish}}}\n", images=images)


HERE = placed()
NOBODY = "http://127.0.0.1:9"
ARGUMENTS = [
    said("no file", "plan", refused="batch_file|BATCH_FILE"),
    said("an unknown command", "frobnicate", refused="frobnicate"),
    said("an unknown option", "plan", "batch.yaml", "--fast", refused="--fast"),
    said(
        "a word for a number", "plan", "batch.yaml", "--cluster", "c.yaml", "--concepts", "many", refused="--concepts"
    ),
    said("a number without what it is for", "plan", "batch.yaml", "--concepts", "5", refused="--concepts"),
    said("an output that is a URL", "plan", "batch.yaml", "--output", "s3://bucket/x", refused="output|s3://bucket/x"),
    said(
        "an output in ~",
        "plan",
        "batch.yaml",
        "--output",
        "~/x",
        right=lambda s: "./~" not in s.text and " ~/x" not in s.text,
    ),
    said("an empty output", "plan", "batch.yaml", "--output", "", refused="output", right=accepted),
    said("an output that is a file", "report", "batch.yaml", "--output", "batch.yaml", refused="batch.yaml"),
    said("a report of nothing", "report", "batch.yaml", refused="batch.yaml"),
    said("a plan", "plan", "batch.yaml", right=lambda s: "stages to do" in s.text),
    said(
        "no regularisation images are counted without regularisation",
        "plan",
        "batch.yaml",
        right=lambda s: "regularization" not in s.text.split("packs of")[0],
    ),
    said("negative waiting", "retrain", "gone.yaml", "--wait", "-1", refused="--wait"),
    said("no retraining file", "retrain", "gone.yaml", refused="gone.yaml"),
    said("no study file", "study", "gone.yaml", refused="gone.yaml"),
    said("a port of 10^6", "preference", "serve", "study", "--port", "1000000", refused="port"),
    said("no study folder", "preference", "serve", "gone", refused="gone"),
    said("a cluster that is not there", "status", "--address", NOBODY, refused="127.0.0.1:9"),
    said("a cluster by a word", "status", "--address", "nothing", refused="nothing"),
    said("a cluster by an empty address", "status", "--address", "", refused="address|cluster"),
    said("a cluster by a file", "status", "--address", "file:///etc", refused="file:///etc"),
    said("a cluster by a port of a word", "status", "--address", "http://127.0.0.1:x", refused="127.0.0.1:x"),
    said(
        "a cluster's address with a password",
        "status",
        "--address",
        "http://me:SECRET@127.0.0.1:9",
        refused="127.0.0.1:9",
        never=("SECRET",),
    ),
    said("a job of no cluster", "stop", "../x", "--address", NOBODY, refused="127.0.0.1:9"),
    said(
        "submitted with relative places",
        "submit",
        "batch.yaml",
        "--address",
        NOBODY,
        refused="relative",
        text=batch_text(images="photos"),
    ),
    said("submitted to nobody", "submit", "batch.yaml", "--address", NOBODY, refused="127.0.0.1:9", text=HERE),
    said(
        "submitted with a signing key beside it",
        "submit",
        "batch.yaml",
        "--address",
        NOBODY,
        refused="key.pem",
        text=placed(", signing_key: key.pem"),
        prepare=lambda: write(**{"key.pem": "x"}),
    ),
    said(
        "submitted with images above the folder",
        "submit",
        "batch.yaml",
        "--address",
        NOBODY,
        refused="up",
        text=placed(images="../up"),
    ),
    said(
        "submitted with a section that is null",
        "submit",
        "batch.yaml",
        "--address",
        NOBODY,
        refused="127.0.0.1:9|retrieval",
        text=HERE + "retrieval:\n",
    ),
    said(
        "submitted with a section that is a list",
        "submit",
        "batch.yaml",
        "--address",
        NOBODY,
        refused="retrieval",
        text=HERE + "retrieval: [a]\n",
    ),
    said(
        "submitted with images in a FIFO",
        "submit",
        "batch.yaml",
        "--address",
        NOBODY,
        refused="photos|fifo|127.0.0.1:9",
        text=HERE,
        prepare=lambda: os.mkfifo("photos/2.png"),
    ),
]


def process(
    name: str,
    *arguments: str | bytes,
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    shell: str = "",
    **environment: str,
) -> Case:
    """The command as a process of its own, in an odd environment. shell: what stands behind it on the line."""

    def give():
        write(**{"batch.yaml": batch_text(class_word="'  '"), "good.yaml": batch_text()})
        own = {k: v for k, v in os.environ.items() if not k.startswith("LC_")} | {"PYTHONPATH": str(ROOT)} | environment

        def run() -> str:
            command = [sys.executable, "-m", "ray_jobs.cli", *arguments]
            line = ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "-", *command] if shell else command
            done = subprocess.run(line, env=own, capture_output=True)
            text = (done.stdout + done.stderr).decode(errors="backslashreplace")
            if done.returncode:
                print(text)
                raise SystemExit(done.returncode)
            return text

        return run

    return Case(f"process: {name}", give, words(refused), right, seconds=90)


PROCESSES = [
    process(
        "a locale of ASCII", "plan", "gone-ä.yaml", refused="gone-", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    ),
    process("an argument that is not UTF-8", "plan", b"gone\xff.yaml", refused="gone"),
    process(
        "a reader that goes away",
        "plan",
        "good.yaml",
        right=lambda s: "Traceback" not in s.result,
        shell="| head -c 1 || true",
    ),
    process("standard output that is full", "plan", "good.yaml", refused="space|full", shell="> /dev/full"),
    process("a terminal of one column", "plan", "batch.yaml", refused="batch.yaml", COLUMNS="1"),
]

CASES = [*ARGUMENTS, *PROCESSES]
