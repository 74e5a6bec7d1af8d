"""Times the kernels' full-size cases on a GPU: `python -m gemcut.bench.kernels [words of case names]`.

Enters: the cases of the kernel folders. Leaves: one row a case: median, p20 and p80 of the kernel and of
the torch reference, launches interleaved, and the share of the ceiling, which the same run measures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gemcut.bench.timing import Ceilings, Times, elapsed_us, measure_ceilings
from gemcut.kernels import Backend
from gemcut.kernels.case import Case, all_cases

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
    """Write bench/records/<gpu>/kernels.json: the latest run only, with what is needed to repeat it."""
    name = torch.cuda.get_device_name()
    path = folder / name.lower().replace(" ", "-") / "kernels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    entry = {
        "gpu": name,
        "commit": commit.stdout.strip() or None,
        "versions": {"torch": torch.__version__, "triton": version("triton")},
        "command": command,
        "ceilings": asdict(ceilings),
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(entry, indent=1) + "\n")
    return path


def table(results: Sequence[Result]) -> str:
    lines = [
        f"{'operation':<20} {'case':<34} {'numerics':<9} {'us':>8} {'p20':>8} {'p80':>8} {'torch us':>9} "
        f"{'host us':>8} {'MB':>8} {'share':>6}"
    ]
    lines += [
        f"{r.operation:<20} {r.case:<34} {r.numerics:<9} {r.kernel.median:8.1f} {r.kernel.p20:8.1f} "
        f"{r.kernel.p80:8.1f} {r.reference.median:9.1f} {r.host:8.1f} {r.bytes / 1e6:8.1f} {r.share:6.1%}"
        for r in results
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gemcut.bench.kernels", description=__doc__)
    parser.add_argument("words", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--numerics", choices=("reference", "fused"), action="append")
    parser.add_argument(
        "--records", type=Path, help="folder for the JSON record, bench/records in a checkout"
    )
    options = parser.parse_args(arguments)
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copies {ceilings.copy_bytes / 1e12:.3f} TB/s, "
        f"multiplies at {ceilings.matrix_flops / 1e12:.0f} TFLOP/s"
    )
    results = []
    for case in all_cases():
        if not case.full_size or (options.words and not any(word in str(case) for word in options.words)):
            continue
        for numerics in options.numerics or ("reference",):
            results.append(measure(case, Backend("triton", numerics), ceilings))
    print(table(results))
    if options.records is not None:
        command = " ".join(["python -m gemcut.bench.kernels", *(arguments or sys.argv[1:])])
        print(f"written to {record(results, ceilings, command, options.records)}")


if __name__ == "__main__":
    main()
