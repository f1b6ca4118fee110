from __future__ import annotations

import contextlib
import email.utils
import socket
import threading
import time
import urllib.error

import pytest
from loopback import Web

from retrieval.addresses import Rules, ascii_url, checked_opener, is_allowed, refusals


@pytest.mark.parametrize(
    ("address", "public", "local"),
    [
        ("93.184.215.14", True, True),
        ("2606:4700::1111", True, True),
        ("127.0.0.1", False, True),
        ("::1", False, True),
        ("10.1.2.3", False, True),
        ("192.168.0.9", False, True),
        ("fd00::1", False, True),
        ("::ffff:10.0.0.1", False, True),
        ("64:ff9b::7f00:1", False, True),
        ("64:ff9b::5db8:d70e", True, True),
        ("2002:7f00:1::", False, True),
        ("169.254.169.254", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("fe80::1", False, False),
        ("0.0.0.0", False, False),
        ("224.0.0.1", False, False),
        ("100.64.0.1", False, False),
        ("255.255.255.255", False, False),
        ("192.0.0.192", False, False),
        ("168.63.129.16", False, False),
        ("::ffff:168.63.129.16", False, False),
        ("64:ff9b::a83f:8110", False, False),
        ("100.100.100.200", False, False),
        ("fd00:ec2::254", False, False),
        ("fd00:ec2::23", False, False),
        ("fd20:ce::254", False, False),
        ("64:ff9b:1::a9fe:a9fe", False, False),
    ],
)
def test_addresses(address: str, public: bool, local: bool) -> None:
    assert is_allowed(address, local=False) == public
    assert is_allowed(address, local=True) == local


@pytest.mark.parametrize(
    ("url", "status", "reason"),
    [
        ("file:///etc/passwd", "refused", "only http and https"),
        ("ftp://93.184.215.14/a", "refused", "only http and https"),
        ("images/1.jpg", "refused", "only http and https are asked, not 'a relative address'"),
        ("http://user:word@93.184.215.14/", "refused", "user name"),
        ("http:///a", "refused", "no host"),
        ("http://93.184.215.14:99999/", "refused", "Port out of range"),
        ("http://127.0.0.1/", "refused", "not a public one"),
        ("http://0x7f.1/", "refused", "not a public one"),
        ("http://2130706433/", "refused", "not a public one"),
        ("http://[::ffff:127.0.0.1]/", "refused", "not a public one"),
        ("http://localhost:8265/api", "refused", "not a public one"),
        ("http://169.254.169.254/latest/meta-data", "refused", "not a public one"),
        ("http://" + "a" * 70 + ".com/", "unresolved", "does not resolve"),
    ],
)
def test_refused_before_any_request(url: str, status: str, reason: str) -> None:
    (verdict,) = refusals([url], local=False, timeout=20)
    assert verdict is not None
    assert verdict[0] == status and reason in verdict[1]


def test_public_addresses_pass() -> None:
    assert refusals(["https://93.184.215.14/a.jpg", "http://[2606:4700::1111]/"], local=False, timeout=20) == [
        None,
        None,
    ]


def answer(addresses: list[str]):
    return lambda host, port, *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]


def test_one_private_address_among_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", answer(["93.184.215.14", "10.0.0.1"]))
    assert refusals(["http://both.example/"], local=False, timeout=20)[0][0] == "refused"


def test_resolving_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1))
    start = time.monotonic()
    assert refusals(["http://slow.example/"], local=False, timeout=0.1) == [("unresolved", "no answer within 0.1 s")]
    assert time.monotonic() - start < 0.9


