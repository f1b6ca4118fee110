"""The preference study: its folder, its answers' file, and requests to its page, over loopback."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from hostile.case import Case, Check, Seen, accepted, polyconcept, words, write
from hostile.common import encoded, picture
from hostile.images import EPS, large_png


def study(methods: tuple[str, ...] = ("first", "second")) -> None:
    rows = []
    for concept in ("cat", "pot"):
        write(**{f"study/concepts/{concept}/1.jpg": encoded(picture(1), "JPEG")})
        for number, method in enumerate(methods):
            image = f"{method}/{concept}.png"
            write(**{f"study/{image}": encoded(picture(10 + number))})
            rows.append({"method": method, "concept": concept, "prompt": "a cat", "seed": 0, "image": image})
    pd.DataFrame(rows).to_parquet("study/images.parquet")


def changed(**values: Any) -> Callable[[], None]:
    """The first row, with other values."""

    def spoil() -> None:
        table = pd.read_parquet("study/images.parquet").astype(object)
        for column, value in values.items():
            table.at[0, column] = value
        table.to_csv("study/images.csv", index=False)
        os.unlink("study/images.parquet")

    return spoil


def folder(
    name: str, spoil: Callable[[], Any], refused: str | tuple[str, ...] = (), right: Check | None = None
) -> Case:
    def give():
        study()
        spoil()

        def loaded():
            from pipeline.evaluation.preference import load_study, open_answers

            found = load_study(Path("study"))
            open_answers(Path("study/answers.sqlite"), found).close()
            return found

        return loaded

    return Case(f"study: {name}", give, words(refused), right, writes=("study/answers",) if right else None)


def _database(script: str) -> Callable[[], None]:
    def spoil() -> None:
        connection = sqlite3.connect("study/answers.sqlite")
        connection.executescript(script)
        connection.close()

    return spoil


IMAGE = "study/first/cat.png"
FOLDERS = [
    folder("an ordinary one", lambda: None, right=accepted),
    folder("no table", lambda: os.unlink("study/images.parquet"), "images.parquet"),
    folder("a table that is text", lambda: write(**{"study/images.parquet": "x"}), "images.parquet"),
    folder(
        "a table that is a FIFO",
        lambda: (os.unlink("study/images.parquet"), os.mkfifo("study/images.parquet")),
        "images.parquet",
    ),
    folder(
        "a table without rows",
        lambda: pd.read_parquet("study/images.parquet")[:0].to_parquet("study/images.parquet"),
        "images.parquet",
    ),
    folder(
        "a column missing",
        lambda: pd.read_parquet("study/images.parquet").drop(columns="seed").to_parquet("study/images.parquet"),
        ("images.parquet", "seed"),
    ),
    folder("a seed that is a word", changed(seed="x"), ("images.csv", "seed|x")),
    folder("a seed of 2^70", changed(seed=2**70), ("images.csv", "seed|int")),
    folder("a seed of 1.5", changed(seed=1.5), ("images.csv", "seed|1.5|int")),
    folder("an empty prompt", changed(prompt=None), "images.csv"),
    folder(
        "a table of lists",
        lambda: pd.read_parquet("study/images.parquet").assign(prompt=[["a"]] * 4).to_parquet("study/images.parquet"),
        ("images.parquet", "prompt"),
    ),
    folder(
        "an image outside",
        lambda: (write(**{"secret.png": encoded(picture(1))}), changed(image="../secret.png")()),
        "secret.png",
    ),
    folder("an absolute image", changed(image="/etc/hostname"), "/etc/hostname"),
    folder(
        "a link to an image outside",
        lambda: (write(**{"secret.png": encoded(picture(1))}), os.unlink(IMAGE), os.symlink("../../secret.png", IMAGE)),
        "cat.png",
    ),
    folder("a concept that leads out", changed(concept="../../x"), "x"),
    folder("an image that is gone", changed(image="gone.png"), "gone.png"),
    folder("an image that is EPS", lambda: write(**{IMAGE: EPS}), "cat.png"),
    folder("a real image that is EPS", lambda: write(**{"study/concepts/cat/1.jpg": EPS}), "1.jpg"),
    folder("an image that is half there", lambda: os.truncate(IMAGE, 200), "cat.png"),
    folder("an image of 81 megapixels", lambda: write(**{IMAGE: large_png(9000, 9000)}), "cat.png"),
    folder("an image that is a FIFO", lambda: (os.unlink(IMAGE), os.mkfifo(IMAGE)), "cat.png"),
    folder("no real images", lambda: os.unlink("study/concepts/cat/1.jpg"), "cat"),
    folder("one method", lambda: study(("first",)), "images.parquet"),
    folder("answers that are text", lambda: write(**{"study/answers.sqlite": "x" * 100}), "answers.sqlite"),
    folder("answers of another program", _database("CREATE TABLE other (a);"), "answers.sqlite"),
    folder(
        "answers about other images",
        _database("CREATE TABLE study (digest TEXT); INSERT INTO study VALUES ('x');"),
        "answers.sqlite",
    ),
    folder("answers that are a folder", lambda: os.mkdir("study/answers.sqlite"), "answers.sqlite"),
]


def asked(
    name: str,
    *requests: str | bytes,
    status: str,
    options: tuple[str, ...] = (),
    check: Callable[[list[bytes]], object] = lambda _: True,
) -> Case:
    """Requests to the page, one after another; `HOST` and `ROOT` stand for its name and the beginning of its addresses.
    status: what the last answer's status has to be, as a pattern; `dropped` where it hangs up."""

    def give():
        study()
        return lambda: answers(requests, options)

    def right(seen: Seen) -> bool:
        last = seen.result[-1].partition(b"\r\n")[0].decode("latin-1")
        code = last.split(" ")[1] if last.startswith("HTTP/") else "dropped"
        return re.fullmatch(status, code) is not None and bool(check(seen.result))

    return Case(f"asked: {name}", give, right=right, writes=("study/answers",), seconds=30)


