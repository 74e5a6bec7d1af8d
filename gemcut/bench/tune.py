"""Finds block sizes for the matrix kernels on this GPU: `python -m gemcut.bench.tune [words of case names]`.

Enters: the full-size cases of the attentions and the experts, and the candidates below. Every candidate is
compared with the fp32 reference, then timed with a cold L2. Leaves: `kernels/<folder>/tuned/<gpu>.json` and a
table of what was best, beside torch's grouped product where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gemcut.bench.timing import Ceilings, measure_ceilings
from gemcut.kernels import Backend
from gemcut.kernels.attention import hopper
from gemcut.kernels.attention import triton as attention
from gemcut.kernels.attention.cases import CASES as ATTENTION
from gemcut.kernels.case import Case, widen
from gemcut.kernels.experts import triton as experts
from gemcut.kernels.experts.cases import CASES as EXPERTS
from gemcut.kernels.tower_attention import hopper as tower_hopper
from gemcut.kernels.tower_attention import triton as tower
from gemcut.kernels.tower_attention.cases import CASES as TOWER
from gemcut.kernels.tuned import enter, table, table_path

TRITON = Backend("triton")
COLD_BYTES = 3 << 26  # input sets are rotated until this much lies between two uses: L2 holds 50 MB
ROUNDS = 5

Chunk, Single, Tile = attention.ChunkConfig, attention.SingleConfig, experts.Config
CHUNKS = {
    256: (
        Chunk(128, 64, 256, 8, 2),
        Chunk(128, 64, 256, 8, 3),
        Chunk(128, 32, 256, 8, 5),
        Chunk(64, 32, 256, 4, 2),
        Chunk(64, 32, 256, 4, 3),
        Chunk(64, 32, 256, 4, 5),
    ),
    512: (
        Chunk(128, 32, 256, 8, 2),
        Chunk(128, 32, 256, 8, 3),
        Chunk(64, 32, 512, 8, 2),
        Chunk(64, 32, 256, 4, 2),
        Chunk(64, 32, 256, 4, 3),
        Chunk(32, 32, 512, 8, 2),
    ),
}
SINGLES = {
    256: (
        Single(64, 132, 4, 3),
        Single(64, 264, 4, 3),
        Single(32, 264, 4, 3),
        Single(32, 264, 4, 5),
        Single(32, 528, 4, 5),
        Single(16, 528, 4, 7),
    ),
    512: (
        Single(32, 132, 8, 3),
        Single(32, 264, 8, 3),
        Single(32, 264, 4, 3),
        Single(16, 132, 4, 5),
        Single(16, 264, 4, 5),
        Single(16, 264, 8, 7),
    ),
}
# by (token, slot) pairs up to which they may serve
GLU = {
    512: (
        Tile(16, 32, 128, 4, 5),
        Tile(16, 32, 256, 4, 4),
        Tile(16, 64, 64, 4, 6),
        Tile(16, 64, 128, 4, 4),
        Tile(16, 64, 128, 4, 6),
        Tile(16, 64, 256, 4, 3),
        Tile(16, 128, 64, 4, 5),
        Tile(16, 128, 128, 4, 4),
    ),
    2048: (
        Tile(16, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(32, 64, 64, 4, 5),
        Tile(32, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(64, 128, 64, 4, 4),
    ),
    8192: (
        Tile(64, 128, 64, 4, 3),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 3, thin=True),
        Tile(64, 256, 64, 8, 4, copied=True),
        Tile(64, 128, 64, 4, 4, copied=True),
        Tile(128, 256, 64, 8, 4, thin=True, copied=True),
    ),
    sys.maxsize: (
        Tile(128, 256, 64, 8, 4, thin=True),
        Tile(128, 256, 64, 8, 4, thin=True, copied=True),
        Tile(128, 256, 64, 8, 3, thin=True, copied=True),
        Tile(128, 128, 64, 4, 4, thin=True, copied=True),
        Tile(128, 128, 64, 8, 4, thin=True, copied=True),
    ),
}
LINEAR = GLU | {
    512: (
        Tile(16, 32, 64, 4, 6),
        Tile(16, 32, 64, 2, 8),
        Tile(16, 64, 64, 4, 4),
        Tile(16, 64, 64, 4, 6),
        Tile(16, 64, 64, 4, 8),
        Tile(16, 128, 64, 4, 4),
        Tile(16, 128, 64, 4, 6),
    ),
    8192: (*GLU[8192], experts.FETCHERS),
    sys.maxsize: (*GLU[sys.maxsize], experts.FETCHERS),
}
PICTURES = (
    tower.Config(128, 64, 8, 3),
    tower.Config(128, 128, 8, 2),
    tower.Config(128, 64, 4, 2),
    tower.Config(128, 128, 4, 2),
    tower.Config(64, 64, 4, 2),
    tower.Config(64, 64, 4, 3),
    tower.Config(64, 128, 4, 2),
    tower.Config(64, 32, 4, 4),
)
# where the kernel for Hopper serves, beside those above
HOPPER_PICTURES = (
    tower_hopper.Config(3, 128, 4),
    tower_hopper.Config(3, 64, 6),
    tower_hopper.Config(4, 64, 8),
    tower_hopper.Config(2, 64, 6),
    tower_hopper.Config(2, 128, 4),
)

Config = attention.ChunkConfig | attention.SingleConfig | experts.Config | tower.Config | tower_hopper.Config


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tuned table is read for some inputs, and what may stand there: nothing, if their kernel has one
    shape."""

    module: str
    key: str
    size: int
    candidates: Sequence[Config]


