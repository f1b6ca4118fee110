"""Candidates to a regularisation set: img2dataset in rounds, then every image verified."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urljoin

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from tqdm import tqdm

from retrieval.addresses import ASKED_AGAIN, MAX_WAIT, ascii_url, refusals
from retrieval.decoding import DECODE_SECONDS
from retrieval.images import perceptual_hash
from retrieval.regularization import RegularizationSet, own_image, read_shard
from retrieval.whole import whole_directory

log = logging.getLogger(__name__)

FETCH_SHARD_ROWS = 100
"""Candidates of one img2dataset shard: what is lost when a shard is, and the unit its workers share out."""
FINAL_SHARD_ROWS = 1000
MIN_ROUND = 16
"""Candidates of a round at least: a round takes seconds to start, whatever its size."""
START_SECONDS = 180
"""Allowed for the start of img2dataset's processes on a busy machine, beyond the time of the downloads."""
DUPLICATE_BITS = 4
"""Perceptual hashes (64 bits) that differ in so few are the same picture, scaled or compressed anew."""
SAMPLES = pa.schema(
    [
        ("candidate", pa.int64()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("similarity", pa.float32()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("key", pa.string()),
        ("sha256", pa.string()),
    ]
)


def download(
    candidates: pa.Table,
    out: Path,
    *,
    count: int,
    image_size: int,
    local: bool = False,
    base_url: str | None = None,
    exclude: Collection[str] = (),
    blocked_sha256: Collection[str] = (),
    timeout: float = 10.0,
    max_bytes: int = 20_000_000,
    processes: int = 1,
    threads: int = 32,
    distributor: Literal["multiprocessing", "ray"] = "multiprocessing",
) -> RegularizationSet:
    """Download candidates, most similar first, until `count` whole and different images are there.

    img2dataset is asked in rounds: for half as many again as are missing, then again by the share that failed, until
    there are enough or the candidates are used up. Too few are not an error: the result says how many and why.

    Args:
        candidates: `url`, `caption`, `similarity` and perhaps `sha256`, what `select.candidates` returns.
        out: directory of the set, written whole or not at all.
        count: images wanted.
        image_size: side of the square the middle of each image is brought to, in pixels.
        local: allow loopback and private addresses, for a corpus declared local.
        base_url: what relative urls of the corpus are relative to.
        exclude: `perceptual_hash` of images that must not be among them, the concept's own.
        blocked_sha256: hashes of image files that must not be among them.
        timeout: seconds that one image may take in all, over redirects and a host's several addresses; beside them a
            server may ask for some patience (`addresses.MAX_WAIT`).
        max_bytes: bytes one image may have.
        processes: downloading processes.
        threads: connections of each at a time.
        distributor: img2dataset's; with "ray" `out` has to lie on a file system that all nodes share, and `RAY_ADDRESS`
            has to name the cluster.

    Every candidate tried ends, in `samples.parquet`, with one status:

        success             in the set, under `key`
        surplus             whole, but there were enough before it
        refused             never asked: not http(s), a user name in it, or an address that is not a public one
        unresolved          never asked: its host has no address
        failed_to_download  no answer, an error, too slow, too many bytes, cut short, a redirect to an address that is
                            not allowed, or the site says not to use it
        failed_to_resize    not an image, broken, truncated, too slow to decode, or less than half of `image_size`
        hash_mismatch       not the image whose sha256 the corpus has
        blocked             one of `blocked_sha256`
        duplicate           looks like one of `exclude`, or one before it
        lost                img2dataset ended, or was ended, without an answer

    Addresses are checked before any request and again at each connection, also after redirects, and the connection goes
    to the very address that was checked, so that a name cannot change its mind in between. What remains: a public
    server may itself fetch what it likes, and a machine with a public address is asked even when it stands in one's
    own network.

    Raises:
        ValueError: `out` is there already, or a number is not positive.
        RuntimeError: img2dataset itself failed.
    """
    for name, value in {"count": count, "image_size": image_size, "processes": processes, "threads": threads}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    rows, got = candidates.to_pylist(), 0
    records: list[dict] = []
    judge = _Judge(count, exclude, blocked_sha256)
    settings = {
        "local": local,
        "image_size": image_size,
        "timeout": timeout,
        "max_bytes": max_bytes,
        "processes": processes,
        "threads": threads,
        "distributor": distributor,
    }
    with whole_directory(out) as folder:
        folder = folder.resolve()
        pattern = str(folder).replace("%", "%%") + "/%05d.tar"
        writer = webdataset.ShardWriter(pattern, maxcount=FINAL_SHARD_ROWS, mtime=0, encoder=False, verbose=0)
        bar = tqdm(total=count, desc=f"images {Path(out).name}", disable=None)
        while got < count and len(records) < len(rows):
            share = max(got, 1) / len(records) if records else 1.0
            size = max(math.ceil(1.5 * (count - got) / share), MIN_ROUND)
            batch = range(len(records), min(len(records) + size, len(rows)))
            urls = {number: _absolute(rows[number]["url"], base_url) for number in batch}
            for number, outcome, jpg in _try_candidates(urls, folder, settings):
                row = rows[number]
                if jpg is not None and outcome["status"] == "success":
                    outcome |= judge(jpg, outcome["sha256"], row.get("sha256"))
                record = {
                    "candidate": number,
                    **{name: row[name] for name in ("url", "caption", "similarity")},
                    **outcome,
                }
                if jpg is not None and outcome["status"] == "success":
                    record["key"] = f"{got:09d}"
                    writer.write(_sample(record, jpg))
                    got += 1
                    bar.update()
                records.append(record)
        writer.close()
        bar.close()
        records.sort(key=lambda record: record["candidate"])
        pq.write_table(pa.Table.from_pylist(records, SAMPLES), folder / "samples.parquet")
        statuses = dict(sorted(Counter(record["status"] for record in records).items()))
        shortfall = None
        if got < count:
            lost = ", ".join(f"{number} {status}" for status, number in statuses.items() if status != "success")
            shortfall = f"{got} of {count} images; all {len(rows)} candidates are used up ({lost or 'all were good'})"
        RegularizationSet(folder, count, got, statuses, shortfall).save()
    return RegularizationSet.load(out)


class _Judge:
    """Says whether a downloaded image belongs in the set; remembers the look of those that do."""

    def __init__(self, count: int, exclude: Collection[str], blocked_sha256: Collection[str]) -> None:
        self.room = count
        self.hashes = [int(code, 16) for code in exclude]
        self.blocked = frozenset(code.lower() for code in blocked_sha256)

    def __call__(self, jpg: bytes, sha256: str, pinned: str | None) -> dict[str, str]:
        """Return what changes in the outcome: status and reason, or nothing for an image that is kept."""
        if pinned and sha256 != pinned.lower():
            return {"status": "hash_mismatch", "reason": f"the corpus has {pinned}"}
        if sha256 in self.blocked:
            return {"status": "blocked", "reason": "on the block list"}
        if not self.room:
            return {"status": "surplus", "reason": "there were enough before it"}
        look = int(perceptual_hash(own_image(jpg)), 16)
        if any((look ^ other).bit_count() <= DUPLICATE_BITS for other in self.hashes):
            return {"status": "duplicate", "reason": "looks like an excluded image or one before it"}
        self.hashes.append(look)
        self.room -= 1
        return {}


def _absolute(url: str, base_url: str | None) -> str:
    try:
        return ascii_url(urljoin(base_url.rstrip("/") + "/", url) if base_url else url)
    except ValueError:  # not a url at all, which is said when it is refused
        return url


def _sample(record: dict, jpg: bytes) -> dict:
    facts = {name: record[name] for name in ("url", "caption", "status", "similarity", "sha256")}
    return {
        "__key__": record["key"],
        "jpg": jpg,
        "txt": record["caption"].encode(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def _try_candidates(
    urls: dict[int, str], folder: Path, settings: dict
) -> Iterator[tuple[int, dict[str, str], bytes | None]]:
    """Try urls, by candidate number, with one run of img2dataset; yield (candidate, status …, jpg of a success).

    Those never asked come first; the others in their order, shard by shard, so that memory holds one shard.
    """
    verdicts = refusals(list(urls.values()), local=settings["local"], timeout=3 * settings["timeout"])
    waiting = []
    for number, verdict in zip(urls, verdicts, strict=True):
        if verdict:
            yield number, {"status": verdict[0], "reason": verdict[1]}, None
        else:
            waiting.append(number)
    if not waiting:
        return
    # Inside the set's own folder: with Ray that is a place all nodes see.
    with tempfile.TemporaryDirectory(prefix=".round-", dir=folder) as work:
        columns = {"url": [urls[number] for number in waiting], "candidate": waiting}
        pq.write_table(pa.table(columns), f"{work}/candidates.parquet")
        _run_img2dataset(Path(work), len(waiting), settings)
        missing = dict.fromkeys(waiting)
        for stats in sorted(Path(work).glob("*_stats.json")):  # written when the shard is closed
            name = stats.name.removesuffix("_stats.json")
            images = {sample["__key__"]: sample["jpg"] for sample in read_shard(Path(work, f"{name}.tar"))}
            table = pq.read_table(f"{work}/{name}.parquet").sort_by("candidate")
            for row in table.to_pylist():
                del missing[row["candidate"]]
                outcome = {"status": row["status"], "reason": row["error_message"], "sha256": row["sha256"]}
                yield row["candidate"], outcome, images.get(row["key"])
        for number in missing:
            yield number, {"status": "lost", "reason": "img2dataset ended without an answer"}, None


def _run_img2dataset(work: Path, rows: int, settings: dict) -> None:
    shards = math.ceil(rows / FETCH_SHARD_ROWS)
    waits = math.ceil(FETCH_SHARD_ROWS / settings["threads"]) * math.ceil(shards / settings["processes"])
    # What no round exceeds that goes on: a shard that is cut off loses its good images.
    seconds = START_SECONDS + waits * (settings["timeout"] + ASKED_AGAIN * MAX_WAIT) + DECODE_SECONDS * rows
    settings = {**settings, "table": f"{work}/candidates.parquet", "out": str(work), "shard_rows": FETCH_SHARD_ROWS}
    (work / "settings.json").write_text(json.dumps(settings))
    log_file, scratch = work / "log.txt", work / "tmp"
    scratch.mkdir()
    # where Ray finds its running session, which it looks for in TMPDIR otherwise
    ray_files = {"RAY_TMPDIR": os.environ.get("RAY_TMPDIR", tempfile.gettempdir())}
    with log_file.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "retrieval.fetch", str(work / "settings.json")],
            cwd=Path(__file__).parents[1],  # where `retrieval` is imported from, here and in the workers it starts
            # its temporary files go with the round: what it imports makes some, and it and its workers are killed
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "TMPDIR": str(scratch), **ray_files},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone, and its workers can be ended with it
        )
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            log.warning("img2dataset was ended after %.0f s; what it had not finished counts as lost", seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not late and not any(work.glob("*_stats.json")):
        tail = log_file.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"img2dataset made nothing and ended with exit code {process.returncode}:\n{tail}")
