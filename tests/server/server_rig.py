"""Servers as processes of their own on loopback, and what the tests say to them."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gemcut.demo import PICTURES

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PICTURE = PICTURES / "sign.png"  # it says GEMCUT
DATA_URI = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
START_S = 60.0


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, whole."""
        assert set(self.json) == {"error"}, self.body
        assert set(self.json["error"]) == {"message", "type", "param", "code"}, self.body
        return self.json["error"]

    def events(self) -> list[Any]:
        """The data of all events; `[DONE]` as that word."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Server:
    """A server process. Its log is read from a file."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115
        paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GEMCUT_")}
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
        )
        self.port = 0

    @classmethod
    def demo(cls, *flags: str) -> Self:
        """`gemcut serve` with the demo checkpoint."""
        return cls([sys.executable, "-m", "gemcut.cli", "serve", "--port", "0", *flags]).wait()

    @classmethod
    def scripted(cls, *, step_s: float = 0.001, audit: bool = False, **settings: Any) -> Self:
        """A server over `scripted_engine`. audit: its pages are counted at each step."""
        arguments = [sys.executable, str(HERE / "scripted_server.py"), json.dumps(settings)]
        return cls(arguments, {"SCRIPTED_STEP_S": str(step_s), "SCRIPTED_AUDIT": "1" * audit}).wait()

    def wait(self) -> Self:
        until(lambda: self.process.poll() is not None or self.lines("listening"), START_S, self.log)
        assert self.process.poll() is None, self.log()
        self.port = self.lines("listening")[0]["port"]
        return self

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def lines(self, message: str) -> list[dict[str, Any]]:
        """The log's lines with this message."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == message]

    @property
    def engine_pid(self) -> int:
        return self.lines("the engine is ready")[-1]["pid"]

    def signal(self, sign: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(sign)

    def stop(self) -> int:
        """End the server. Returns its exit status."""
        if self.process.poll() is None:
            self.signal()
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                self.signal()  # those in flight are broken off
                self.process.wait(10)
        self._log.close()
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- requests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Reply:
        """One request over a connection of its own. A body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            given = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, sent, {**given, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Reply:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> Reply:
        return self.request("POST", path, body, **options)

    def chat(self, script: str, **fields: Any) -> Reply:
        """A chat with the scripted engine."""
        return self.post("/v1/chat/completions", chat_body(script, **fields))

    def open_stream(self, script: str, **fields: Any) -> socket.socket:
        """A streaming chat, sent and left open."""
        body = json.dumps(chat_body(script, stream=True, **fields)).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        return connection


def chat_body(script: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"script:{script}"}], **fields}


def until(true: Callable[[], Any], seconds: float, said: Callable[[], str] = str) -> float:
    """Wait until it is true. Returns how long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds} s. {said()}"
        time.sleep(0.02)
    return time.monotonic() - began


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    pieces = []
    with connection:
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)
