"""Where the time of a step goes: every kernel of one prefill or of a few decode steps, by segment.

Enters: an engine, and what to look at. Leaves: rows by segment of the model and by kernel, from torch's
profiler. On a CPU the operations of torch take the place of kernels.
"""

from __future__ import annotations

import ast
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity

from gemcut.bench.contender import LASTING, Gemcut, text_prompt
from gemcut.bench.decode import CACHED
from gemcut.bench.records import Table, ms, percent
from gemcut.bench.roofline import Roofline
from gemcut.bench.vision import encode_new
from gemcut.data import POOL
from gemcut.engine.model_files import ChatPrompt
from gemcut.errors import GemcutError

Kind = Literal["prefill", "decode", "encode"]
UNITS = {"prefill": "tokens", "decode": "sequences", "encode": "pictures"}
SHOWN = 12  # kernels of a table; the record has all
DECODE_STEPS = 4
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "splitk", "xmma")  # in the names of library kernels
# A library's product is known by what ran before it: the order of segments is the model's (spec 2.6).
AFTER = {
    "embed": "linear qkv",
    "close_layer": "linear qkv",
    "attention": "linear o",
    "add_norm": "linear gate/up",
    "glu": "linear down",
    "tower": "linear qkv",
    "tower_attention": "linear o",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of a step, with the other calls of the same name in the same segment. time: milliseconds."""

    segment: str
    name: str
    count: float
    time: float


@dataclass(frozen=True, slots=True)
class Row:
    """One step, in milliseconds.

    floor: of the roofline. busy: the sum of its kernels. span: from the first kernel's start to the last's
    end, under a profiler whose own work lengthens the gaps. kernels: how many. host_launches: calls of the
    driver, a graph's replay counting as one.
    """

    kind: Kind
    size: int
    engine: str
    layers: int  # of the part that ran: the decoder or the tower
    floor: float
    busy: float
    span: float
    kernels: float
    host_launches: float
    by_kernel: list[Kernel]


def measure(
    contenders: Sequence[Gemcut], roofline: Roofline, wanted: Sequence[tuple[Kind, int]]
) -> list[Row]:
    """wanted: ("prefill", tokens), ("decode", batch) and ("encode", pictures)."""
    warm_up(contenders[0])
    return [_row(contender, roofline, kind, size) for kind, size in wanted for contender in contenders]


def _layers(contender: Gemcut, kind: Kind) -> int:
    vision = contender.plan.vision
    return vision.layers if kind == "encode" and vision is not None else len(contender.plan.text.layers)


def count_launches(contender: Gemcut, prompt: ChatPrompt) -> tuple[float, int]:
    """Kernels a layer, and calls of the driver, of one prompt's prefill; what is outside of the layers counts
    as if it were in them."""
    with _profiler(contender, host=contender.device.type == "cpu") as profile:
        contender.generate([prompt], 1)
        contender.synchronize()
    layers = len(contender.plan.text.layers)
    if contender.device.type == "cpu":
        kernels, host_launches, _ = _read(profile, contender.device)
        return sum(kernel.count for kernel in kernels) / layers, host_launches
    # the torch kernels of one prefill are some 100,000 events: torch's own lists of them take a minute
    events = profile.profiler.kineto_results.events()
    ran = sum(e.device_type().name == "CUDA" and not e.is_user_annotation() for e in events)
    launches = sum(e.device_type().name == "CPU" and e.name().startswith(LAUNCHES) for e in events)
    return _seen(ran) / layers, launches


def _row(contender: Gemcut, roofline: Roofline, kind: Kind, size: int) -> Row:
    if kind == "prefill":
        steps, floor = 1, roofline.prefill_ms(size)
        prompts = [text_prompt(contender.plan, size, seed=0)]
        contender.generate(prompts, 1)
        with _profiler(contender) as profile:
            contender.generate(prompts, 1)
            contender.synchronize()
    elif kind == "encode":
        soft = contender.files.image_tokens
        steps, floor = 1, roofline.tower_ms(size, soft * POOL * POOL)
        for number in range(2):
            encode_new(contender, size, number)
        with _profiler(contender) as profile:
            encode_new(contender, size, 2)
    else:
        steps, floor = DECODE_STEPS, roofline.decode_ms(size, CACHED)
        cached = min(CACHED, contender.longest - LASTING)
        prompts = [text_prompt(contender.plan, cached, seed=i) for i in range(size)]
        with contender.decoding(prompts) as step:
            step()
            contender.synchronize()
            with _profiler(contender) as profile:
                for _ in range(steps):
                    step()
                contender.synchronize()
    kernels, host_launches, span = _read(profile, contender.device)
    return Row(
        kind=kind,
        size=size,
        engine=contender.name,
        layers=_layers(contender, kind),
        floor=floor,
        busy=sum(kernel.time for kernel in kernels) / steps,
        span=span / steps,
        kernels=sum(kernel.count for kernel in kernels) / steps,
        host_launches=host_launches / steps,
        by_kernel=[Kernel(k.segment, k.name, k.count / steps, k.time / steps) for k in kernels],
    )


def warm_up(contender: Gemcut) -> None:
    """A first profile loses what runs while it sets itself up. From then on everything is slower."""
    with _profiler(contender):
        contender.generate([text_prompt(contender.plan, 16, seed=0)], 1)


def _profiler(contender: Gemcut, *, host: bool = True) -> AbstractContextManager[Any]:
    """host: note operations of torch as well."""
    # the driver's tracing does not survive being taken down beside CUDA graphs
    os.environ["TEARDOWN_CUPTI"] = "0"
    activities = [ProfilerActivity.CPU] if host else []
    if contender.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def _read(profile: Any, device: torch.device) -> tuple[list[Kernel], int, float]:
    """Kernels by time, calls of the driver, and milliseconds from the first kernel to the end of the last."""
    events = profile.events()
    if device.type == "cuda":
        ran = sorted(
            (e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation),
            key=lambda e: e.time_range.start,
        )
        _seen(len(ran))
        names = [e.name for e in ran]
        times = [e.time_range.elapsed_us() / 1e3 for e in ran]
        launches = sum(e.name.startswith(LAUNCHES) for e in events if e.device_type.name == "CPU")
        span = (max(e.time_range.end for e in ran) - ran[0].time_range.start) / 1e3
    else:
        ran = [e for e in events if e.self_cpu_time_total > 0]
        names, times = [e.name for e in ran], [e.self_cpu_time_total / 1e3 for e in ran]
        launches, span = len(ran), sum(times)
    together: dict[tuple[str, str], list[float]] = defaultdict(list)
    for segment, name, time in zip(segments(names), names, times, strict=True):
        together[segment, name].append(time)
    kernels = [Kernel(*key, len(some), sum(some)) for key, some in together.items()]
    return sorted(kernels, key=lambda kernel: -kernel.time), launches, span


def _seen(kernels: int) -> int:
    if not kernels:
        raise GemcutError("The profiler saw no kernel: the driver does not let it count here.")
    return kernels


def segments(names: Sequence[str]) -> list[str]:
    """The segment of each kernel, given in the order in which they ran.

    Our own kernels are known by name. Others belong to where they stand: a product by what ran before it, and
    the one right before the logits is the head; the rest is "other".
    """
    found: list[str] = []
    last = product = ""
    for name in names:
        own = own_kernels().get(name)
        if own == "linear" or (own is None and any(word in name.lower() for word in PRODUCTS)):
            # a layer of the tower has no close_layer: its second add_norm opens the next one
            opens = last == "add_norm" and product == "linear down"
            product = "linear qkv" if opens else AFTER.get(last, "linear")
            found.append(product)
        elif own is None:
            found.append("other")
        elif own == "experts":
            found.append("experts down" if last == own else "experts gate/up")
            last = own
        else:
            if own == "logits":
                _rename_last_product(found)
            found.append(own)
            last = own
    return found


def _rename_last_product(found: list[str]) -> None:
    at = len(found) - 1
    while at >= 0 and not found[at].startswith("linear"):
        at -= 1
    while at >= 0 and found[at].startswith("linear"):  # split products have a kernel that adds up
        found[at] = "linear head"
        at -= 1


@cache
def own_kernels() -> Mapping[str, str]:
    """Name of each kernel of `gemcut.kernels` -> its folder. From the sources: triton may not be there."""
    found: dict[str, str] = {}
    for folder in resources.files("gemcut.kernels").iterdir():
        sources = folder.iterdir() if folder.is_dir() else ()
        for source in (each for each in sources if each.name.endswith(".py")):
            for node in ast.walk(ast.parse(source.read_text())):
                launched = node.func if isinstance(node, ast.Call) else None  # kernel[grid](...)
                if isinstance(launched, ast.Subscript) and isinstance(launched.value, ast.Name):
                    found[launched.value.id] = folder.name
    return found


def tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """For each step a table by segment and one by kernel."""
    found = []
    for r in results:
        unit = UNITS[r["kind"]]
        title = (
            f"{r['kind']}, {r['size']:,} {unit}, {r['engine']}: busy {ms(r['busy'])} ms of {ms(r['span'])}, "
            f"floor {ms(r['floor'])}; {r['kernels']:,.0f} kernels, {r['kernels'] / r['layers']:.1f} a layer, "
            f"{r['host_launches']:,.0f} calls of the driver"
        )
        by_segment: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for kernel in r["by_kernel"]:
            total = by_segment[kernel["segment"]]
            total[0] += kernel["count"]
            total[1] += kernel["time"]
        ordered = sorted(by_segment.items(), key=lambda item: -item[1][1])
        rows = [
            (segment, f"{count:,.0f}", ms(time), f"{time / count * 1e3:.1f}", percent(time / r["busy"]))
            for segment, (count, time) in ordered
        ]
        found.append(Table(title, ("segment", "kernels", "ms", "us each", "share"), rows))
        rows = [
            (
                k["name"][:60],
                k["segment"],
                f"{k['count']:,.0f}",
                ms(k["time"]),
                percent(k["time"] / r["busy"]),
            )
            for k in r["by_kernel"][:SHOWN]
        ]
        found.append(Table("its kernels", ("kernel", "segment", "calls", "ms", "share"), rows))
    return found
