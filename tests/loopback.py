"""Pictures, and a web server on loopback with good and bad ones."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Smooth random colours: no two seeds look alike to a perceptual hash."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def endless(scans: int) -> bytes:
    """A progressive JPEG that has its last scan again and again: 14 bytes each, and a pass over all of its pixels."""
    jpeg = encoded(Image.new("L", (2000, 2000), 90), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * scans + jpeg[-2:]


@dataclass
class Web:
    """The server: its address, the paths it was asked for, and what it answers."""

    address: str
    asked: list[str] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Path -> what it answers instead, with these headers: once, or always if it is in `always` or without headers."""
    always: set[str] = field(default_factory=set)
    pages: dict[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def serve() -> Iterator[Web]:
    """Serve /image/<seed>.png, and under other paths what goes wrong on the web."""
    site = Web("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            if self.path.startswith("/slow/"):
                time.sleep(0.4)
            if self.path in site.statuses:
                status, headers = site.statuses[self.path]
                if headers and self.path not in site.always:
                    del site.statuses[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
            elif self.path in site.pages:
                self.answer(site.pages[self.path])
            elif self.path in site.redirects:
                self.send_response(302)
                self.send_header("Location", site.redirects[self.path])
                self.end_headers()
            elif self.path.startswith("/image/"):
                self.answer(encoded(picture(int(Path(self.path).stem.rpartition("%20")[2]))))
            elif self.path == "/short":  # fewer bytes than it says
                data = encoded(picture(1001))
                self.answer(data[: len(data) // 2], length=len(data))
            elif self.path == "/truncated":  # as many bytes as it says, but half an image
                data = encoded(picture(1002), "JPEG", quality=95)
                self.answer(data[: len(data) // 2])
            elif self.path == "/drip":
                self.send_response(200)
                self.end_headers()
                for byte in encoded(picture(1003)):
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.2)
            elif self.path == "/page":
                self.answer(b"<html>gone</html>")
            elif self.path == "/large":
                self.answer(bytes(400_000))
            elif self.path == "/tiny":
                self.answer(encoded(picture(1004, (4, 4))))
            elif self.path == "/turned":
                exif = Image.Exif()
                exif[0x0112] = 6
                self.answer(encoded(Image.new("RGB", (40, 40), "red"), "JPEG", exif=exif))
            else:
                self.send_error(404)

        def answer(self, data: bytes, length: int | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(length or len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients that hang up are the point here

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    server.server_close()
