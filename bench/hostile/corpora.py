"""Caption corpora: parquet tables, published embeddings, archives of images."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hostile.case import Case, Check, Seen, accepted, words, write
from hostile.common import CLIP, Pickled, batch_text, encoded, picture, planned

RETRIEVAL = "retrieval: {{corpus: {corpus}, images: 2{more}}}"


def indexed(rows: int | None = None):
    """What a run does with a corpus before it asks the web: its plan, its index, the candidates of a class."""
    from pipeline.stages.candidates import Candidates
    from pipeline.stages.index import Index
    from pipeline.stages.stage import run_stage
    from pipeline.store import Store
    from retrieval.index import read_header

    plan = planned()
    store = Store(plan.batch.store_url)
    (index,), (candidates,) = plan.of(Index), plan.of(Candidates)
    found = read_header(run_stage(index, store, lambda *_: None).index)["rows"]
    table = run_stage(candidates, store, lambda *_: None).table()
    return plan, found, table


def corpus(
    name: str,
    make: Callable[[], Any],
    *,
    refused: str | tuple[str, ...] = (),
    rows: int | None = None,
    right: Check | None = None,
    place: str = "corpus.parquet",
    more: str = "",
    never: tuple[str, ...] = (),
) -> Case:
    """rows: how many captions are to be in its index."""

    def give():
        text = batch_text(RETRIEVAL.format(corpus=place, more=more), class_word="cat").replace("none", "real")
        write(**{"batch.yaml": text})
        make()
        return indexed

    if rows is not None:
        right = lambda s: s.result[1] == rows  # noqa: E731
    return Case(name, give, words(refused), right, never, writes=("runs",))


CAPTIONS = ["a photo of a cat", "a dog on the beach", "an umbrella", "a cat in the snow"]
URLS = [f"http://127.0.0.1:9/{i}.png" for i in range(4)]


def table(path: str = "corpus.parquet", **columns: Any) -> Callable[[], None]:
    """Of four rows, with these columns; None leaves one out."""

    def make() -> None:
        found = {
            k: v() if callable(v) else v
            for k, v in ({"url": URLS, "caption": CAPTIONS} | columns).items()
            if v is not None
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(found), path)

    return make


def raw(content: bytes, path: str = "corpus.parquet") -> Callable[[], None]:
    return lambda: write(**{path: content})


def _cut() -> None:
    table()()
    content = Path("corpus.parquet").read_bytes()
    Path("corpus.parquet").write_bytes(content[: len(content) // 2])


def _corrupt() -> None:
    """Its pages are damaged, its footer is whole."""
    table()()
    content = bytearray(Path("corpus.parquet").read_bytes())
    content[10:60] = bytes(50)
    Path("corpus.parquet").write_bytes(content)


def _long_dictionary() -> None:
    """8 192 rows of one caption of 400 kB: some kB as a file."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 8192, pa.int32()), pa.array(["cat " * 100_000]))
    pq.write_table(
        pa.table({"url": [f"http://127.0.0.1:9/{i}" for i in range(8192)], "caption": values}),
        "corpus.parquet",
        compression="zstd",
    )


def _twice_named() -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(URLS), pa.array(CAPTIONS), pa.array(CAPTIONS)], ["url", "caption", "caption"]),
        "corpus.parquet",
    )


BYTES = [b"a photo of a cat", b"caf\xe9 \xff", b"an umbrella", b"a cat in the snow"]
NSFW = {"more": ", max_nsfw: 0.3"}


def _first_two(seen: Seen) -> bool:
    """Rows 0 and 1 are allowed, 2 and 3 not."""
    return set(seen.result[2].column("url").to_pylist()) == set(URLS[:2])


def said_or_left_out(word: str) -> Check:
    return lambda s: word in s.text.lower() or word in " ".join(s.result[0].notes).lower()


