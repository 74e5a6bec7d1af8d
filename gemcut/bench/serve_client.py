"""One streamed chat with a server that speaks OpenAI's interface, and the times at which its news came.

Written on asyncio's protocols: a client library between the socket and the clock would be measured, too.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from gemcut.errors import ConfigError, GemcutError

NEWS = ("content", "reasoning", "reasoning_content", "tool_calls")


class ServerFailed(GemcutError):
    """The server did not answer, or not in its interface's form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server's interface is. path: before `/chat/completions`, such as `/v1`."""

    host: str
    port: int
    path: str
    tls: bool = False
    key: str | None = None

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Endpoint:
        """An endpoint of a base URL, as OpenAI's clients take it. Raises ConfigError."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"base_url must be like http://127.0.0.1:8000/v1, got {url!r}.")
        tls = parts.scheme == "https"
        return cls(
            host=parts.hostname,
            port=port or (443 if tls else 80),
            path=parts.path.rstrip("/"),
            tls=tls,
            key=key,
        )


@dataclass(slots=True)
class Trace:
    """What became of one request. Times are seconds on the monotonic clock.

    due_s: when it should have been sent. news_s: of each event that brought text, a thought or a call.
    prompt_tokens, completion_tokens: as the server counted them. error: None if the answer is complete.
    """

    due_s: float
    sent_s: float = 0.0
    news_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def first_s(self) -> float:
        """Seconds from sending to the first news."""
        return self.news_s[0] - self.sent_s

    @property
    def total_s(self) -> float:
        """Seconds from sending to the end of the stream. The last tokens may have no text."""
        return self.end_s - self.sent_s

    @property
    def per_token_s(self) -> float | None:
        """Seconds a token behind the first; None for an answer of one token."""
        later = self.completion_tokens - 1
        return (self.total_s - self.first_s) / later if later > 0 else None

    @property
    def between_s(self) -> list[float]:
        """Seconds between news. A server may send several tokens at a time."""
        return [after - before for before, after in zip(self.news_s, self.news_s[1:], strict=False)]


async def get(endpoint: Endpoint, path: str, timeout_s: float = 10.0) -> Any:
    """A JSON document. Raises ServerFailed."""
    try:
        answer = await _exchange(endpoint, "GET", path, b"", timeout_s)
    except (OSError, TimeoutError) as error:
        raise ServerFailed(
            f"{endpoint.host} port {endpoint.port} does not answer: {_reason(error)}."
        ) from error
    if answer.status != 200:
        raise ServerFailed(f"{endpoint.path}{path} answered {answer.status}: {_said(answer.body)}")
    try:
        return json.loads(answer.body)
    except ValueError as error:
        raise ServerFailed(f"{endpoint.path}{path} did not answer with JSON.") from error


async def ask(endpoint: Endpoint, body: bytes, trace: Trace, timeout_s: float) -> None:
    """Send a chat whose body asks for a stream with its usage, and note into the trace what comes.

    While it comes, only the time of each piece is noted: what the client does then, a server on the same
    machine cannot do.
    """
    answer = None
    trace.sent_s = time.monotonic()
    try:
        answer = await _exchange(endpoint, "POST", "/chat/completions", body, timeout_s)
    except (OSError, TimeoutError, ServerFailed) as error:
        trace.error = _reason(error)
    trace.end_s = time.monotonic()
    if answer is not None:
        trace.error = _read(answer, trace)


def _read(answer: _Answer, trace: Trace) -> str | None:
    """Note the events of a stream. Returns what is wrong with it."""
    if answer.status != 200:
        return f"{answer.status}: {_said(answer.body)}"
    for came_s, line in answer.lines():
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        try:
            event = json.loads(data)
        except ValueError:
            return "an event is no JSON"
        if event.get("error"):
            return f"in the stream: {_said(data)}"
        if usage := event.get("usage"):
            trace.prompt_tokens, trace.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if any(choice["delta"].get(name) for choice in event.get("choices") or () for name in NEWS):
            trace.news_s.append(came_s)
    else:
        return "the stream broke off"
    if not trace.news_s:
        return "the answer is empty"
    trace.completion_tokens = trace.completion_tokens or len(trace.news_s)
    return None


class _Answer(asyncio.Protocol):
    """An answer while it comes. pieces: of its body, with the seconds on the monotonic clock at which they
    came. ended: raises ServerFailed if it is not complete."""

    def __init__(self) -> None:
        self.status = 0
        self.pieces: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._says_its_length = False

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def lines(self) -> Iterator[tuple[float, bytes]]:
        """Lines of the body without their ends, each with the time at which it was complete. The last one
        may have had no end."""
        held, came_s = b"", 0.0
        for came_s, piece in self.pieces:
            *whole, held = (held + piece).split(b"\n")
            for line in whole:
                yield came_s, line.rstrip(b"\r")
        if held:
            yield came_s, held

    # ---- called by the event loop

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end("what answers does not speak HTTP")

    def connection_lost(self, exc: Exception | None) -> None:
        until_the_end = exc is None and self.status and not self._says_its_length
        self._end(None if until_the_end else "the connection ended early")

    # ---- called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self._says_its_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.pieces.append((time.monotonic(), body))

    def on_message_complete(self) -> None:
        self._end(None)

    def _end(self, error: str | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(ServerFailed(error))


async def _exchange(endpoint: Endpoint, method: str, path: str, body: bytes, timeout_s: float) -> _Answer:
    """The whole answer to a request. Raises OSError, TimeoutError or ServerFailed."""
    context = ssl.create_default_context() if endpoint.tls else None
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        transport, answer = await loop.create_connection(_Answer, endpoint.host, endpoint.port, ssl=context)
        try:
            transport.write(_head(endpoint, method, path, len(body)) + body)
            await answer.ended
        finally:
            transport.close()
    return answer


def _head(endpoint: Endpoint, method: str, path: str, length: int) -> bytes:
    lines = [
        f"{method} {endpoint.path}{path} HTTP/1.1",
        f"Host: {endpoint.host}:{endpoint.port}",
        "Connection: close",
        "Accept-Encoding: identity",
    ]
    if length:
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    if endpoint.key is not None:
        lines.append(f"Authorization: Bearer {endpoint.key}")
    return "\r\n".join([*lines, "", ""]).encode()


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    return str(error) or type(error).__name__


def _said(body: bytes) -> str:
    """The message of an error's body, or its beginning."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return text[:200]
