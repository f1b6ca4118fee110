"""A campaign of hostile, odd and foreign inputs, each with what is right: refused in words that name it, or used.

    python bench/hostile.py                  # all, ten minutes on two cores
    python bench/hostile.py --only images    # one kind
    python bench/hostile.py --match EPS      # cases whose names hold this, with what they print
    python bench/hostile.py --list

Cases are in `bench/hostile/`, a module for each kind. Each runs in a forked process with limits of time and memory. The
table has what is not right; the last line is one JSON object:

    right            used, and rightly
    refused          by an error that names the file, key or value
    refused_wrongly  by such an error, though it should be used
    tracebacks       a fault of ours reached the user, or an error that says nothing of the input
    harm             accepted though it should be refused, used wrongly, something overwritten or written where it must
                     not be, a secret told, more than 1 GiB of memory or 20 s
"""

from __future__ import annotations

import argparse
import atexit
import collections
import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

NOBODY = ["--reuid=65534", "--regid=65534", "--clear-groups"]
MAY_READ = [f"--{which}=-all,+dac_read_search" for which in ("inh-caps", "ambient-caps", "bounding-set")]
if "HOSTILE" not in os.environ:  # the folder of all that is made
    os.environ |= dict.fromkeys(("HOSTILE", "HOME", "TMPDIR"), mkdtemp(prefix="hostile-"))
if os.geteuid() == 0:
    # destinations are hostile too: as root, `--out /dev/null` would put a file in the device's place
    os.chown(os.environ["HOSTILE"], 65534, 65534)
    os.execvp("setpriv", ["setpriv", *NOBODY, *MAY_READ, sys.executable, *sys.argv])
if os.access("/dev", os.W_OK):
    sys.exit("this user may write to /dev; run the campaign as one who may not")

atexit.register(shutil.rmtree, os.environ["HOSTILE"], ignore_errors=True)
for which in (signal.SIGINT, signal.SIGTERM):
    signal.signal(which, lambda which, _: sys.exit(128 + which))

for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, whose files have names of packages

import torch  # noqa: E402
from hostile.case import Case, judge  # noqa: E402
from hostile.common import preload  # noqa: E402

KINDS = (
    "batch_files",
    "lists",
    "other_files",
    "images",
    "corpora",
    "web",
    "bases",
    "weights",
    "releases",
    "scratch",
    "preference",
    "commands",
)
"""The modules in `bench/hostile/`."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", choices=KINDS, help="one kind")
    arguments.add_argument("--match", default="", help="only cases whose name holds this; prints what they printed")
    arguments.add_argument("--list", action="store_true", help="print the cases, run none")
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    if not asked.list:
        preload()
    start = time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    for kind in [asked.only] if asked.only else KINDS:
        module = importlib.import_module(f"hostile.{kind}")
        cases: list[Case] = [case for case in module.CASES if asked.match in case.name]
        if asked.list:
            print("\n".join(f"{kind:14} {case.name!r}" for case in cases))
            continue
        began, own = time.monotonic(), collections.Counter[str]()
        getattr(module, "prepare", lambda: None)()
        for case, verdict in judge(cases):
            own[verdict.how] += 1
            if verdict.why:
                print(f"{kind:14} {verdict.how:15} {case.name!r:60.100} {verdict.why!r:.300}", flush=True)
            if asked.match:
                print(verdict.text)
        counts += own
        print(f"{kind:14} {len(cases)} tried, {dict(own)}, {time.monotonic() - began:.0f} s", flush=True)
    if not asked.list:
        figures = {how: counts[how] for how in ("right", "refused", "refused_wrongly", "tracebacks", "harm")}
        print(json.dumps({"tried": counts.total(), **figures, "seconds": round(time.monotonic() - start)}))


if __name__ == "__main__":
    main()
