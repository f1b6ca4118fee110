from __future__ import annotations

import socket
import time
import urllib.error

import pytest
from loopback import Web

from retrieval.addresses import Rules, checked_opener, is_allowed, refusals


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
