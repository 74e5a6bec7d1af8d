"""Numbers about repeated measurements, and the ceilings that they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Times:
    """One thing, measured several times; in the unit of the values."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5)
        return cls(statistics.median(values), fifths[0], fifths[3])


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device does at most: bytes read and written by copies, FLOPs of large products, a second."""

    copy_bytes: float
    matrix_flops: float

    def __str__(self) -> str:
        return (
            f"copies {self.copy_bytes / 1e12:.3f} TB/s, multiplies at {self.matrix_flops / 1e12:.1f} TFLOP/s"
        )


def measure_ceilings(device: torch.device | None = None) -> Ceilings:
    """By a copy of 1 GiB and an 8192^3 product in bf16, random data; on a CPU 64 MiB and 512^3 in fp32."""
    device = device or torch.device("cuda")
    on_gpu = device.type == "cuda"
    size, side, dtype = (1 << 30, 8192, torch.bfloat16) if on_gpu else (1 << 26, 512, torch.float32)
    elapsed = elapsed_us if on_gpu else _host_us

    def copy_us() -> float:
        source = torch.empty(size, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        return repeat(lambda: target.copy_(source), 10, elapsed).median

    def product_us() -> float:
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        return repeat(lambda: a @ b, 10, elapsed).median

    copy, product = copy_us(), product_us()
    if on_gpu:
        torch.cuda.empty_cache()  # an engine takes what it finds free
    return Ceilings(2 * size / copy * 1e6, 2 * side**3 / product * 1e6)


def repeat(call: Callable[[], Any], rounds: int, elapsed: Callable[[Callable[[], Any]], float]) -> Times:
    """Microseconds of a call that was made once before."""
    call()
    return Times.of([elapsed(call) for _ in range(rounds)])


def elapsed_us(call: Callable[[], Any]) -> float:
    """Microseconds that the GPU takes for a call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def _host_us(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6