TABLES = [
    corpus("an ordinary table", table(), rows=4),
    corpus("an empty file", raw(b""), refused="corpus.parquet"),
    corpus("text", raw(b"url,caption\nx,y\n"), refused="corpus.parquet"),
    corpus("parquet's first letters", raw(b"PAR1"), refused="corpus.parquet"),
    corpus("half a table", _cut, refused="corpus.parquet"),
    corpus("a table with damaged pages", _corrupt, refused="corpus.parquet"),
    corpus("no rows", table(url=pa.array([], pa.string()), caption=pa.array([], pa.string())), refused="corpus"),
    corpus("no url", table(url=None), refused=("corpus.parquet", "url")),
    corpus("no caption", table(caption=None), refused=("corpus.parquet", "caption")),
    corpus("LAION's names", table(url=None, caption=None, URL=URLS, TEXT=CAPTIONS), rows=4),
    corpus("url and URL", table(URL=URLS), rows=4, refused=("corpus.parquet", "url")),
    corpus("two columns named caption", _twice_named, refused=("corpus.parquet", "caption")),
    corpus("captions that are numbers", table(caption=[1, 2, 3, 4]), refused=("corpus.parquet", "caption"), rows=4),
    corpus("captions that are lists", table(caption=[[c] for c in CAPTIONS]), refused=("corpus.parquet", "caption")),
    corpus(
        "captions that are structs", table(caption=[{"en": c} for c in CAPTIONS]), refused=("corpus.parquet", "caption")
    ),
    corpus(
        "captions that are maps",
        table(caption=lambda: pa.array([[("a", c)] for c in CAPTIONS], pa.map_(pa.string(), pa.string()))),
        refused=("corpus.parquet", "caption"),
    ),
    corpus("captions that are all null", table(caption=lambda: pa.nulls(4)), refused="corpus"),
    corpus("captions that are blank", table(caption=[" ", "", "\t", "\u3000"]), refused="corpus"),
    corpus("captions as bytes", table(caption=[c.encode() for c in CAPTIONS]), rows=4),
    corpus("one caption that is not UTF-8", table(caption=BYTES), rows=3),
    corpus("one url that is not UTF-8", table(url=[b"http://x/\xff", *(u.encode() for u in URLS[1:])]), rows=3),
    corpus("captions that are not UTF-8, as text", lambda: _lying_strings(), rows=3),
    corpus("captions of a dictionary", table(caption=lambda: pa.array(CAPTIONS).dictionary_encode()), rows=4),
    corpus("large strings", table(caption=lambda: pa.array(CAPTIONS, pa.large_string())), rows=4),
    corpus(
        "string views",
        table(caption=lambda: pa.array(CAPTIONS, pa.string_view())),
        rows=4,
        refused=("corpus.parquet", "caption"),
    ),
    corpus("a caption of 2 MB", table(caption=["cat " * 500_000, *CAPTIONS[1:]]), right=accepted),
    corpus("8 192 rows of one long caption", _long_dictionary, right=accepted, refused=("corpus.parquet", "caption")),
    corpus("a caption with NUL and an escape", table(caption=["cat\0 \x1b[31m", *CAPTIONS[1:]]), rows=4),
    corpus("urls that are numbers", table(url=[1, 2, 3, 4]), refused=("corpus.parquet", "url"), rows=4),
    corpus("urls that are null", table(url=lambda: pa.nulls(4, pa.string())), refused="corpus"),
    corpus("scores as words", table(nsfw=["UNLIKELY", "UNLIKELY", "NSFW", "UNSURE"]), right=_first_two, **NSFW),
    corpus(
        "scores as words of a dictionary",
        table(nsfw=lambda: pa.array(["UNLIKELY", "UNLIKELY", "NSFW", "UNSURE"]).dictionary_encode()),
        right=_first_two,
        **NSFW,
    ),
    corpus("scores as small words", table(nsfw=["unlikely", "Unlikely", "nsfw", "unsure"]), right=_first_two, **NSFW),
    corpus("scores as written numbers", table(punsafe=["0.1", "0.2", "0.9", "1.0"]), right=_first_two, **NSFW),
    corpus(
        "scores as large strings",
        table(nsfw=lambda: pa.array(["UNLIKELY", "UNLIKELY", "NSFW", "NSFW"], pa.large_string())),
        right=_first_two,
        **NSFW,
    ),
    corpus(
        "scores as decimals",
        table(nsfw=lambda: pa.array([0.1, 0.2, 0.9, 1.0]).cast(pa.decimal128(5, 2))),
        right=_first_two,
        refused=("corpus.parquet", "nsfw"),
        **NSFW,
    ),
    corpus(
        "scores that are true or false",
        table(nsfw=[False, False, True, True]),
        right=_first_two,
        refused=("corpus.parquet", "nsfw"),
        **NSFW,
    ),
    corpus("scores of whole numbers", table(nsfw=[0, 0, 1, 1]), right=_first_two, **NSFW),
    corpus("scores that are NaN", table(nsfw=[0.1, 0.1, float("nan"), None]), right=_first_two, **NSFW),
    corpus("scores that are lists", table(nsfw=[[0.1]] * 4), refused=("corpus.parquet", "nsfw"), **NSFW),
    corpus("words that are no score", table(nsfw=["x"] * 4), refused=("corpus.parquet", "nsfw"), **NSFW),
    corpus("no score with max_nsfw", table(), refused=("nsfw",), right=said_or_left_out("nsfw"), **NSFW),
    corpus("sums that are numbers", table(sha256=[1, 2, 3, 4]), refused=("corpus.parquet", "sha256"), rows=4),
    corpus("a CSV file", raw(b"url,caption\nx,y\n", "corpus.csv"), place="corpus.csv", refused="corpus.csv"),
    corpus(
        "JSON lines",
        raw(b'{"url": "x", "caption": "y"}\n', "corpus.jsonl"),
        place="corpus.jsonl",
        refused="corpus.jsonl",
    ),
    corpus("a folder without tables", raw(b"", "c/readme.txt"), place="c", refused="c"),
    corpus(
        "a folder with an unfinished table",
        lambda: (table("c/1.parquet")(), raw(b"", "c/_SUCCESS")(), raw(b"PAR1", "c/2.parquet.part")()),
        place="c",
        rows=4,
    ),
    corpus(
        "a folder with a broken table",
        lambda: (table("c/1.parquet")(), raw(b"PAR1", "c/2.parquet")()),
        place="c",
        refused="2.parquet",
    ),
    corpus(
        "a folder with a link to nothing",
        lambda: (table("c/1.parquet")(), os.symlink("/gone", "c/2.parquet")),
        place="c",
        refused="2.parquet",
    ),
    corpus("a folder with a loop", lambda: (table("c/1.parquet")(), os.symlink(".", "c/loop")), place="c", rows=4),
    corpus("a folder named [work]", table("[work]/1.parquet"), place="'[work]'", rows=4),
    corpus("a pattern", lambda: (table("c/1.parquet")(), table("c/2.parquet")()), place="c/*.parquet", rows=8),
    corpus("a pattern that matches nothing", lambda: None, place="gone/*.parquet", refused="gone/*.parquet"),
    corpus("nothing there", lambda: None, place="gone.parquet", refused="gone.parquet"),
    corpus("a FIFO", lambda: os.mkfifo("corpus.parquet"), refused="corpus.parquet"),
    corpus("/dev/zero", lambda: os.symlink("/dev/zero", "corpus.parquet"), refused="corpus.parquet"),
    corpus("a file: address", table(), place="file://corpus.parquet", refused="corpus.parquet", rows=4),
    corpus("s3://", lambda: None, place="'s3://'", refused="s3://"),
    corpus("an unknown kind of address", lambda: None, place="nothing://x/c.parquet", refused="nothing"),
    corpus("a server that is not there", lambda: None, place="http://127.0.0.1:9/c.parquet", refused="127.0.0.1:9"),
    corpus("a pipe", lambda: None, place="'pipe:touch executed'", refused="pipe"),
]


