"""The captions nearest to a class prompt, each thing once."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval.clip import ClipModel
from retrieval.index import CHECKED_ROWS, Hits, check_model, read_header, read_rows, search

CANDIDATES = pa.schema(
    [("url", pa.string()), ("caption", pa.string()), ("similarity", pa.float32()), ("sha256", pa.string())]
)
"""Columns of a candidate table; `sha256` is null where the corpus pins no hash."""

LEFT_OUT = b"left_out"

Search = Callable[[Path, np.ndarray, int], Hits]

HITS_AT_ONCE = 4_000_000
"""Neighbours of one search, over all its queries, that bound its memory (12 bytes each, several copies)."""


def candidates_by_class(
    index_dir: Path,
    clip: ClipModel,
    class_prompts: list[str],
    count: int,
    *,
    max_nsfw: float | None = None,
    blocked_sha256: Collection[str] = (),
    search: Search = search,
) -> list[pa.Table]:
    """Choose, for each class prompt, the images whose caption is nearest to it; all prompts are one search.

    Args:
        index_dir: an index directory.
        clip: the model the captions were encoded with.
        class_prompts: such as "cat".
        count: candidates of each class; fewer only when the corpus is used up.
        max_nsfw: leave out rows above this probability, and rows without one.
        blocked_sha256: leave out images pinned to one of these hashes.
        search: how the index is searched; see `index.search`.

    Returns:
        Tables of `CANDIDATES`, most similar first, equal ones in the order of the corpus. Of equal urls (but for the
        fragment) and of equal captions (Unicode NFKC, case folded, anything but letters and digits taken as one space)
        the nearest is kept. Their metadata says what was left out of the nearest: see `left_out`.

    Raises:
        ValueError: the index was made with another model.
    """
    header = read_header(index_dir)
    if header["model"] not in (None, clip.digest):
        raise ValueError(
            f"the index in {index_dir} was encoded with another CLIP model than {clip.name}; build it again"
        )
    if header["model"] is None:  # of published embeddings; found again by itself is each caption if it is their model
        rows = np.unique(np.linspace(0, header["rows"] - 1, CHECKED_ROWS).astype(np.int64))
        captions = read_rows(index_dir, rows).column("caption").to_pylist()
        check_model(clip, captions, lambda encoded: search(index_dir, encoded, 1)[0][:, 0], str(index_dir))
    queries = clip.encode_text(class_prompts)
    return nearest(index_dir, queries, count, max_nsfw=max_nsfw, blocked_sha256=blocked_sha256, search=search)


def nearest(
    index_dir: Path,
    queries: np.ndarray,
    count: int,
    *,
    max_nsfw: float | None = None,
    blocked_sha256: Collection[str] = (),
    search: Search = search,
) -> list[pa.Table]:
    """Choose candidates for queries given as (q, d) float32 rows of unit length; see `candidates_by_class`."""
    total = read_header(index_dir)["rows"]
    blocked = frozenset(code.lower() for code in blocked_sha256)
    chosen: list[pa.Table | None] = [None] * len(queries)
    depth = min(total, max(4 * count, 64))
    while pending := [number for number, table in enumerate(chosen) if table is None]:
        group = max(1, HITS_AT_ONCE // depth)
        for start in range(0, len(pending), group):
            numbers = pending[start : start + group]
            scores, rows = search(index_dir, queries[numbers], depth)
            known, place = np.unique(rows, return_inverse=True)
            table = read_rows(index_dir, known)
            for number, query_scores, places in zip(numbers, scores, place.reshape(rows.shape), strict=True):
                # A row with the last score may have equals that were cut off: only a deeper search orders those.
                safe = len(places) if depth == total else int(np.sum(query_scores > query_scores[-1]))
                hits = table.take(pa.array(places[:safe]))
                kept, dropped = _first_of_each(hits, count, max_nsfw, blocked)
                if len(kept) == count or depth == total:
                    hits = hits.append_column("similarity", pa.array(query_scores[:safe], pa.float32()))
                    table_of_it = hits.take(pa.array(kept, pa.int64())).select(CANDIDATES.names)
                    chosen[number] = table_of_it.replace_schema_metadata({LEFT_OUT: json.dumps(dropped)})
        depth = min(total, 4 * depth)
    return chosen


def left_out(candidates: pa.Schema) -> dict[str, int]:
    """How many captions nearer than the last candidate were left out for a reason other than being there twice: `nsfw`
    (above the bound), `unscored`, `blocked`; those that are 0 are not there."""
    return json.loads((candidates.metadata or {}).get(LEFT_OUT, b"{}"))


def _first_of_each(
    hits: pa.Table, count: int, max_nsfw: float | None, blocked: frozenset[str]
) -> tuple[list[int], Counter[str]]:
    """Row numbers of the first `count` hits that are allowed and say something new; why others are not allowed."""
    kept: list[int] = []
    seen: set[tuple[str, str]] = set()
    dropped: Counter[str] = Counter()
    columns = (hits.column(name).to_pylist() for name in ("url", "caption", "nsfw", "sha256"))
    for number, (url, caption, nsfw, sha256) in enumerate(zip(*columns, strict=True)):
        reason = ""
        if max_nsfw is not None and (nsfw is None or math.isnan(nsfw)):
            reason = "unscored"
        elif max_nsfw is not None and nsfw > max_nsfw:
            reason = "nsfw"
        elif sha256 and sha256.lower() in blocked:
            reason = "blocked"
        if reason:
            dropped[reason] += 1
            continue
        marks = {("url", url.partition("#")[0]), ("caption", normalise_caption(caption))}
        if seen.isdisjoint(marks):
            seen |= marks
            kept.append(number)
            if len(kept) == count:
                break
    return kept, dropped


def normalise_caption(caption: str) -> str:
    """Reduce a caption to what it says: Unicode NFKC, case folded, anything but letters and digits as one space."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", caption).casefold()).strip()
