"""Memory: what an engine holds on its device, part by part, beside what the plan says it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemcut.bench.contender import Gemcut, text_prompt
from gemcut.bench.records import Table
from gemcut.plan import weight_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes. planned: weights by the plan. weights, kv: of the tensors. graphs: as counted at start. tokens:
    positions that the KV cache holds in full layers. The rest is None on a CPU: held, all tensors at rest;
    peak, more at the most while the longest step ran; device, all that is in use, by others too."""

    engine: str
    planned: int
    weights: int
    kv: int
    graphs: int
    tokens: int
    held: int | None
    peak: int | None
    device: int | None


def measure(contenders: Sequence[Gemcut]) -> list[Row]:
    return [_row(contender) for contender in contenders]


def _row(contender: Gemcut) -> Row:
    runner = contender.runner
    pages = {t.data_ptr(): t for kv in runner.kv.layers for t in (kv.k_pages, kv.v_pages)}
    held = peak = device = None
    if contender.device.type == "cuda":
        longest = min(contender.config.max_num_batched_tokens, contender.longest - 1)
        contender.synchronize()
        torch.cuda.reset_peak_memory_stats(contender.device)
        held = torch.cuda.memory_allocated(contender.device)
        contender.generate([text_prompt(contender.plan, longest, seed=0)], 1)
        peak = torch.cuda.max_memory_allocated(contender.device) - held
        free, total = torch.cuda.mem_get_info(contender.device)
        device = total - free
    return Row(
        engine=contender.name,
        planned=weight_bytes(contender.plan, contender.dtype.itemsize),
        weights=_bytes(runner.model.parameters()),
        kv=_bytes(pages.values()),
        graphs=contender.used.graph_bytes,
        tokens=contender.used.kv_tokens,
        held=held,
        peak=peak,
        device=device,
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    names = ("planned", "weights", "kv", "graphs", "held", "peak", "device")
    header = (
        "engine",
        "weights planned GB",
        "weights",
        "KV",
        "graphs",
        "tensors",
        "longest step",
        "in use",
        "KV tokens",
    )
    rows = [
        (
            r["engine"],
            *("-" if r[name] is None else f"{r[name] / 1e9:.2f}" for name in names),
            f"{r['tokens']:,}",
        )
        for r in results
    ]
    return Table("Memory, GB", header, rows)