@dataclass(frozen=True, slots=True)
class Timing:
    """error: relative to the fp32 reference's norm, over that of the reference in bf16."""

    config: Config
    microseconds: float
    error: float


def place(case: Case, inputs: Mapping[str, Any]) -> Place:
    """The table entry that the case's call reads."""
    if "q" in inputs and "starts" in inputs:
        candidates = PICTURES + HOPPER_PICTURES if tower_hopper.serves(inputs["q"]) else PICTURES
        return Place(tower.__file__, tower.shape_key(inputs["q"]), 0, candidates)
    if "q" in inputs:
        q, kv_heads, rows = inputs["q"], inputs["k_pages"].shape[2], inputs["seq_lens"].shape[0]
        if q.shape[0] == rows:
            key = attention.shape_key("singles", q, kv_heads)
            return Place(attention.__file__, key, rows, SINGLES[q.shape[2]])
        key = attention.shape_key("chunks", q, kv_heads)
        fixed = hopper.serves(q, inputs["k_pages"], inputs["spans"], inputs["window"])
        return Place(attention.__file__, key, q.shape[0], () if fixed else CHUNKS[q.shape[2]])
    product, weight, choices = ("glu", "gate_up", GLU) if "gate_up" in inputs else ("linear", "down", LINEAR)
    pairs = inputs["routing"].order.shape[0]
    candidates = next(choices[limit] for limit in sorted(choices) if pairs <= limit)
    return Place(experts.__file__, experts.shape_key(product, inputs[weight]), pairs, candidates)


def cases(words: Sequence[str]) -> list[Case]:
    """Full-size cases, except rows of several lengths and cached prefixes: they read the same entries."""
    chosen = []
    for case in (*EXPERTS, *ATTENTION, *TOWER):
        if not case.full_size or "prefill 512 of" in case.name or "mixed prefill" in case.name:
            continue
        if words and not any(word in str(case) for word in words):
            continue
        chosen.append(case)
    return chosen


def compile_all(chosen: Sequence[Case], processes: int) -> None:
    """Fill Triton's cache on all cores: compiling takes far longer than timing."""
    jobs = []
    seen = set()
    for case in chosen:
        inputs = _inputs(case)
        at = place(case, inputs)
        for config in at.candidates:
            if (at.module, at.key, config) not in seen:
                seen.add((at.module, at.key, config))
                jobs.append((str(case), config))
        del inputs
    torch.cuda.empty_cache()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True)))


def _compile(name: str, config: Config) -> None:
    case = next(case for case in cases(()) if str(case) == name)
    inputs = _inputs(case)
    at = place(case, inputs)
    enter(at.module, at.key, at.size, torch.cuda.get_device_name(), asdict(config))
    try:
        case.run(inputs, TRITON)
        torch.cuda.synchronize()
    except Exception as error:  # measure() meets the same error and reports it
        print(f"{name} {config}: {type(error).__name__}", file=sys.stderr)
    del inputs
    torch.cuda.empty_cache()


def _inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    return case.make_inputs(torch.Generator("cuda").manual_seed(seed), torch.device("cuda"), torch.bfloat16)


