"""Addresses in a corpus, and what servers answer: over loopback, in one download whose every candidate is a case."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hostile.case import Case, accepted, words
from hostile.common import encoded, picture, png, shared
from hostile.images import EPS, SVG, large_png

TIMEOUT = 3.0


def address(url: str, *, local: bool = False, right: bool = False, refused: str = "") -> Case:
    """An address before anything is asked. local: the corpus is one's own."""

    def asked() -> None:
        from retrieval.addresses import refusals

        if verdict := refusals([url], local=local, timeout=TIMEOUT)[0]:
            raise ValueError(" ".join(verdict))

    own = ", of one's own" if local else ""
    return Case(
        f"address {url!r}{own}",
        lambda: asked,
        () if right else words(refused or "refused|unresolved"),
        accepted if right else None,
    )


ADDRESSES = [
    *(
        address(f"http://{host}/a.png", refused="refused")
        for host in (
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "localhost",
            "0.0.0.0",
            "0",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "192.0.0.192",
            "168.63.129.16",
            "100.100.100.200",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:169.254.169.254]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[fe80::1]",
            "[fd00:ec2::254]",
            "[fc00::1]",
            "[::ffff:10.0.0.1]",
            "198.18.0.1",
            "240.0.0.1",
        )
    ),
    *(
        address(f"http://{host}/a.png", local=True, refused="refused")
        for host in (
            "169.254.169.254",
            "192.0.0.192",
            "168.63.129.16",
            "[fd00:ec2::254]",
            "[::ffff:169.254.169.254]",
            "[64:ff9b::a9fe:a9fe]",
            "224.0.0.1",
            "0.0.0.0",
        )
    ),
    *(
        address(url, local=True)
        for url in (
            "",
            "a.png",
            "/a.png",
            "//127.0.0.1/a.png",
            "ftp://127.0.0.1/a.png",
            "file:///etc/passwd",
            "FILE:///etc/passwd",
            "gopher://127.0.0.1/",
            "data:image/png;base64,AAAA",
            "javascript:alert(1)",
            "http://",
            "http:///a.png",
            "http://127.0.0.1:99999/a.png",
            "http://127.0.0.1:x/a.png",
            "http://[::1",
            "http://me:SECRET@127.0.0.1/a.png",
            "http://127.0.0.1./a.png",
            "http://me@127.0.0.1/a.png",
            "http://" + "a" * 300 + ".com/",
            "http://a..b/",
            "http://example.invalid/a.png",
            "http://%31%32%37.0.0.1/",
            "http:\\\\127.0.0.1\\a.png",
            "jar:http://127.0.0.1!/a.png",
        )
    ),
    address("http://127.0.0.1/a.png", local=True, right=True),
    address("HTTP://127.0.0.1/a.png", local=True, right=True),
    address("http://192.168.1.1/a.png", local=True, right=True),
    address("http://93.184.216.34/a.png", right=True),
    address("http://93.184.216.34/a b.png", right=True),
    address("http://93.184.216.34/ä.png", right=True),
]


