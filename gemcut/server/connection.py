"""Connections: the head of a request has a size and a time, what a client takes has a time, or the connection
is closed.

uvicorn limits none of them, so that a client could hold connections for ever by sending a byte now and then,
or by taking nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gemcut.server.settings import ServerConfig


def limited(config: ServerConfig) -> type[HttpToolsProtocol]:
    """uvicorn's protocol within the limits of `config`."""

    class Limited(HttpToolsProtocol):
        """Counts a head's bytes and seconds, and the seconds that a full buffer waits for its client."""

        _timer: asyncio.TimerHandle | None = None
        _patience: asyncio.TimerHandle | None = None
        _in_head = False
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            self._end_patience()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head:
                self._head_bytes += len(data)
                if self._head_bytes > config.max_head_bytes:
                    self._refuse(b"431 Request Header Fields Too Large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if not self._in_head:
                self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > config.max_head_bytes:
                raise ValueError("the head is too large")  # uvicorn answers 400 and closes
            super().on_headers_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._patience = self.loop.call_later(config.send_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._end_patience()
            super().resume_writing()

        def _end_patience(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _begin_head(self) -> None:
            self._in_head, self._head_bytes = True, 0
            self._timer = self.loop.call_later(config.head_s, self._expire)

        def _end_head(self) -> None:
            self._in_head = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _expire(self) -> None:
            if self._head_bytes:
                self._refuse(b"408 Request Timeout")
            else:
                self.transport.close()

        def _refuse(self, status: bytes) -> None:
            self._end_head()
            if not self.transport.is_closing():
                self.transport.write(
                    b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
                self.transport.close()

    return Limited
