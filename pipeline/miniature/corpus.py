"""The miniature world as a web: a table of image addresses with captions, and a loopback server that draws them.

    write_corpus(Path("captions.parquet"), 100_000, seed=1)
    with serve_corpus() as base:
        ...  # base + url of any row is its image

Every row is a pure function of the seed and its index, so the server needs no table and no files.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.miniature import world

CORPUS_VERSION = 2
"""Raised when the same seed and index make another scene than before."""

BATCH = 10_000
"""Rows written at once: memory does not grow with the corpus."""

_SCHEMA = pa.schema([("url", pa.string()), ("caption", pa.string())])
_PATH = re.compile(r"/scenes/(0|[1-9][0-9]{0,17})/(0|[1-9][0-9]{0,17})\.png")


def corpus_scene(seed: int, index: int) -> world.Scene:
    """The scene of one row."""
    return world.sample_scene(np.random.default_rng([seed, index]))


def write_corpus(path: Path, count: int, seed: int) -> None:
    """Write a parquet table of `count` rows (`url`: `scenes/<seed>/<index>.png`, `caption`), whole or not at all.

    Raises:
        ValueError: for a negative count or seed.
    """
    if count < 0 or seed < 0:
        raise ValueError(f"count ({count}) and seed ({seed}) of a corpus must not be negative")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with pq.ParquetWriter(part, _SCHEMA) as writer, tqdm(desc="captions", total=count, disable=None) as progress:
            for start in range(0, count, BATCH):
                indices = range(start, min(start + BATCH, count))
                urls = [f"scenes/{seed}/{i}.png" for i in indices]
                captions = [corpus_scene(seed, i).caption for i in indices]
                writer.write_table(pa.table([urls, captions], schema=_SCHEMA))
                progress.update(len(indices))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def serve_corpus(dead_share: float = 0.0) -> Iterator[str]:
    """Draw the scenes of any corpus on request, on a free loopback port, while the context lasts.

    Args:
        dead_share: this share of the addresses, always the same ones, answers 404, as links on the web die.

    Yields:
        The base address, `http://127.0.0.1:<port>/`; base + url of a row is its image as PNG.

    Raises:
        ValueError: for a share outside [0, 1].
    """
    if not 0 <= dead_share <= 1:
        raise ValueError(f"dead_share must lie between 0 and 1, not {dead_share}")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match = _PATH.fullmatch(self.path)
            # a stream of its own (the third number), so that death and content have nothing in common
            if match is None or np.random.default_rng([*map(int, match.groups()), 404]).random() < dead_share:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            buffer = io.BytesIO()
            world.render(corpus_scene(*map(int, match.groups())))[0].save(buffer, "PNG")
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(buffer.tell()))
            self.end_headers()
            self.wfile.write(buffer.getvalue())

        def log_message(self, *_: object) -> None:
            """One line for each of thousands of requests helps nobody."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # downloaders connect from dozens of threads at once; the default holds 5

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # a client that gave up is no error
                super().handle_error(request, client_address)

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
