"""What the soaks share: a figure, a client that keeps many requests in flight, and looks at processes."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from server_rig import Server

T = TypeVar("T")
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Figure:
    """What a soak found. text: the figure in words. misses: what was asked for and not reached."""

    number: int
    text: str
    misses: tuple[str, ...] = ()

    def __str__(self) -> str:
        ending = "".join(f"\n     MISSED: {miss}" for miss in self.misses)
        return f"{self.number:3}  {self.text}{ending}"


def missed(**reached: bool) -> tuple[str, ...]:
    """The names of what was not reached."""
    return tuple(name.replace("_", " ") for name, is_reached in reached.items() if not is_reached)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ---- processes


def rss_mb(pid: int) -> float:
    """Resident memory in MB."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_mb(pid: int) -> float:
    """The most resident memory that the process ever had, in MB."""
    with open(f"/proc/{pid}/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for at in found:
        for task in os.listdir(f"/proc/{at}/task"):
            with open(f"/proc/{at}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def gauge(server: Server, name: str) -> float:
    """One metric of the server."""
    lines = server.get("/metrics").body.decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"gemcut:{name}{{")).split()[-1])


# ---- requests


def run_client(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, and the connections that were closed last are closed."""

    async def whole() -> T:
        try:
            return await work
        finally:
            await asyncio.sleep(0.01)

    return asyncio.run(whole())


@dataclass(frozen=True)
class Answer:
    """status: 0 if there was none. body: whole, events included. seconds: from sending to the end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def is_whole(self) -> bool:
        """A stream that came to its end."""
        return self.body.endswith(b"data: [DONE]\n\n")


class Client:
    """One connection that is used again and again, and made anew when the server closes it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> Answer:
        """One request and its whole answer."""
        began = time.monotonic()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        sent = "" if body is None else f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        method = "GET" if body is None else "POST"
        writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{sent}{more}\r\n".encode() + (body or b"")
        )
        try:
            async with asyncio.timeout(timeout_s):
                status, found, content = await self._read(reader)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return Answer(0, {}, b"", time.monotonic() - began)
        if found.get("connection") == "close":
            self.close()
        return Answer(status, found, content, time.monotonic() - began)

    async def chat(self, **fields: Any) -> Answer:
        """A chat completion."""
        return await self.ask(CHAT, json.dumps(fields).encode())

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _read(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        status = int(head[0].split(" ")[1])
        if "content-length" in headers:
            return status, headers, await reader.readexactly(int(headers["content-length"]))
        pieces = []
        while size := int(await reader.readline() or b"0", 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readexactly(2)
        return status, headers, b"".join(pieces)


def said(script: str, **fields: Any) -> dict[str, Any]:
    """A chat with the scripted engine."""
    return {"messages": [{"role": "user", "content": f"script:{script}"}], **fields}
