"""Which web addresses may be asked, and an opener that asks no others, within a time.

A caption corpus is written by strangers, and its urls are fetched from inside somebody's network. So a url is judged
twice: before any request (`refusals`), and again at the moment of each connection (`checked_opener`), which also covers
redirects and names that resolve differently the second time.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import http.client
import ipaddress
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from urllib.parse import quote, urlsplit, urlunsplit

NAT64 = ipaddress.ip_network("64:ff9b::/96")
NEVER = [
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service
        "168.63.129.16/32",  # Azure's, though the address is a public one
        "fd00:ec2::/32",  # Amazon's: metadata, credentials of pods, clock, resolver
        "fd20:ce::/32",  # Google's
        "fd00:42::/32",  # Scaleway's
        "64:ff9b:1::/48",  # translated to IPv4 addresses, by rules of the network's own
    )
]
"""Refused also where private addresses are allowed."""
MAX_REDIRECTS = 3
ASKED_AGAIN = 2
"""How often a server is asked again that answers 429 or 503 and says when (Retry-After)."""
MAX_WAIT = 30.0
"""Seconds to wait for that at most: who wants more is not asked again."""
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

    Link-local addresses and others of the metadata services of clouds, multicast and reserved ones never are.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6:  # judge the IPv4 address that will be reached in the end
        embedded = ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or embedded or ip
    if ip.is_loopback:
        return local
    if any(ip in network for network in NEVER):
        return False
    if ip.is_multicast or ip.is_unspecified or ip.is_link_local or ip.is_reserved:
        return False
    return ip.is_global or (local and ip.is_private)


def ascii_url(url: str) -> str:
    """Write a url as it is sent: the host by IDNA, of the rest what is not allowed in a url percent-encoded (UTF-8).

    What is encoded already stays.

    Raises:
        ValueError: it is no url, or its host cannot be written so.
    """
    parts = urlsplit(url.strip())
    host = parts.netloc
    if not host.isascii():
        user, at, place = host.rpartition("@")
        name, colon, port = place.partition(":")
        host = f"{user}{at}{name.encode('idna').decode()}{colon}{port}"
    # reserved characters as they are, and `%` where it begins a code
    rest = (quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", part), safe="!#$%&'()*+,/:;=?@[]~") for part in parts[2:])
    return urlunsplit((parts.scheme, host, *rest))


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
    redirects come this way again. One answer is there within the timeout given to `open`, over all addresses and
    redirects and whatever trickles in, and its body is at most `rules.max_bytes`. A server that answers 429 or 503 with
    a Retry-After of at most MAX_WAIT is asked again so much later, ASKED_AGAIN times. Proxies of the environment are
    not used: what is behind one could not be checked.
    """
    opener = _Opener()
    redirects = _Redirects()
    redirects.max_redirections = redirects.max_repeats = MAX_REDIRECTS  # type: ignore[misc]
    for handler in (
        _HTTPHandler(rules),
        _HTTPSHandler(rules),
        redirects,
        _Patience(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


@dataclass
class _Budget:
    """What is left for one answer; goes with a request to those that follow from it."""

    deadline: float
    """By time.monotonic()."""
    asked_again: int = 0


class _Opener(urllib.request.OpenerDirector):
    def open(self, fullurl, data=None, timeout=10.0):
        request = fullurl if isinstance(fullurl, urllib.request.Request) else urllib.request.Request(fullurl, data)
        if not hasattr(request, "budget"):
            request.budget = _Budget(time.monotonic() + timeout)  # type: ignore[attr-defined]
        return super().open(request, timeout=_left(request.budget.deadline))  # type: ignore[attr-defined]


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        if followed is not None:
            followed.budget = req.budget  # type: ignore[attr-defined]
        return followed


class _Patience(urllib.request.BaseHandler):
    def http_error_429(self, request, response, code, message, headers):
        seconds = _retry_after(headers.get("Retry-After", ""))
        if seconds is None or seconds > MAX_WAIT or request.budget.asked_again == ASKED_AGAIN:
            return None  # then it is an HTTPError
        response.close()
        request.budget.asked_again += 1
        request.budget.deadline += seconds
        time.sleep(seconds)
        return self.parent.open(request)  # type: ignore[attr-defined]

    http_error_503 = http_error_429


def _retry_after(value: str) -> float | None:
    """Seconds, of a header that has seconds or a date."""
    if re.fullmatch("[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _left(deadline: float) -> float:
    """Seconds until then; TimeoutError when there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("not there in time")
    return seconds


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


class _BoundedResponse(http.client.HTTPResponse):
    """A response whose body is bounded in bytes and time, and is an error when it is cut short."""

    def __init__(self, sock: socket.socket, *args, max_bytes: int, deadline: float, done: Callable, **kwargs) -> None:
        super().__init__(sock, *args, **kwargs)
        self._max_bytes, self._deadline, self._done = max_bytes, deadline, done

    def close(self) -> None:
        self._done()
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
        _left(self._deadline)  # a connection that was cut then looks like one that ended
        if self.length:
            raise http.client.IncompleteRead(b"", self.length)
        return b"".join(parts)


class _HTTPConnection(http.client.HTTPConnection):
    """Connects to a checked address, and gives responses that end in time."""

    def __init__(self, *args, rules: Rules, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = self._connect_checked
        self._rules = rules

    def connect(self) -> None:
        self._deadline = time.monotonic() + (self.timeout or 0.0)
        super().connect()

    def _connect_checked(self, address: tuple[str, int], _timeout: float, source_address) -> socket.socket:
        """Stand in for socket.create_connection: connect to an address that was checked, not to a name."""
        error: OSError | None = None
        for checked in _resolve(*address, self._rules.local):
            try:
                made = socket.create_connection(checked, _left(self._deadline), source_address)
            except OSError as failure:
                error = failure
                continue
            self._cut_at_the_deadline(made)
            return made
        raise error or OSError(f"{address[0]} has no address")

    def _cut_at_the_deadline(self, made: socket.socket) -> None:
        # A socket's own timeout is for one read; a server that sends a byte now and then would never meet it, be it in
        # the TLS handshake, the headers or the body. A duplicate, since TLS takes the socket itself away.
        duplicate = made.dup()
        timer = threading.Timer(_left(self._deadline), _cut, [duplicate])
        timer.daemon = True
        timer.start()

        def done() -> None:
            timer.cancel()
            duplicate.close()

        self.response_class = functools.partial(  # type: ignore[assignment]
            _BoundedResponse, max_bytes=self._rules.max_bytes, deadline=self._deadline, done=done
        )

    def getresponse(self) -> http.client.HTTPResponse:
        try:
            response = super().getresponse()
        finally:
            _left(self._deadline)  # headers that were cut then look like ones that ended
        return response


def _cut(duplicate: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by itself meanwhile
        duplicate.shutdown(socket.SHUT_RDWR)
    duplicate.close()


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