def _lying_strings() -> None:
    """A text column, whose bytes are not checked when a table is written."""
    wrong = pa.Array.from_buffers(pa.string(), 4, pa.array(BYTES, pa.binary()).buffers())
    pq.write_table(pa.table({"url": URLS, "caption": wrong}), "corpus.parquet")


def _vectors(kind: str = "f4") -> np.ndarray:
    from retrieval.clip import load_clip

    return load_clip(str(CLIP)).encode_text(CAPTIONS).astype(kind)


def embeddings(
    name: str,
    array: Callable[[], np.ndarray] | bytes,
    *,
    prepare: Callable[[], Any] = lambda: None,
    number: str = "0",
    **expected: Any,
) -> Case:
    """A folder as clip-retrieval writes it, of four captions."""

    def make() -> None:
        table(f"c/metadata/metadata_{number}.parquet")()
        data = array
        if callable(array):
            stream = io.BytesIO()
            np.save(stream, array(), allow_pickle=True)
            data = stream.getvalue()
        write(**{f"c/text_emb/text_emb_{number}.npy": data})
        prepare()

    return corpus(f"embeddings: {name}", make, place="c", **expected)


def _other_clip() -> np.ndarray:
    """Of the same width, by another model: its space is turned."""
    own = _vectors()
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(own.shape[1],) * 2))
    return (own @ turn).astype("f4")


def _bad_rows() -> np.ndarray:
    made = _vectors()
    made[0], made[1, 0] = 0, np.nan
    return made


def _header(text: str, data: bytes = bytes(4096), version: bytes = b"\x01\x00") -> bytes:
    padded = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + version + len(padded).to_bytes(2, "little") + padded + data


