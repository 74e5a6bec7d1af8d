"""One streamed chat with a server that speaks OpenAI's interface, and the times at which its news came.

Written on asyncio's streams: a client library between the socket and the clock would be measured, too.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gemcut.errors import ConfigError, GemcutError

MAX_LINE = 1 << 24
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
        async with asyncio.timeout(timeout_s):
            status, lines = await _exchange(endpoint, "GET", path, b"")
            body = await _all(lines)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise ServerFailed(
            f"{endpoint.host} port {endpoint.port} does not answer: {_reason(error)}."
        ) from error
    if status != 200:
        raise ServerFailed(f"{endpoint.path}{path} answered {status}: {_said(body)}")
    try:
        return json.loads(body)
    except ValueError as error:
        raise ServerFailed(f"{endpoint.path}{path} did not answer with JSON.") from error


async def ask(endpoint: Endpoint, body: bytes, trace: Trace, timeout_s: float) -> None:
    """Send a chat whose body asks for a stream with its usage, and note into the trace what comes."""
    trace.sent_s = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            status, lines = await _exchange(endpoint, "POST", "/chat/completions", body)
            if status != 200:
                trace.error = f"{status}: {_said(await _all(lines))}"
            else:
                async with aclosing(lines):
                    trace.error = await _listen(lines, trace)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ServerFailed) as error:
        trace.error = _reason(error)
    finally:
        trace.end_s = time.monotonic()


async def _listen(lines: AsyncGenerator[bytes, None], trace: Trace) -> str | None:
    """Note the events of a stream. Returns what is wrong with it."""
    async for line in lines:
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
            trace.news_s.append(time.monotonic())
    else:
        return "the stream broke off"
    if not trace.news_s:
        return "the answer is empty"
    trace.completion_tokens = trace.completion_tokens or len(trace.news_s)
    return None


async def _all(lines: AsyncGenerator[bytes, None]) -> bytes:
    async with aclosing(lines):
        return b"".join([line async for line in lines])


async def _exchange(
    endpoint: Endpoint, method: str, path: str, body: bytes
) -> tuple[int, AsyncGenerator[bytes, None]]:
    """The status of a request, and the lines of the answer's body."""
    context = ssl.create_default_context() if endpoint.tls else None
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context, limit=MAX_LINE)
    try:
        writer.writelines([_head(endpoint, method, path, len(body)), body])
        head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        status = int(head[0].split()[1])
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (h.partition(b":") for h in head)
        }
    except (IndexError, ValueError, asyncio.LimitOverrunError) as error:
        writer.close()
        raise ServerFailed("what answers does not speak HTTP") from error
    except BaseException:
        writer.close()
        raise
    return status, _lines(reader, writer, headers)


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


async def _lines(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: Mapping[bytes, bytes]
) -> AsyncGenerator[bytes, None]:
    """Lines of a body, without their ends; the last one may have had none."""
    held = b""
    try:
        async for piece in _pieces(reader, headers):
            *whole, held = (held + piece).split(b"\n")
            for line in whole:
                yield line.rstrip(b"\r")
        if held:
            yield held
    finally:
        writer.close()


async def _pieces(
    reader: asyncio.StreamReader, headers: Mapping[bytes, bytes]
) -> AsyncGenerator[bytes, None]:
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif b"content-length" in headers:
        yield await reader.readexactly(int(headers[b"content-length"]))
    else:
        while piece := await reader.read(1 << 16):
            yield piece


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, asyncio.IncompleteReadError):
        return "the connection ended early"
    return str(error) or type(error).__name__


def _said(body: bytes) -> str:
    """The message of an error's body, or its beginning."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return text[:200]
