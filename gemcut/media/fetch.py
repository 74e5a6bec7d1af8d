"""Pictures by URL, for servers that are told from where: a file's bytes, and no way into a private network.

Enters: a URL that somebody wrote into a request. Leaves: bytes, as they came; a media worker decodes them.

A host is asked only if it is listed. Its name is resolved once, every address that it has must be public, and
the connection goes to an address that was checked, so that a name which changes its mind changes nothing. A
redirect is a new URL, with all that. Proxies of the environment are not used, cookies and keys are not sent.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import httptools

from gemcut.errors import ConfigError, InvalidRequest
from gemcut.media.image import MAX_BYTES, part_text

MAX_URL = 2048  # characters
MAX_HEAD = 64 << 10  # bytes
MAX_TRIES = 3  # addresses of one name
DEFAULT_PORTS = {"http": 80, "https": 443}

# Printable ASCII without what browsers and servers read differently: spaces, quotes, backslashes. A host in
# other letters is written in its ASCII form (xn--...), everything else percent-encoded.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[^/?#:@\[\]]+)(?::(?P<port>[0-9]{1,5}))?(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?",
    re.ASCII | re.IGNORECASE,
)
_PLAIN = re.compile(r"[!#-;=?-\[\]_a-z~]+", re.ASCII | re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)

# What IANA's registries of special addresses hold back from the public network, and one provider's metadata.
_SPECIAL_4 = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
# protocols (Teredo among them), documentation, 6to4, documentation
_SPECIAL_6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # how networks of IPv6 alone reach IPv4


def is_public(address: str) -> bool:
    """Whether an address, as the resolver spells it, belongs to the public network."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            return ip in _GLOBAL_6 and not any(ip in block for block in _SPECIAL_6)
    return not any(ip in block for block in _SPECIAL_4)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name. Raises OSError if there is none."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True, slots=True)
class Domain:
    """A place from which pictures may be fetched.

    name: of a host, or with `below` of the domain above it; below the empty name is every host. port: the
    only one, by default that of the scheme.
    """

    name: str
    below: bool
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Domain:
        """`example.com`, `*.example.com` or `*`, each with `:PORT` or without. Raises ConfigError."""
        place, colon, port = text.lower().partition(":")
        name = "" if place == "*" else place.removeprefix("*.")
        is_port = port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536
        if (place != "*" and not _is_host(name)) or (colon and not is_port):
            raise ConfigError(
                f"allow_image_domain {text!r} is no host name; write example.com, *.example.com (the hosts "
                "below it) or * (every public host), with :PORT if the port is unusual."
            )
        return cls(name, place != name, int(port) if colon else None)

    def covers(self, host: str, port: int, scheme: str) -> bool:
        """Whether this host may be asked on this port."""
        if port != (DEFAULT_PORTS[scheme] if self.port is None else self.port):
            return False
        if self.below:
            return not self.name or host.endswith(f".{self.name}")
        return host == self.name


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart. path: with the query, as it is sent."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        """The URL again."""
        return f"{self.scheme}://{self.host}:{self.port}{self.path}"


def parse_url(url: str) -> Target:
    """Take a URL apart, in the one way there is. Raises InvalidRequest."""
    if len(url) > MAX_URL:
        raise InvalidRequest(f"The URL has {len(url):,} characters; at most {MAX_URL:,} are taken.")
    found = _URL.fullmatch(url) if _PLAIN.fullmatch(url) else None
    if found is None:
        raise InvalidRequest(
            "The URL is not of the form https://host/path in plain ASCII: without user names, spaces or "
            "backslashes, other characters percent-encoded, hosts in their xn-- form."
        )
    scheme, host = found["scheme"].lower(), found["host"].lower()
    port = int(found["port"]) if found["port"] else DEFAULT_PORTS[scheme]
    if not _is_host(host) or not 0 < port < 65536:
        raise InvalidRequest("The URL names no host by its name; addresses in numbers are not fetched from.")
    return Target(scheme, host, port, (found["path"] or "/") + (found["query"] or ""))


def _is_host(name: str) -> bool:
    """A host's name in lower case: no address, in whichever notation a resolver might know."""
    labels = name.split(".")
    return (
        len(name) <= 253
        and all(_LABEL.fullmatch(label) for label in labels)
        and not _NUMBER.fullmatch(labels[-1])
    )


class Url(str):
    """Where a picture is, instead of the picture."""


def part_url(part: Mapping[str, Any]) -> Url | None:
    """The URL in a picture part of a message, None if it holds the picture itself."""
    text = part_text(part)
    return Url(text) if text is not None and re.match(r"https?:", text, re.IGNORECASE) else None