def measure(case: Case) -> Iterator[Timing]:
    """Every candidate of a case that compiles."""
    sets = [_inputs(case, seed) for seed in range(min(32, max(2, -(-COLD_BYTES // case.bytes))))]
    at = place(case, sets[0])
    (name,) = case.outputs
    truth = case.run(widen(sets[0]), Backend())[name].float()
    own_error = (case.run(sets[0], Backend())[name].float() - truth).norm()
    gpu = torch.cuda.get_device_name()
    for config in at.candidates:
        enter(at.module, at.key, at.size, gpu, asdict(config))
        try:
            out = case.run(sets[0], TRITON)[name].float()
            error = ((out - truth).norm() / own_error).item()
            yield Timing(
                config, time_graph(lambda: [case.run(inputs, TRITON) for inputs in sets]) / len(sets), error
            )
        except Exception as error:
            print(f"{case} {config}: {type(error).__name__}: {error}", file=sys.stderr)


def time_graph(call: Any) -> float:
    """Microseconds of one replay of what `call` launches, median of some."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times[1:])


def time_torch(case: Case) -> float | None:
    """torch._grouped_mm on rows that are gathered already, without the activation: the experts' baseline."""
    inputs = _inputs(case)
    if "routing" not in inputs:
        return None
    routing = inputs["routing"]
    if "h" in inputs:
        x, weight = inputs["h"][routing.order // routing.experts.shape[1]], inputs["gate_up"]
    else:
        x, weight = inputs["m"], inputs["down"]
    offsets = routing.offsets[1:].int()
    product = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
    return time_graph(lambda: product(x, weight.transpose(1, 2), offs=offsets))


def row(case: Case, best: Timing, baseline: float | None, ceilings: Ceilings) -> str:
    least = {
        "bytes": case.bytes / ceilings.copy_bytes * 1e6,
        "matrix": case.flops / ceilings.matrix_flops * 1e6,
    }
    bound = max(least, key=lambda name: least[name])
    rate = case.flops / best.microseconds / 1e6 if bound == "matrix" else case.bytes / best.microseconds / 1e6
    config = ",".join(str(value) for value in asdict(best.config).values())
    torch_time = f"{baseline:9.1f}" if baseline is not None else 9 * " "
    share = least[bound] / best.microseconds
    return (
        f"{case!s:<46} {best.microseconds:9.1f} {torch_time} {rate:7.2f} {share:6.1%} "
        f"{bound:<6} {best.error:5.2f} {config}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gemcut.bench.tune", description=__doc__)
    parser.add_argument("words", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--processes", type=int, default=12, help="that compile")
    parser.add_argument("--log", type=Path, help="where every candidate's time goes, as JSON")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.get_device_name()
    chosen = cases(options.words)
    began = time.perf_counter()
    compile_all(chosen, options.processes)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    ceilings = measure_ceilings()
    log, lines = [], []
    for case in chosen:
        if not place(case, _inputs(case)).candidates:
            continue
        timings = list(measure(case))
        log += [{"case": str(case)} | asdict(timing) for timing in timings]
        right = [timing for timing in timings if timing.error <= 1.5]
        for timing in timings:
            if timing not in right:
                print(f"WRONG: {case} {timing}", file=sys.stderr)
        if not right:
            print(f"{case}: no candidate is right", file=sys.stderr)
            continue
        best = min(right, key=lambda timing: timing.microseconds)
        at = place(case, _inputs(case))
        enter(at.module, at.key, at.size, gpu, asdict(best.config))
        path = table_path(at.module, gpu)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(table(at.module, gpu), indent=1, sort_keys=True) + "\n")
        lines.append(row(case, best, time_torch(case), ceilings))
        print(lines[-1], flush=True)
        torch.cuda.empty_cache()
    if options.log is not None:
        options.log.write_text(json.dumps(log, indent=1) + "\n")
    print(
        f"{gpu}: copies {ceilings.copy_bytes / 1e12:.3f} TB/s, multiplies at "
        f"{ceilings.matrix_flops / 1e12:.0f} TFLOP/s; {time.perf_counter() - began:.0f} s"
    )
    print(f"{'case':<46} {'us':>9} {'torch us':>9} {'T/s':>7} {'share':>6} {'bound':<6} {'error':>5} config")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
