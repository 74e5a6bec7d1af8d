"""Who may come in: keys, names, origins; and how many at a time."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gemcut.errors import Overloaded
from gemcut.server.errors import Forbidden, NotReady, TooMany, Unauthorized
from gemcut.server.settings import ServerConfig

SMOOTHING = 0.1
SHORTEST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Keys:
    """API keys, kept as digests and compared in constant time."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: Mapping[bytes, bytes]) -> int | None:
        """The number of the key that was shown, None if none is needed. Raises Unauthorized."""
        if not self._digests:
            return None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        shown = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not shown:
            raise Unauthorized("A key is needed: send the header Authorization: Bearer KEY.")
        digest = hashlib.sha256(shown).digest()
        # all are compared, whichever fits
        fits = [i for i, known in enumerate(self._digests) if hmac.compare_digest(known, digest)]
        if not fits:
            raise Unauthorized("The key is not one of this server's.")
        return fits[0]

    def salt(self, key: int | None, given: str | None) -> bytes:
        """The tenant of the caches: requests with different keys share nothing, nor do those whose
        `cache_salt` differs."""
        tenant = self._digests[key] if key is not None and len(self._digests) > 1 else b""
        if not tenant and given is None:
            return b""
        return hashlib.sha256(tenant + b"/" + (given or "").encode(errors="backslashreplace")).digest()


def check_host(headers: Mapping[bytes, bytes], config: ServerConfig) -> None:
    """A server of this machine without keys answers to loopback names only: a web page that has its own
    name point here (DNS rebinding) is refused."""
    if config.api_keys or not config.is_loopback:
        return
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = host if host.endswith("]") else host.rsplit(":", 1)[0] if ":" in host else host
    if name not in _LOOPBACK_NAMES | {config.host.lower(), *config.allowed_hosts}:
        raise Forbidden("This server does not answer to that host name; see --allowed-host.")


def cors_headers(headers: Mapping[bytes, bytes], config: ServerConfig) -> list[tuple[bytes, bytes]]:
    """What lets a page of a listed origin read the answer."""
    origin = headers.get(b"origin")
    if origin is None or origin.decode("latin-1") not in config.allowed_origins:
        return []
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key, anthropic-version"),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-expose-headers", b"x-request-id, retry-after"),
        (b"vary", b"origin"),
    ]


class Door:
    """Counts requests that want an engine. most: those that may be inside at once."""

    def __init__(self, most: int, most_per_key: int | None) -> None:
        self._most, self._most_per_key = most, most_per_key
        self._of_key: Counter[int | None] = Counter()
        self._mean_interval_s = 0.0  # between two that leave
        self._last_left_s: float | None = None
        self.num_inside = 0
        self.is_draining = False

    @contextmanager
    def enter(self, key: int | None) -> Iterator[None]:
        """Be inside. Raises NotReady, TooMany or Overloaded."""
        if self.is_draining:
            raise NotReady("The server is shutting down.", 5.0)
        if key is not None and self._most_per_key is not None and self._of_key[key] >= self._most_per_key:
            raise TooMany(f"This key has {self._most_per_key} requests in flight, which is all it may.", 1.0)
        if self.num_inside >= self._most:
            raise Overloaded(
                f"{self.num_inside} requests run or wait, which is all that may.", self._retry_after_s()
            )
        self.num_inside += 1
        self._of_key[key] += 1
        try:
            yield
        finally:
            self.num_inside -= 1
            self._of_key[key] -= 1
            self._note_leaving()

    def _note_leaving(self) -> None:
        now = time.monotonic()
        if self._last_left_s is not None:
            interval = now - self._last_left_s
            self._mean_interval_s += SMOOTHING * (interval - self._mean_interval_s)
        self._last_left_s = now

    def _retry_after_s(self) -> float:
        """When about a tenth of those inside should have left."""
        return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, self._mean_interval_s * self.num_inside / 10))
