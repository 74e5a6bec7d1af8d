"""Every case of every kernel folder: interpreted on a CPU, and on a GPU in the dtypes that it serves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gemcut.kernels import Backend
from gemcut.kernels.case import Case, all_cases, widen

CASES = list(all_cases())
SMALL = [case for case in CASES if not case.full_size]
FULL = [case for case in CASES if case.full_size]
HALF = (torch.bfloat16, torch.float16)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here, not interpreted")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_names_are_unique() -> None:
    names = [str(case) for case in CASES]
    assert len(names) == len(set(names))


def each(cases: list[Case], marks: Sequence[pytest.MarkDecorator]) -> pytest.MarkDecorator:
    """Every case with each of the numerics that make a difference to it."""
    return pytest.mark.parametrize(
        ("case", "numerics"),
        [
            pytest.param(case, numerics, id=f"{case}-{numerics}", marks=marks)
            for case in cases
            for numerics in case.numerics
        ],
    )


@each(SMALL, [no_gpu])
def test_interpreted(case: Case, numerics: Any) -> None:
    # fp32 only: the interpreter truncates stores to bf16 instead of rounding them
    accept(case, torch.device("cpu"), torch.float32, Backend("triton", numerics))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@each(SMALL, on_gpu)
def test_small_on_gpu(case: Case, dtype: torch.dtype, numerics: Any) -> None:
    accept(case, torch.device("cuda"), dtype, Backend("triton", numerics))


@each(FULL, on_gpu)
def test_full_on_gpu(case: Case, numerics: Any) -> None:
    accept(case, torch.device("cuda"), torch.bfloat16, Backend("triton", numerics))


def accept(case: Case, device: torch.device, dtype: torch.dtype, backend: Backend) -> None:
    """The kernel's outputs against the reference's in the same dtype, and both against fp32."""
    inputs = case.make_inputs(torch.Generator(device).manual_seed(0), device, dtype)
    reference = case.run(inputs, Backend())
    truth = case.run(widen(inputs), Backend()) if dtype in HALF else reference
    with poisoned_memory():
        got = case.run(inputs, backend)
    for name, want in reference.items():
        out = got[name]
        assert out.shape == want.shape, f"{name}: shape"
        assert out.dtype == want.dtype, f"{name}: dtype"
        assert out.is_contiguous(), f"{name}: not contiguous"
        if name in case.exact:
            same = (out == want) | ((out != out) & (want != want))
            assert same.all(), (
                f"{name}: {(~same).sum()} values differ, first at {(~same).flatten().int().argmax()}"
            )
            continue
        counted = ~want.isnan()  # NaN in the reference is padding that was poisoned
        compare(name, out[counted], want[counted], truth[name][counted], case, backend)


def compare(
    name: str, out: torch.Tensor, want: torch.Tensor, truth: torch.Tensor, case: Case, backend: Backend
) -> None:
    out_error, want_error = (out.double() - truth.double()).abs(), (want.double() - truth.double()).abs()
    assert not out_error.isnan().any(), f"{name}: NaN where the reference has none"
    if not out_error.numel():
        return
    ulp = torch.finfo(out.dtype).eps * truth.double().abs().max().item()
    # in fp32 the reference is its own truth: another order of summation costs a few ulps
    slack = case.tolerance * ulp * (8 if out.dtype == torch.float32 else 1)
    worst, allowed = out_error.max().item(), 1.5 * want_error.max().item() + slack
    assert worst <= allowed, f"{name}: error {worst:.3g} at {out_error.argmax()}, allowed {allowed:.3g}"
    mean, allowed = out_error.mean().item(), 1.5 * want_error.mean().item() + slack / 8
    assert mean <= allowed, f"{name}: mean error {mean:.3g}, allowed {allowed:.3g}"
    if backend.numerics == "reference" and case.flips is not None and out.dtype in HALF:
        flipped = (out != want).double().mean().item()
        assert flipped <= case.flips, f"{name}: {flipped:.2%} of the values are not the reference's"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer: an output that is not written shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operations without a deterministic form say so
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