def answers(requests: tuple[str | bytes, ...], options: tuple[str, ...]) -> list[bytes]:
    """Serve the study in a process of its own and ask it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reading, writing = os.pipe()
    server = os.fork()
    if server == 0:
        os.dup2(writing, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its log of broken requests; what they are answered counts
        try:
            polyconcept("preference", "serve", "study", "--port", str(port), *options)
        finally:
            os._exit(0)
    try:
        told = b""
        until = time.monotonic() + 15
        while b"http://" not in told and time.monotonic() < until:
            told += os.read(reading, 4096)
        root = re.search(rf"http://[^/\s]+:{port}([^\s]*)", told.decode())
        begin = root[1].rstrip("/") if root else ""
        return [_ask(port, request, begin) for request in requests]
    finally:
        os.kill(server, 9)
        os.waitpid(server, 0)


def _ask(port: int, request: str | bytes, root: str) -> bytes:
    for _ in range(100):
        try:
            connection = socket.create_connection(("127.0.0.1", port), 5)
            break
        except OSError:
            time.sleep(0.1)
    raw = request.encode() if isinstance(request, str) else request
    raw = raw.replace(b"HOST", f"127.0.0.1:{port}".encode()).replace(b"ROOT", root.encode())
    answer = b""
    with connection:
        connection.sendall(raw)
        try:
            while part := connection.recv(65536):
                answer += part
        except OSError:
            pass
    return answer


def get(path: str = "/", host: str = "HOST", *headers: str) -> str:
    return "\r\n".join([f"GET ROOT{path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""])


def post(path: str, body: str | bytes, kind: str = "application/x-www-form-urlencoded", *headers: str) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    lines = [
        f"POST ROOT{path} HTTP/1.1",
        "Host: HOST",
        "Connection: close",
        f"Content-Type: {kind}",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def _raters(_: list[bytes]) -> bool:
    """Whether requests without a cookie left nothing, or next to nothing."""
    connection = sqlite3.connect("study/answers.sqlite")
    return connection.execute("SELECT count(*) FROM raters").fetchone()[0] <= 1


REFUSED = "4\\d\\d"
REQUESTS = [
    asked("the page", get(), status="200"),
    asked("by another name, as by DNS rebinding", get(host="evil.example"), status=REFUSED),
    asked("by another name with a port", get(host="evil.example:8000"), status=REFUSED),
    asked("by the name localhost", get(host="localhost"), status="200"),
    asked("without a name", "GET ROOT/ HTTP/1.1\r\nConnection: close\r\n\r\n", status=REFUSED),
    asked("by an empty name", get(host=""), status=REFUSED),
    asked("by a name of 5 000 letters", get(host="a" * 5000), status=REFUSED),
    asked(
        "open to all, without its token",
        "GET / HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
        status=REFUSED,
        options=("--host", "0.0.0.0"),
    ),
    asked("open to all, as it says", get(), status="200", options=("--host", "0.0.0.0")),
    asked("number=0", get("/?number=0"), status="200|4\\d\\d"),
    asked("number of 5 000 digits", get("/?number=" + "9" * 5000), status="200|4\\d\\d"),
    asked("number=٣", get("/?number=%D9%A3"), status="200|4\\d\\d"),
    asked("number=²", get("/?number=%C2%B2"), status="200|4\\d\\d"),
    asked("number=-1", get("/?number=-1"), status="200|4\\d\\d"),
    asked("number that is not UTF-8", get("/?number=%FF"), status="200|4\\d\\d"),
    asked("a picture of nobody", get("/image/x/left"), status=REFUSED),
    asked("a picture that leads out", get("/image/..%2f..%2fetc%2fpasswd/left"), status=REFUSED),
    asked("a real picture by an Arabic number", get("/real/x/%D9%A3"), status=REFUSED),
    asked("a cookie of odd letters", get("/", "HOST", "Cookie: rater=\x01\x02"), status="200|4\\d\\d"),
    asked(
        "a cookie that is not UTF-8",
        get().encode().replace(b"Connection", b"Cookie: rater=\xff\xfe\r\nConnection"),
        status="200|4\\d\\d",
    ),
    asked("a cookie with a surrogate", get("/", "HOST", 'Cookie: rater="\\355\\240\\200"'), status="200|4\\d\\d"),
    asked("a cookie of 7 000 letters", get("/", "HOST", "Cookie: rater=" + "a" * 7000), status="200|4\\d\\d"),
    asked("an answer without a cookie", post("/answer", "view=x&question=text&side=left"), status=REFUSED),
    asked("an empty answer", post("/answer", ""), status=REFUSED),
    asked("an answer that is JSON", post("/answer", "{}", "application/json"), status=REFUSED),
    asked("an answer in parts without a border", post("/answer", "x", "multipart/form-data"), status=REFUSED),
    asked(
        "an answer in parts that are cut off",
        post("/answer", "--x\r\nContent-Disposition: form-data", "multipart/form-data; boundary=x"),
        status=REFUSED,
    ),
    asked(
        "an answer with a file as side",
        post(
            "/answer",
            '--x\r\nContent-Disposition: form-data; name="side"; filename="a"\r\n\r\nleft\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
        ),
        status=REFUSED,
    ),
    asked(
        "an answer in an unknown character set",
        post("/answer", "view=x", "application/x-www-form-urlencoded; charset=nothing"),
        status=REFUSED,
    ),
    asked("an answer that is not UTF-8", post("/answer", b"view=%FF&side=\xff"), status=REFUSED),
    asked("an answer of 5 MB", post("/answer", "view=" + "x" * 5_000_000), status=REFUSED + "|dropped"),
    asked(
        "an answer with 100 000 fields", post("/answer", "&".join(f"a{i}=1" for i in range(100_000))), status=REFUSED
    ),
    asked(
        "an answer packed in a way that is unknown",
        post("/answer", "x", "application/x-www-form-urlencoded", "Content-Encoding: nothing"),
        status=REFUSED,
    ),
    asked(
        "an answer packed wrongly",
        post("/answer", "x", "application/x-www-form-urlencoded", "Content-Encoding: gzip"),
        status=REFUSED,
    ),
    asked("a method that is unknown", get().replace("GET", "FROB", 1), status=REFUSED),
    asked("what is not HTTP", "hello\r\n\r\n", status=REFUSED + "|dropped"),
    asked("a hundred times without a cookie", *[get()] * 100, status="200", check=_raters),
]


def report(name: str, make: Callable[[], Any], refused: str | tuple[str, ...], right: Check | None = None) -> Case:
    return Case(
        f"report: {name}",
        lambda: (make(), lambda: polyconcept("preference", "report", "a.sqlite"))[1],
        words(refused),
        right,
    )


REPORTS = [
    report("nothing there", lambda: None, "a.sqlite"),
    report("text", lambda: write(**{"a.sqlite": "x" * 100}), "a.sqlite"),
    report("empty", lambda: write(**{"a.sqlite": b""}), "a.sqlite"),
    report(
        "another database",
        lambda: sqlite3.connect("a.sqlite").executescript("CREATE TABLE answers (a); INSERT INTO answers VALUES (1);"),
        "a.sqlite",
    ),
    report("an empty folder", lambda: os.mkdir("a.sqlite"), "a.sqlite"),
    report("a FIFO", lambda: os.mkfifo("a.sqlite"), "a.sqlite"),
]

CASES = [*FOLDERS, *REQUESTS, *REPORTS]