class Fetcher:
    """Fetches pictures from listed domains.

    domains: as `Domain.parse` reads them. max_bytes: of a file. deadline_s: for all of it, from the name's
    look-up to the last byte, redirects included. max_at_once: files under way; others wait, within their
    deadline.
    """

    def __init__(
        self,
        domains: Sequence[str],
        *,
        max_bytes: int = MAX_BYTES,
        deadline_s: float = 10.0,
        max_redirects: int = 3,
        max_at_once: int = 16,
    ) -> None:
        self._domains = [Domain.parse(text) for text in domains]
        self._max_bytes, self._deadline_s, self._max_redirects = max_bytes, deadline_s, max_redirects
        self._room = asyncio.Semaphore(max_at_once)
        self._tls = ssl.create_default_context()

    async def get(self, url: str) -> bytes:
        """The file behind a URL. Raises InvalidRequest for whatever keeps it from being had."""
        target = self._checked(parse_url(url))
        try:
            async with asyncio.timeout(self._deadline_s), self._room:
                for _ in range(self._max_redirects + 1):
                    answer = await self._ask(target)
                    if isinstance(answer, bytes):
                        return answer
                    target = self._redirected(target, answer.location)
        except TimeoutError:
            raise InvalidRequest(
                f"Fetching the picture from {target.host} took longer than {self._deadline_s:g} s."
            ) from None
        raise InvalidRequest(f"The picture's URL redirects more than {self._max_redirects} times.")

    def _checked(self, target: Target) -> Target:
        if not any(domain.covers(target.host, target.port, target.scheme) for domain in self._domains):
            raise InvalidRequest(
                f"No picture is fetched from {target.host} port {target.port}; send it as a data URI."
            )
        return target

    def _redirected(self, target: Target, location: str) -> Target:
        try:
            joined = urljoin(target.url, location)
        except ValueError:
            raise InvalidRequest(f"{target.host} redirects to what is no URL.") from None
        there = self._checked(parse_url(joined))
        if target.scheme == "https" and there.scheme == "http":
            raise InvalidRequest(f"{target.host} redirects from https to http, which is not followed.")
        return there

    async def _ask(self, target: Target) -> bytes | _Redirect:
        reader, writer = await self._connect(target)
        try:
            usual = target.port == DEFAULT_PORTS[target.scheme]
            host = target.host if usual else f"{target.host}:{target.port}"
            writer.write(
                f"GET {target.path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: gemcut\r\n"
                "Accept: image/*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode()
            )
            answer = _Answer(target.host, self._max_bytes)
            while not answer.is_complete:
                piece = await reader.read(1 << 16)
                if not piece:
                    answer.end()
                    break
                answer.feed(piece)
            return answer.result()
        except (OSError, asyncio.IncompleteReadError) as error:
            raise _unreachable(target.host) from error
        finally:
            writer.transport.abort()

    async def _connect(self, target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to an address of the host, each of which is public."""
        try:
            addresses = await resolve(target.host, target.port)
        except (OSError, UnicodeError) as error:
            raise _unreachable(target.host) from error
        if not addresses or not all(map(is_public, addresses)):
            raise InvalidRequest(
                f"{target.host} is not a host of the public network; nothing is fetched from it."
            )
        tls = {"ssl": self._tls, "server_hostname": target.host} if target.scheme == "https" else {}
        for address in addresses[:MAX_TRIES]:
            try:
                return await asyncio.open_connection(address, target.port, **tls)
            except OSError:
                continue
        raise _unreachable(target.host)


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


class _Answer:
    """An HTTP answer as it comes in, within its limits. httptools calls the methods that begin with on_."""

    def __init__(self, host: str, max_bytes: int) -> None:
        self._host, self._max_bytes = host, max_bytes
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._head_bytes = 0
        self._status = 0
        self._in_body = False
        self.is_complete = False

    def feed(self, piece: bytes) -> None:
        """More of it. Raises InvalidRequest if it is too much, or no HTTP."""
        if not self._in_body:
            self._head_bytes += len(piece)
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None
        except httptools.HttpParserError:
            if not self.is_complete:  # what follows does not matter
                raise self._refusal("answered with something that is no HTTP") from None
        if not self._in_body and self._head_bytes > MAX_HEAD:
            raise self._refusal(f"answered with a head of more than {MAX_HEAD >> 10} KiB")

    def end(self) -> None:
        """The connection ended. Raises InvalidRequest if that came too early."""
        is_measured = "content-length" in self._headers or "transfer-encoding" in self._headers
        if not self._in_body or is_measured:
            raise self._refusal("broke the picture off")

    def result(self) -> bytes | _Redirect:
        """The body, or where else it is."""
        if self._status in (301, 302, 303, 307, 308) and "location" in self._headers:
            return _Redirect(self._headers["location"])
        return bytes(self._body)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._status = self._parser.get_status_code()
        if self._status < 200:
            return  # a word in between
        self._in_body = True
        if 300 <= self._status < 400 and "location" in self._headers:
            self.is_complete = True
        elif self._status != 200:
            raise self._refusal(f"answered {self._status}")
        elif self._headers.get("content-encoding", "identity") != "identity":
            raise self._refusal("answered in an encoding that was not asked for")
        declared = self._headers.get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            raise self._refusal(
                f"has a file of {int(declared[:20]):,} bytes; at most {self._max_bytes:,} are taken"
            )

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if self.is_complete:
            return  # of a redirect
        if len(self._body) + len(piece) > self._max_bytes:
            raise self._refusal(f"has a file of more than {self._max_bytes:,} bytes, which are taken at most")
        self._body += piece

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was a word in between."""
        if self._in_body:
            self.is_complete = True
        else:
            self._headers.clear()

    def _refusal(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self._host} {what}.")


def _unreachable(host: str) -> InvalidRequest:
    """One text for all reasons: it must not tell what is open where."""
    return InvalidRequest(f"The picture could not be fetched from {host}.")