def test_the_opener_checks_what_it_connects_to(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that was public when it was judged and is loopback when it is asked."""
    port = int(web.address.rpartition(":")[2])
    opener = checked_opener(Rules(local=False, max_bytes=1000))
    monkeypatch.setattr(socket, "getaddrinfo", answer(["127.0.0.1"]))
    with pytest.raises(urllib.error.URLError, match=r"changing\.example has the address 127\.0\.0\.1"):
        opener.open(f"http://changing.example:{port}/image/1.png", timeout=2)
    assert web.asked == []


def test_redirects_elsewhere_are_not_followed(web: Web) -> None:
    opener = checked_opener(Rules(local=True, max_bytes=100_000))
    web.redirects = {"/meta": "http://169.254.169.254/", "/file": "file:///etc/passwd", "/good": "/image/1.png"}
    web.redirects |= {f"/{n}": f"/{n + 1}" for n in range(9)}
    with pytest.raises(urllib.error.URLError, match=r"169\.254\.169\.254, which is not a public one"):
        opener.open(f"{web.address}/meta", timeout=2)
    with pytest.raises(urllib.error.HTTPError, match="not allowed"):
        opener.open(f"{web.address}/file", timeout=2)
    with pytest.raises(urllib.error.HTTPError, match="infinite loop"):
        opener.open(f"{web.address}/0", timeout=2)
    assert opener.open(f"{web.address}/good", timeout=2).read().startswith(b"\x89PNG")


def test_all_addresses_share_one_time(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(web.address.rpartition(":")[2])
    connect, tried = socket.create_connection, []

    def slow(address, timeout, source_address):
        tried.append(timeout)
        if len(tried) < 9:
            time.sleep(min(timeout, 0.2))
            raise TimeoutError("timed out")
        return connect(address, timeout, source_address)

    monkeypatch.setattr(socket, "getaddrinfo", answer(["127.0.0.1"] * 8))
    monkeypatch.setattr(socket, "create_connection", slow)
    start = time.monotonic()
    with pytest.raises(urllib.error.URLError, match="not there in time"):
        checked_opener(Rules(local=True, max_bytes=1000)).open(f"http://many.example:{port}/image/1.png", timeout=0.5)
    assert time.monotonic() - start < 1.5
    assert tried == sorted(tried, reverse=True) and len(tried) == 3


def test_redirects_share_one_time(web: Web) -> None:
    web.redirects = {"/slow/1": "/slow/2", "/slow/2": "/slow/3", "/slow/3": "/image/1.png"}
    opener = checked_opener(Rules(local=True, max_bytes=100_000))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="not there in time"):
        opener.open(f"{web.address}/slow/1", timeout=1)
    assert time.monotonic() - start < 2
    assert opener.open(f"{web.address}/slow/3", timeout=5).read().startswith(b"\x89PNG")


@pytest.mark.parametrize("secure", [False, True])
def test_headers_and_handshakes_that_trickle(secure: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as client:
                # a TLS record, or a header, that never ends
                client.sendall(b"\x16\x03\x03\x40\x00" if secure else b"HTTP/1.1 200 OK\r\nX: ")
                while True:
                    client.sendall(b"a")
                    time.sleep(0.05)

        threading.Thread(target=trickle, daemon=True).start()
        url = f"http{'s' * secure}://127.0.0.1:{server.getsockname()[1]}/"
        start = time.monotonic()
        with pytest.raises(OSError):
            checked_opener(Rules(local=True, max_bytes=1000)).open(url, timeout=0.5)
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("status", [429, 503])
def test_asked_again_when_the_server_says(web: Web, status: int) -> None:
    opener = checked_opener(Rules(local=True, max_bytes=100_000))
    soon = email.utils.formatdate(time.time() - 5, usegmt=True)
    for after in ("1", soon):
        web.statuses = {"/image/1.png": (status, {"Retry-After": after})}
        start = time.monotonic()
        assert opener.open(f"{web.address}/image/1.png", timeout=0.9).read().startswith(b"\x89PNG")
        assert time.monotonic() - start >= (1 if after == "1" else 0)
    for after in ("3600", "soon", "-1", "1e9", ""):
        web.statuses = {"/image/1.png": (status, {"Retry-After": after})}
        asked = len(web.asked)
        with pytest.raises(urllib.error.HTTPError, match=f"Error {status}"):
            opener.open(f"{web.address}/image/1.png", timeout=2)
        assert len(web.asked) == asked + 1
    web.statuses = {"/never": (status, {})}
    with pytest.raises(urllib.error.HTTPError, match=f"Error {status}"):
        opener.open(f"{web.address}/never", timeout=2)


def test_not_asked_again_for_ever(web: Web) -> None:
    web.redirects = {f"/{n}": f"/busy/{n}" for n in range(9)}
    web.statuses = {f"/busy/{n}": (429, {"Retry-After": "0"}) for n in range(9)}
    opener = checked_opener(Rules(local=True, max_bytes=100_000))
    web.always = {"/busy/1"}
    with pytest.raises(urllib.error.HTTPError, match="Error 429"):
        opener.open(f"{web.address}/1", timeout=2)
    assert web.asked == ["/1", "/busy/1", "/busy/1", "/busy/1"]


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://a.example/one cat.jpg?q=a cat#top", "http://a.example/one%20cat.jpg?q=a%20cat#top"),
        (" http://a.example/katze.jpg\n", "http://a.example/katze.jpg"),
        ("http://a.example/Kätzchen/猫.jpg?größe=1", "http://a.example/K%C3%A4tzchen/%E7%8C%AB.jpg?gr%C3%B6%C3%9Fe=1"),
        ("http://bücher.example:80/a", "http://xn--bcher-kva.example:80/a"),
        ("http://例え.jp/a", "http://xn--r8jz45g.jp/a"),
        ("http://a.example/100%/50%25/%E7%8C%AB", "http://a.example/100%25/50%25/%E7%8C%AB"),
        ('http://a.example/a|b{c}"<d>', "http://a.example/a%7Cb%7Bc%7D%22%3Cd%3E"),
        ("http://a.example/x?sig=a%2Fb%3D&t=(1)*[2]~!$'+;,:@", "http://a.example/x?sig=a%2Fb%3D&t=(1)*[2]~!$'+;,:@"),
        ("http://[2606:4700::1111]:80/ü", "http://[2606:4700::1111]:80/%C3%BC"),
    ],
)
def test_urls_as_they_are_sent(url: str, sent: str) -> None:
    assert ascii_url(url) == sent == ascii_url(sent)
    assert ascii_url(url).isascii()


def test_bytes_and_time_are_bounded(web: Web) -> None:
    opener = checked_opener(Rules(local=True, max_bytes=100_000))
    with opener.open(f"{web.address}/large", timeout=2) as response, pytest.raises(OSError, match="more than 100000"):
        response.read()
    start = time.monotonic()
    with opener.open(f"{web.address}/drip", timeout=0.5) as response, pytest.raises(TimeoutError):
        response.read()
    assert time.monotonic() - start < 5
    with opener.open(f"{web.address}/short", timeout=2) as response, pytest.raises(Exception, match="IncompleteRead"):
        response.read()
