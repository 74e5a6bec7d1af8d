"""What each kernel folder's `cases.py` lists, for the one test file and the one benchmark runner.

A case is one call of an operation: how its arguments are made, which outputs count, how near they must
come, and the bytes and FLOPs that no implementation can avoid. A folder's `cases.py` names a tuple
`CASES`; `all_cases` finds it, so a new kernel adds a folder and no script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, Literal

import torch

import gemcut.kernels
from gemcut.kernels.backend import Backend

MakeInputs = Callable[[torch.Generator, torch.device, torch.dtype], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation at one size.

    name: what is particular about the call, `T=64 H=2816`; unique within the operation.
    operation: the contract's function, called as operation(**inputs, backend=...).
    make_inputs: (generator, device, dtype) -> its arguments; the generator lives on the device.
        Padding belongs in here, poisoned with NaN: what is NaN in the reference's output is not compared.
    outputs: names of what is returned, in order, or the fields of a returned dataclass.
    writes: arguments that are written in place; they are compared like outputs.
    exact: outputs that must equal the reference's in the same dtype: copies and indices.
    bytes, flops: of one call in bf16, each input read once and each output written once.
    full_size: a real model's size, for GPUs and the benchmark; the others also run interpreted on a CPU.
    flips: with reference numerics, the share of values that may differ from the reference at all
        (another order of summation flips few roundings, another rounding flips many); None: not checked.
    numerics: the backend's modes that make a difference here.
    capturable_reference: the torch reference never waits for the device, so a graph can hold it.
    tolerance: how many ulps of an output's largest value its error may exceed 1.5 times the
        reference's own error by, both against the reference in fp32.
    """

    name: str
    operation: Callable[..., Any]
    make_inputs: MakeInputs
    outputs: tuple[str, ...]
    writes: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    bytes: int = 0
    flops: int = 0
    full_size: bool = False
    flips: float | None = 2e-3
    numerics: tuple[Literal["reference", "fused"], ...] = ("reference", "fused")
    capturable_reference: bool = True
    tolerance: float = 1.0

    def __str__(self) -> str:
        return f"{self.operation.__name__} {self.name}"

    def run(self, inputs: Mapping[str, Any], backend: Backend) -> dict[str, torch.Tensor]:
        """Call the operation; every output by its name. Arguments that it writes are copied first."""
        given = dict(inputs) | {name: inputs[name].clone() for name in self.writes}
        returned = self.operation(**given, backend=backend)
        if isinstance(returned, torch.Tensor):
            found = {self.outputs[0]: returned}
        elif isinstance(returned, tuple):
            found = dict(zip(self.outputs, returned, strict=True))
        else:
            found = {name: getattr(returned, name) for name in self.outputs}
        return found | {name: given[name] for name in self.writes}


def normal(
    generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Callable[..., torch.Tensor]:
    """draw(*shape, scale=1.0, shift=0.0): random numbers in this dtype, each drawn in fp32."""

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale + shift).to(dtype)

    return draw


def widen(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with half-precision tensors in fp32: what the truth is computed from."""
    half = (torch.bfloat16, torch.float16)
    return {
        name: value.float() if isinstance(value, torch.Tensor) and value.dtype in half else value
        for name, value in inputs.items()
    }


def all_cases() -> Iterator[Case]:
    """The cases of every kernel folder that has a `cases.py`."""
    for folder in iter_modules(gemcut.kernels.__path__):
        name = f"gemcut.kernels.{folder.name}.cases"
        if folder.ispkg and find_spec(name) is not None:
            yield from import_module(name).CASES
