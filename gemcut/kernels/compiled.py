"""Compiles the cases' kernels for Hopper without a GPU: `python -m gemcut.kernels.compiled [words]`.

Enters: cases. Leaves: what the assembler says of each kernel they launch: registers, spills, shared
memory, and how wide its loads from memory are. Nothing is launched; a kernel that does not compile raises.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gemcut.kernels.backend import Backend
from gemcut.kernels.case import Case, all_cases

CAPABILITY = 90


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel. registers: of a thread. spilled, shared: bytes. loads: width in bits -> how many."""

    case: str
    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]


class _NoDevice:
    """What the compiler asks a driver: the target. There is nothing to launch on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> list[tuple[str, Any]]:
    """From here on, launches in this process compile and go no further. Returns where kernels arrive, by
    name, each once."""
    run, found, seen = JITFunction.run, [], set()

    def compile(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel: Any = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile
    driver.set_active(_NoDevice())  # pyright: ignore[reportArgumentType]
    return found


def compiled(cases: Iterable[Case], dtype: torch.dtype) -> Iterator[Compiled]:
    """Every kernel of the cases, with each of the numerics that matter to it, each kernel once."""
    kernels = compile_only()
    for case in cases:
        inputs = case.make_inputs(torch.Generator().manual_seed(0), torch.device("cpu"), dtype)
        for numerics in case.numerics:
            case.run(inputs, Backend("triton", numerics))
            for name, kernel in kernels:
                yield _read(f"{case} {numerics}", name, kernel)
            kernels.clear()


def _read(case: str, name: str, kernel: Any) -> Compiled:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [
            get_ptxas(CAPABILITY).path,
            "-v",
            f"--gpu-name=sm_{CAPABILITY}a",
            file.name,
            "-o",
            "/dev/null",
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    loads: dict[int, int] = {}
    for vector, bits in re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+) ", ptx):
        width = int(vector or 1) * int(bits)
        loads[width] = loads.get(width, 0) + 1
    return Compiled(
        case=case,
        kernel=name,
        warps=kernel.metadata.num_warps,
        registers=_number(r"Used (\d+) registers", report),
        spilled=_number(r"(\d+) bytes spill stores", report),
        shared=kernel.metadata.shared,
        loads=loads,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def main(words: Sequence[str]) -> None:
    cases = (
        case
        for case in all_cases()
        if case.full_size and (not words or any(word in str(case) for word in words))
    )
    for found in compiled(cases, torch.bfloat16):
        print(
            f"{found.case:<64} {found.kernel:<22} {found.warps:2} warps {found.registers:3} registers "
            f"{found.spilled:4} B spilled {found.shared:6} B shared, loads {found.loads}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