def answer(body: bytes, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    own = {"Content-Length": str(len(body) if length is None else length)} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    lines = [
        f"HTTP/1.1 {status}",
        *(f"{key}: {value}" for key, value in own.items() if value),
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return answer(b"", status, Location=to)


JPEG = encoded(picture(7), "JPEG", quality=95)
BUSY: dict[str, int] = {}


def busy(path: str, status: str, after: str, seed: int) -> bytes:
    """Once too busy, then an image."""
    BUSY[path] = BUSY.get(path, 0) + 1
    return answer(b"", status, Retry_After=after) if BUSY[path] == 1 else answer(encoded(picture(seed)))


SERVED: dict[str, tuple[Callable[[], bytes], str]] = {
    "/plain.png": (lambda: answer(encoded(picture(101))), "success"),
    "/with%20space.png": (lambda: answer(encoded(picture(102))), "success"),
    "/with a space.png": (lambda: answer(encoded(picture(103))), "success"),
    "/käse.png": (lambda: answer(encoded(picture(104))), "success"),
    "/猫.png": (lambda: answer(encoded(picture(105))), "success"),
    "/query.png?a=b c&d=ä": (lambda: answer(encoded(picture(106))), "success"),
    "/fragment.png#part": (lambda: answer(encoded(picture(107))), "success"),
    "/bracket[1].png": (lambda: answer(encoded(picture(108))), "success"),
    '/quote".png': (lambda: answer(encoded(picture(109))), "success"),
    "/no-length.png": (lambda: answer(encoded(picture(110)), Content_Length=""), "success"),
    "/wrong-type.png": (lambda: answer(encoded(picture(111)), Content_Type="text/html"), "success"),
    "/moved.png": (lambda: redirect("/there.png", "301 Moved"), "success"),
    "/there.png": (lambda: answer(encoded(picture(112))), "success|duplicate"),
    "/moved-far.png": (lambda: redirect("/moved-far.png?again"), "failed"),
    "/too-many-requests.png": (lambda: busy("a", "429 Too Many Requests", "1", 113), "success"),
    "/busy.png": (lambda: busy("b", "503 Service Unavailable", "1", 114), "success"),
    "/busy-for-an-hour.png": (lambda: answer(b"", "429 Too Many Requests", Retry_After="3600"), "failed"),
    "/busy-forever.png": (lambda: answer(b"", "429 Too Many Requests", Retry_After="-1"), "failed"),
    "/busy-who-knows.png": (lambda: answer(b"", "429 Too Many Requests", Retry_After="soon"), "failed"),
    "/turned.jpg": (lambda: answer(encoded(picture(115, (80, 100)), "JPEG")), "success"),
    "/cmyk.jpg": (lambda: answer(encoded(picture(116).convert("CMYK"), "JPEG")), "success"),
    "/webp.png": (lambda: answer(encoded(picture(117), "WEBP")), "success"),
    "/404.png": (lambda: answer(b"gone", "404 Not Found"), "failed"),
    "/403.png": (lambda: answer(encoded(picture(118)), "403 Forbidden"), "failed"),
    "/500.png": (lambda: answer(b"", "500 Oops"), "failed"),
    "/204.png": (lambda: answer(b"", "204 No Content"), "failed"),
    "/304.png": (lambda: answer(b"", "304 Not Modified"), "failed"),
    "/999.png": (lambda: answer(b"", "999 No"), "failed"),
    "/page.png": (lambda: answer(b"<html>hello</html>"), "failed"),
    "/empty.png": (lambda: answer(b""), "failed"),
    "/short.png": (lambda: answer(encoded(picture(119))[:400], length=9000), "failed"),
    "/half.jpg": (lambda: answer(JPEG[: len(JPEG) // 2]), "failed"),
    "/negative-length.png": (lambda: answer(encoded(picture(120)), length=-5), "failed|success"),
    "/length-is-a-word.png": (lambda: answer(encoded(picture(121)), Content_Length="many"), "failed|success"),
    "/huge-length.png": (lambda: answer(b"x", length=10**15), "failed"),
    "/not-http.png": (lambda: b"hello\r\n\r\n", "failed"),
    "/nothing.png": (lambda: b"", "failed"),
    "/many-headers.png": (lambda: answer(encoded(picture(122)), **{f"X_{i}": "x" for i in range(500)}), "failed"),
    "/long-header.png": (lambda: answer(encoded(picture(123)), X="x" * 100_000), "failed"),
    "/to-a-file.png": (lambda: redirect("file:///etc/passwd"), "failed"),
    "/to-ftp.png": (lambda: redirect("ftp://127.0.0.1/x"), "failed"),
    "/to-metadata.png": (lambda: redirect("http://169.254.169.254/latest/meta-data/"), "failed"),
    "/to-nowhere.png": (lambda: redirect(""), "failed"),
    "/to-a-word.png": (lambda: redirect("http://[oops/"), "failed"),
    "/to-a-user.png": (lambda: redirect("http://me:pw@169.254.169.254/"), "failed"),
    "/no-location.png": (lambda: answer(b"", "302 Found"), "failed"),
    "/noai.png": (lambda: answer(encoded(picture(124)), X_Robots_Tag="noai"), "failed"),
    "/packed.png": (lambda: answer(b"\x1f\x8b" + bytes(200), Content_Encoding="gzip"), "failed"),
    "/eps.png": (lambda: answer(EPS), "failed"),
    "/svg.png": (lambda: answer(SVG), "failed"),
    "/tiny.png": (lambda: answer(png(size=(4, 4))), "failed"),
    "/81-megapixels.png": (lambda: answer(large_png(9000, 9000)), "failed"),
    "/exif.jpg": (lambda: answer(JPEG[:2] + b"\xff\xe1\x00\x10Exif\0\0" + b"\xff" * 8 + JPEG[2:]), "success|failed"),
    "/drip.png": (lambda: b"drip", "failed"),
    "/endless.png": (lambda: b"endless", "failed"),
    "/silent.png": (lambda: b"silent", "failed"),
    "/pinned.png": (lambda: answer(encoded(picture(125))), "success"),
    "/pinned-in-capitals.png": (lambda: answer(encoded(picture(126))), "success"),
    "/pinned-to-another.png": (lambda: answer(encoded(picture(127))), "hash_mismatch"),
    "/pinned-to-nothing.png": (lambda: answer(encoded(picture(128))), "success"),
    "/blocked.png": (lambda: answer(encoded(picture(129))), "blocked"),
    "/same-as-the-first.png": (lambda: answer(encoded(picture(101))), "duplicate"),
    "/same-as-the-first-scaled.png": (lambda: answer(encoded(picture(101).resize((192, 160)))), "duplicate"),
}
"""Path -> what the server answers, and the candidate's status; `failed` for failed_to_… and refused."""

PINS = {"/pinned.png": 125, "/pinned-in-capitals.png": 126, "/pinned-to-another.png": 1, "/blocked.png": 129}


def _sum(seed: int) -> str:
    return hashlib.sha256(encoded(picture(seed))).hexdigest()


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        from urllib.parse import unquote, urlsplit

        with contextlib.suppress(OSError):
            parts = self.rfile.readline(65536).decode("latin-1").split(" ")
            while self.rfile.readline(65536).strip():
                pass
            path = urlsplit(parts[1]).path if len(parts) > 1 else ""
            known = {unquote(urlsplit(p.replace('"', "%22")).path): p for p in SERVED}
            made = SERVED[known[unquote(path)]][0]() if unquote(path) in known else answer(b"", "404 Not Found")
            if made == b"drip":
                self.wfile.write(answer(b"", Content_Length=""))
                for _ in range(600):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            elif made == b"endless":
                self.wfile.write(answer(b"", Content_Length=""))
                while True:
                    self.wfile.write(bytes(65536))
            elif made == b"silent":
                time.sleep(60)
            else:
                self.wfile.write(made)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True

    def handle_error(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving():
    server = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def prepare() -> None:
    """Download all, once, in a process of its own; the cases look at what became of each."""
    place = shared() / "web"
    place.mkdir()
    process = os.fork()
    if process == 0:
        with open(place / "log", "wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            _download(place / "set")
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(0)
    os.waitpid(process, 0)


def _download(out: Path) -> None:
    from retrieval.download import download

    with serving() as site:
        pins = {path: _sum(seed) for path, seed in PINS.items()}
        pins["/pinned-in-capitals.png"] = pins["/pinned-in-capitals.png"].upper()
        pins["/pinned-to-nothing.png"] = ""
        candidates = pa.table(
            {
                "url": [site + path for path in SERVED],
                "caption": [f"caption {i}" for i in range(len(SERVED))],
                "similarity": pa.array([1.0] * len(SERVED), pa.float32()),
                "sha256": pa.array([pins.get(path) for path in SERVED], pa.string()),
            }
        )
        download(
            candidates, out, count=len(SERVED), image_size=64, local=True, timeout=TIMEOUT, blocked_sha256=[_sum(129)]
        )


def served(path: str) -> Case:
    expected = SERVED[path][1].split("|")

    def status() -> tuple[str, str]:
        file = shared() / "web/set/samples.parquet"
        if not file.exists():
            raise RuntimeError((shared() / "web/log").read_text()[-2000:])
        rows = pq.read_table(file).to_pylist()
        (row,) = [row for row in rows if row["url"].partition("/")[2].partition("/")[2].partition("/")[2] == path[1:]]
        if row["status"].startswith(("failed", "refused", "unresolved")):
            raise ValueError(f"{row['status']}: {row['reason']}")
        return row["status"], row["reason"] or ""

    refused = ("failed|refused",) if "failed" in expected else ()
    others = [e for e in expected if e != "failed"]
    return Case(f"served {path}", lambda: status, refused, (lambda s: s.result[0] in others) if others else None)


CASES = [*ADDRESSES, *map(served, SERVED)]
