"""One HTTP exchange: the body in, within its limits; JSON or events out; and a record of it for the log."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gemcut.server.errors import NotJson, TooLarge, TooSlow
from gemcut.server.settings import ServerConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

encode = msgspec.json.Encoder().encode

_PLAIN_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class ClientGone(Exception):
    """The connection is closed: by the client, or because it takes nothing any more."""


@dataclass(slots=True)
class Record:
    """What the log says of a request. Nothing of what its user wrote."""

    request_id: str
    method: str
    path: str
    client: str
    began_s: float
    key: int | None = None
    status: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


class Exchange:
    """A request and the way to answer it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: ServerConfig) -> None:
        self.scope, self.config = scope, config
        self._receive, self._send = receive, send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.extra_headers: list[tuple[bytes, bytes]] = []
        client = scope.get("client")
        self.record = Record(
            request_id=f"req-{secrets.token_hex(12)}",
            method=scope["method"],
            path=scope["path"],
            client=client[0] if client else "",
            began_s=time.monotonic(),
        )
        given = self.headers.get(b"x-request-id", b"")
        if _PLAIN_ID.fullmatch(given):
            self.record.fields["client_request_id"] = given.decode()
        self.body_is_read = False
        # the event that ends a stream which failed, if the interface has one of its own
        self.broken: Callable[[BaseException], bytes] | None = None

    @property
    def has_begun(self) -> bool:
        """The head of the answer is sent."""
        return self.record.status != 0

    async def body(self) -> bytes:
        """The whole body. Raises TooLarge, TooSlow, NotJson or ClientGone."""
        kind = self.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise NotJson("The body must be JSON. Send the header Content-Type: application/json.")
        most = self.config.max_body_bytes
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > most:
            raise TooLarge(f"The body has {int(declared[:20]):,} bytes; at most {most:,} are taken.")
        pieces, size = [], 0
        # each piece has its time, and all together ten times that
        last = time.monotonic() + 10 * self.config.body_s
        while True:
            try:
                async with asyncio.timeout(min(self.config.body_s, last - time.monotonic())):
                    message = await self._receive()
            except TimeoutError:
                raise TooSlow(f"The body stopped after {size:,} bytes.") from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            size += len(piece)
            if size > most:
                raise TooLarge(f"The body has more than {most:,} bytes.")
            pieces.append(piece)
            if not message.get("more_body"):
                self.body_is_read = True
                return b"".join(pieces)

    async def gone(self) -> None:
        """Return when the client has gone. The body must have been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def json(self, payload: Any, status: int = 200, headers: Headers = ()) -> None:
        """Answer with JSON."""
        await self.bytes(encode(payload), b"application/json", status, headers)

    async def bytes(self, body: bytes, kind: bytes, status: int = 200, headers: Headers = ()) -> None:
        """Answer with a body of any kind."""
        self.record.status = status
        length = (b"content-length", str(len(body)).encode())
        head = [(b"content-type", kind), length, *self._common(), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": b"" if self._is_head else body})

    async def not_modified(self, headers: Headers) -> None:
        """Answer that the client has what there is."""
        self.record.status = 304
        head = [*self._common(), *headers]
        await self._send({"type": "http.response.start", "status": 304, "headers": head})
        await self._send({"type": "http.response.body", "body": b""})

    async def events(self, data: bytes) -> None:
        """Send events; the first ones begin the stream."""
        if not self.has_begun:
            await self._begin_events()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self) -> None:
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin_events(self) -> None:
        self.record.status = 200
        head = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would hold the events back
            *self._common(),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})

    @property
    def _is_head(self) -> bool:
        return self.record.method == "HEAD"

    def _common(self) -> Headers:
        security = (b"x-content-type-options", b"nosniff")
        return [(b"x-request-id", self.record.request_id.encode()), security, *self.extra_headers]
