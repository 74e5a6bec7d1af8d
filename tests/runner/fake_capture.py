"""A capture without a GPU: a replay runs the same again, on the memory that it was captured with."""

from __future__ import annotations

from collections.abc import Callable

from gemcut.kernels import paged_attention
from gemcut.runner.capture import Replay, Run


class FakeCapture:
    """Counts what it is asked for. `spoil(kind, replay)` may make a replay wrong, or raise."""

    def __init__(
        self, spoil: Callable[[str, Replay], Replay] = lambda kind, replay: replay, bytes_each: int = 0
    ):
        self.spoil, self.bytes_each = spoil, bytes_each
        self.asked: list[str] = []

    def full(self, run: Run) -> Replay:
        return self._take("full", run)

    def piecewise(self, run: Run) -> Replay:
        return self._take("piecewise", run)

    def used_bytes(self) -> int:
        return self.bytes_each * len(self.asked)

    def _take(self, kind: str, run: Run) -> Replay:
        self.asked.append(kind)
        return self.spoil(kind, lambda: run(paged_attention))
