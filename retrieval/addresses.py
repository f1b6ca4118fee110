"""Which web addresses may be asked, and an opener that asks no others.

A caption corpus is written by strangers, and its urls are fetched from inside somebody's network. So a url is judged
twice: before any request (`refusals`), and again at the moment of each connection (`checked_opener`), which also covers
redirects and names that resolve differently the second time.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from urllib.parse import urlsplit

NAT64 = ipaddress.ip_network("64:ff9b::/96")
MAX_REDIRECTS = 3
RESOLVER_THREADS = 32


@dataclass(frozen=True)
class Rules:
    """What a download may reach and take."""

    local: bool
    """Whether loopback and private addresses are allowed beside public ones."""
    max_bytes: int
    """Bytes of one image at most."""


def is_allowed(address: str, *, local: bool) -> bool:
    """Whether an IP address is a public one, or, with `local`, a loopback or private one.

    Link-local addresses (among them the metadata services of clouds), multicast and reserved ones never are.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6:  # judge the IPv4 address that will be reached in the end
        embedded = ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or embedded or ip
    if ip.is_loopback:
        return local
    if ip.is_multicast or ip.is_unspecified or ip.is_link_local or ip.is_reserved:
        return False
    return ip.is_global or (local and ip.is_private)


def refusals(urls: list[str], *, local: bool, timeout: float) -> list[tuple[str, str] | None]:
    """Judge urls before any of them is asked.

    Args:
        urls: absolute urls.
        local: whether loopback and private addresses are allowed.
        timeout: seconds for resolving all their hosts, side by side.

    Returns:
        For each url None if it may be asked, else a status and a reason: ("refused", why) or ("unresolved", why).
    """
    verdicts: list[tuple[str, str] | None] = [None] * len(urls)
    hosts: dict[str, list[int]] = {}
    for number, url in enumerate(urls):
        try:
            hosts.setdefault(_host(url), []).append(number)
        except ValueError as error:
            verdicts[number] = ("refused", str(error))
    # getaddrinfo cannot be interrupted, so a pool that hangs is left behind rather than waited for.
    pool = ThreadPoolExecutor(min(RESOLVER_THREADS, max(1, len(hosts))))
    futures = {pool.submit(_judge_host, host, local): host for host in hosts}
    done, late = wait(futures, timeout)
    pool.shutdown(wait=False, cancel_futures=True)
    answers = [(futures[future], future.result()) for future in done]
    answers += [(futures[future], ("unresolved", f"no answer within {timeout:g} s")) for future in late]
    for host, verdict in answers:
        for number in hosts[host]:
            verdicts[number] = verdict
    return verdicts


def checked_opener(rules: Rules) -> urllib.request.OpenerDirector:
    """Make an opener for http and https only, that holds every connection to the rules.

    It resolves each name once, refuses unless every address is allowed, and connects to one of those very addresses;
    redirects come this way again. One connection lasts at most its timeout, whatever trickles in, and its body is at
    most `rules.max_bytes`. Proxies of the environment are not used: what is behind one could not be checked.
    """
    opener = urllib.request.OpenerDirector()
    redirects = urllib.request.HTTPRedirectHandler()
    redirects.max_redirections = redirects.max_repeats = MAX_REDIRECTS  # type: ignore[misc]
    for handler in (
        _HTTPHandler(rules),
        _HTTPSHandler(rules),
        redirects,
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _host(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"only http and https are asked, not {parts.scheme or 'a relative address'!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the address carries a user name or password")
    if not parts.hostname:
        raise ValueError("the address has no host")
    parts.port  # noqa: B018 - raises ValueError when it is not a number in range
    return parts.hostname


def _judge_host(host: str, local: bool) -> tuple[str, str] | None:
    try:
        _resolve(host, None, local)
    except PermissionError as error:
        return "refused", str(error)
    except (OSError, UnicodeError) as error:
        return "unresolved", f"{host} does not resolve: {error}"
    return None


def _resolve(host: str, port: int | None, local: bool) -> list[tuple[str, int]]:
    """Resolve a host; PermissionError unless all its addresses are allowed."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses: list[tuple[str, int]] = [sockaddr[:2] for *_, sockaddr in answers]  # type: ignore[misc]
    for address, _ in addresses:
        if not is_allowed(address.partition("%")[0], local=local):
            raise PermissionError(f"{host} has the address {address}, which is not a public one")
    return addresses


def _connect(address: tuple[str, int], timeout: float, source_address, *, local: bool) -> socket.socket:
    """Stand in for socket.create_connection: connect to an address that was checked, not to a name."""
    error: OSError | None = None
    for checked in _resolve(*address, local):
        try:
            return socket.create_connection(checked, timeout, source_address)
        except OSError as failure:
            error = failure
    raise error or OSError(f"{address[0]} has no address")


class _BoundedResponse(http.client.HTTPResponse):
    """A response whose body is bounded in bytes and time, and is an error when it is cut short."""

    def __init__(
        self, sock: socket.socket, *args, max_bytes: int, deadline: float, timer: threading.Timer, **kwargs
    ) -> None:
        super().__init__(sock, *args, **kwargs)
        self._max_bytes, self._deadline, self._timer = max_bytes, deadline, timer

    def close(self) -> None:
        self._timer.cancel()
        super().close()

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return super().read(amt)
        parts, size = [], 0
        while part := self.read1(65536):
            parts.append(part)
            size += len(part)
            if size > self._max_bytes:
                raise OSError(f"more than {self._max_bytes} bytes")
        if time.monotonic() >= self._deadline:  # a connection it has cut looks like one that ended
            raise TimeoutError("not there in time")
        if self.length:
            raise http.client.IncompleteRead(b"", self.length)
        return b"".join(parts)


class _HTTPConnection(http.client.HTTPConnection):
    """Connects to a checked address, and gives responses that end in time."""

    def __init__(self, *args, rules: Rules, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = functools.partial(_connect, local=rules.local)
        self._rules = rules

    def connect(self) -> None:
        super().connect()
        # The socket's own timeout is for one read; a server that sends a byte now and then would never meet it.
        seconds = self.timeout or 0.0
        deadline = time.monotonic() + seconds
        timer = threading.Timer(seconds, _cut, [self.sock])
        timer.daemon = True
        timer.start()
        self.response_class = functools.partial(  # type: ignore[assignment]
            _BoundedResponse, max_bytes=self._rules.max_bytes, deadline=deadline, timer=timer
        )


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by itself meanwhile
        sock.shutdown(socket.SHUT_RDWR)


class _HTTPSConnection(_HTTPConnection, http.client.HTTPSConnection):
    """The same over TLS."""


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self._connection: Callable = functools.partial(_HTTPConnection, rules=rules)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self._connection: Callable = functools.partial(_HTTPSConnection, rules=rules)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, request)
