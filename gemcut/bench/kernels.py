"""Times the kernels' full-size cases on a GPU: `python -m gemcut.bench.kernels [words of case names]`.

Enters: the cases of the kernel folders. Leaves: one row a case: median, p20 and p80 of the kernel and of
the torch reference, launches interleaved, and the share of the ceiling, which the same run measures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemcut.bench.records import Record, Table
from gemcut.bench.timing import Ceilings, Times, elapsed_us, measure_ceilings
from gemcut.kernels import Backend
from gemcut.kernels.case import Case, all_cases
from gemcut.kernels.precompile import precompile

COLD_BYTES = 3 << 26  # input sets are rotated until this much lies between two uses: L2 holds 50 MB
MAX_SETS = 64
ROUNDS = 15
PATIENCE = 2e5  # microseconds a call, in all, for timing a slow reference


@dataclass(frozen=True, slots=True)
class Result:
    """One case, in microseconds. `share`: of the nearer ceiling. `host`: what the host spends on a call."""

    operation: str
    case: str
    numerics: str
    kernel: Times
    reference: Times
    host: float
    bytes: int
    flops: int
    share: float
    ceiling: str


def measure(case: Case, backend: Backend, ceilings: Ceilings, rounds: int = ROUNDS) -> Result:
    """Time one case in bf16 with a cold L2, the kernel and the reference by turns."""
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    count = min(MAX_SETS, max(2, -(-COLD_BYTES // max(case.bytes, 1))))
    sets = [case.make_inputs(generator, device, torch.bfloat16) for _ in range(count)]
    kernel, reference = _runner(case, sets, backend), _runner(case, sets, Backend())
    kernel_times, reference_times = [], []
    for _ in range(rounds):
        kernel_times.append(kernel())
        if len(reference_times) < 2 or sum(reference_times) < PATIENCE:
            reference_times.append(reference())
    least = {
        "copy bandwidth": case.bytes / ceilings.copy_bytes * 1e6,
        "matrix rate": case.flops / ceilings.matrix_flops * 1e6,
    }
    ceiling = max(least, key=lambda name: least[name])
    times = Times.of(kernel_times)
    return Result(
        operation=case.operation.__name__,
        case=case.name,
        numerics=backend.numerics,
        kernel=times,
        reference=Times.of(reference_times),
        host=_host_time(case, sets[0], backend),
        bytes=case.bytes,
        flops=case.flops,
        share=least[ceiling] / times.median,
        ceiling=ceiling,
    )


def launch_all(cases: Sequence[Case], backends: Sequence[Backend]) -> None:
    """Every case once."""
    device = torch.device("cuda")
    for case in cases:
        inputs = case.make_inputs(torch.Generator(device).manual_seed(0), device, torch.bfloat16)
        for backend in backends:
            case.operation(**inputs, backend=backend)


def _runner(case: Case, sets: Sequence[dict[str, Any]], backend: Backend) -> Callable[[], float]:
    """A function that makes one call with every set of inputs and returns microseconds a call."""

    def calls() -> None:
        for inputs in sets:
            case.operation(**inputs, backend=backend)

    if backend.kernels == "torch" and not case.capturable_reference:
        sets = sets[:2]  # it waits for the device between launches: a cold cache is its least trouble
        calls()
        return lambda: elapsed_us(calls) / len(sets)
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    graph.replay()
    return lambda: elapsed_us(graph.replay) / len(sets)


def _host_time(case: Case, inputs: dict[str, Any], backend: Backend, calls: int = 50) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        case.operation(**inputs, backend=backend)
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls * 1e6


def record(results: Sequence[Result], ceilings: Ceilings, command: str, folder: Path) -> Path:
    """Write the record of a run."""
    device = torch.device("cuda")
    return Record.of("kernels", device, ceilings, results, command=command, facts={}).write(folder)


def as_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The kernel and the reference in microseconds, and the share of the nearer ceiling."""
    header = (
        "operation",
        "case",
        "numerics",
        "us",
        "p20",
        "p80",
        "torch us",
        "host us",
        "MB",
        "of the ceiling",
    )
    rows = [
        (
            r["operation"],
            r["case"],
            r["numerics"],
            *(f"{r['kernel'][key]:.1f}" for key in ("median", "p20", "p80")),
            f"{r['reference']['median']:.1f}",
            f"{r['host']:.1f}",
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['share']:.1%}",
        )
        for r in results
    ]
    return Table("Kernels", header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gemcut.bench.kernels", description=__doc__)
    parser.add_argument("words", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--numerics", choices=("reference", "fused"), action="append")
    parser.add_argument(
        "--records", type=Path, help="folder for the JSON record, bench/records in a checkout"
    )
    options = parser.parse_args(arguments)
    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name()}: {ceilings}")
    cases = [
        case
        for case in all_cases()
        if case.full_size and (not options.words or any(word in str(case) for word in options.words))
    ]
    backends = [Backend("triton", numerics) for numerics in options.numerics or ("reference",)]
    began = time.perf_counter()
    print(
        f"{precompile(partial(launch_all, cases, backends))} kernels in {time.perf_counter() - began:.1f} s"
    )
    results = [measure(case, backend, ceilings) for case in cases for backend in backends]
    print(as_table([asdict(result) for result in results]).as_text())
    if options.records is not None:
        command = " ".join(["python -m gemcut.bench.kernels", *(arguments or sys.argv[1:])])
        print(f"written to {record(results, ceilings, command, options.records)}")


if __name__ == "__main__":
    main()
