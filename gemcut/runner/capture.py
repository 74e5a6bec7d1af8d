"""CUDA graphs of what the runner runs: whole, or in pieces with the attention calls between them.

Enters: functions that read and write memory whose addresses stay. Leaves: functions that do the same by
replay. It must not know what they compute. Whatever is captured has run once before: kernels are compiled and
libraries have their workspaces by then.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from gemcut.kernels import Backend, paged_attention
from gemcut.models.gemma4.text import Attend

Run = Callable[[Attend], object]
Replay = Callable[[], object]


class Capture(Protocol):
    """Makes replays. `full` takes all of a run; `piecewise` what lies between its attention calls."""

    def full(self, run: Run) -> Replay: ...

    def piecewise(self, run: Run) -> Replay: ...

    def used_bytes(self) -> int:
        """Memory that captures took, from when this object was made."""
        ...


class Recorder:
    """Captures on the current stream; all graphs share one memory pool, so they must not run side by side.

    Make it when everything that is to be captured has run at its largest, so that what it counts as memory
    of graphs is that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._free_bytes = torch.cuda.mem_get_info(device)[0]

    def full(self, run: Run) -> Replay:
        tape = self._record(run, paged_attention)
        return tape.pieces[0]

    def piecewise(self, run: Run) -> Replay:
        pieces = self._record(run, None).pieces

        def replay() -> None:
            for piece in pieces:
                piece()

        return replay

    def used_bytes(self) -> int:
        return self._free_bytes - torch.cuda.mem_get_info(self.device)[0]

    def _record(self, run: Run, attend: Attend | None) -> _Tape:
        """attend: what is captured with the rest; None cuts there."""
        tape = _Tape(self._pool)
        with _collector_off():  # a graph that is freed meanwhile would break the capture
            try:
                tape.begin()
                run(attend or tape.attend)
                tape.end()
            except BaseException:
                tape.abandon()
                self._pool = torch.cuda.graph_pool_handle()  # whatever the broken capture left in the old one
                raise
        return tape


class _Tape:
    """A recording: graphs, and calls between them."""

    def __init__(self, pool: Any) -> None:
        self.pieces: list[Replay] = []
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        assert self._graph is not None, "a capture was begun"
        graph, self._graph = self._graph, None
        graph.capture_end()
        self.pieces.append(graph.replay)

    def abandon(self) -> None:
        """End a capture that broke: the stream would stay in it."""
        if self._graph is not None:
            with suppress(RuntimeError):
                self._graph.capture_end()

    def attend(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        page_table: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        spans: torch.Tensor | None,
        *,
        window: int | None,
        backend: Backend,
    ) -> torch.Tensor:
        """Cut here: `paged_attention` runs between two graphs. Now it does not: its inputs are not computed
        before the first replay."""
        self.end()
        queries, table = borrow(q), borrow(page_table)
        self.begin()
        out = torch.empty_like(q)  # in the pool, where the next piece reads it
        place = borrow(out)

        def call() -> None:
            place.copy_(
                paged_attention(
                    queries,
                    k_pages,
                    v_pages,
                    table,
                    query_start,
                    seq_lens,
                    spans,
                    window=window,
                    backend=backend,
                )
            )

        self.pieces.append(call)
        return out


class _Bytes:
    """Device memory that somebody else keeps."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.itemsize,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def borrow(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without a share in its life: later graphs of the pool may use it too."""
    return torch.as_tensor(_Bytes(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