NPY = "text_emb_0.npy"
EMBEDDINGS = [
    embeddings("of this model", _vectors, rows=4),
    embeddings("in half precision", lambda: _vectors("f2"), rows=4),
    embeddings("in double precision", lambda: _vectors("f8"), rows=4),
    embeddings("big-endian", lambda: _vectors(">f4"), rows=4, refused=NPY),
    embeddings("of another model of this width", _other_clip, refused="model|CLIP"),
    embeddings("of another width", lambda: np.ones((4, 7), "f4"), refused="width|7"),
    embeddings("of integers", lambda: np.ones((4, 64), "i1"), refused=NPY),
    embeddings("complex", lambda: np.ones((4, 64), "c8"), refused=NPY),
    embeddings("of objects", lambda: np.array([[Pickled()] * 4] * 4, object), refused=NPY),
    embeddings("of one axis", lambda: np.ones(4, "f4"), refused=NPY),
    embeddings("of three axes", lambda: np.ones((4, 8, 8), "f4"), refused=NPY),
    embeddings("in columns", lambda: np.asfortranarray(_vectors()), refused=NPY, rows=4),
    embeddings("with fewer rows than captions", lambda: _vectors()[:3], refused=NPY),
    embeddings("with rows of zeros and NaN", _bad_rows, rows=2),
    embeddings("all NaN", lambda: _vectors() * np.nan, refused="corpus|embedding"),
    embeddings("an empty file", b"", refused=NPY),
    embeddings("text", b"0.1 0.2\n", refused=NPY),
    embeddings(
        "cut off", _header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 64), }", bytes(100)), refused=NPY
    ),
    embeddings(
        "an impossible shape",
        _header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 1000000000000), }"),
        refused=NPY,
    ),
    embeddings(
        "a negative shape", _header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, -64), }"), refused=NPY
    ),
    embeddings("a header that is code", _header("__import__('os').system('touch executed')"), refused=NPY),
    embeddings(
        "a header of another version",
        _header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 64), }", version=b"\x09\x00"),
        refused=NPY,
    ),
    embeddings("a table without embeddings", _vectors, prepare=table("c/metadata/metadata_1.parquet"), refused="1"),
    embeddings(
        "embeddings without a table", _vectors, prepare=lambda: write(**{"c/text_emb/text_emb_1.npy": b""}), refused="1"
    ),
    embeddings("numbers with zeros before them", _vectors, number="0000", rows=4),
    embeddings("Arabic digits as number", _vectors, number="٠", refused="text_emb|corpus|metadata"),
    embeddings(
        "a broken table", _vectors, prepare=raw(b"PAR1", "c/metadata/metadata_0.parquet"), refused="metadata_0.parquet"
    ),
    embeddings(
        "a FIFO as table",
        _vectors,
        prepare=lambda: (os.unlink("c/metadata/metadata_0.parquet"), os.mkfifo("c/metadata/metadata_0.parquet")),
        refused="metadata_0.parquet",
    ),
    embeddings(
        "a FIFO",
        _vectors,
        prepare=lambda: (os.unlink(f"c/text_emb/{NPY}"), os.mkfifo(f"c/text_emb/{NPY}")),
        refused=NPY,
    ),
]


def archive(
    name: str, members: dict[str, bytes] | bytes, refused: str | tuple[str, ...] = (), count: int | None = None
) -> Case:
    """A set of regularisation images as it lies in a store, whose archive was tampered with. count: images in it."""

    def give():
        data = io.BytesIO()
        if isinstance(members, bytes):
            data.write(members)
        else:
            with tarfile.open(fileobj=data, mode="w") as tar:
                for member, content in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        write(
            **{
                "set/set.json": '{"asked": 1, "got": 1, "statuses": {}, "shortfall": null}',
                "set/00000.tar": data.getvalue(),
            }
        )

        def images():
            from retrieval.regularization import RegularizationSet

            return list(RegularizationSet.load("set"))

        return images

    return Case(f"archive: {name}", give, words(refused), None if count is None else lambda s: len(s.result) == count)


JPG, TXT = encoded(picture(1), "JPEG"), b"a photo of a cat"
ARCHIVES = [
    archive("an ordinary one", {"000.jpg": JPG, "000.txt": TXT}, count=1),
    archive("names that lead out", {"../000.jpg": JPG, "../000.txt": TXT}, ("00000.tar",), count=1),
    archive(
        "a pickle beside the image",
        {"000.jpg": JPG, "000.txt": TXT, "000.pyd": b"cos\nsystem\n(S'touch executed'\ntR."},
        count=1,
    ),
    archive("a picture that is none", {"000.jpg": b"x", "000.txt": TXT}, ("00000.tar|000",)),
    archive("no caption", {"000.jpg": JPG}, ("00000.tar|000",)),
    archive("cut off", b"x" * 700, ("00000.tar",)),
    archive("a caption that is not UTF-8", {"000.jpg": JPG, "000.txt": b"\xff"}, ("00000.tar|000",)),
]

CASES = [*TABLES, *EMBEDDINGS, *ARCHIVES]
