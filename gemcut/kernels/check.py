"""Checks at the door of an operation. They cost host time only and read no tensor's values.

A message names the operation, the argument, what was expected and what came:
`add_norm: weight must be [2560] bfloat16 on cuda:0, got [2816] bfloat16 on cuda:0`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

INTS = (torch.int32, torch.int64)


def check(
    operation: str,
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless `tensor` has this shape (None: any size), dtype and device, and is dense."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if (
        tensor.dtype in dtypes
        and (tensor.shape == shape or _fits(tensor.shape, shape))  # the first is fast, and often true
        and tensor.device == device
        and tensor.is_contiguous()
    ):
        return
    want = f"[{', '.join('*' if size is None else str(size) for size in shape)}]"
    names = " or ".join(_short(d) for d in dtypes)
    dense = "" if tensor.is_contiguous() else ", not contiguous"
    raise ValueError(
        f"{operation}: {name} must be {want} {names} on {device}, "
        f"got {list(tensor.shape)} {_short(tensor.dtype)} on {tensor.device}{dense}"
    )


def _fits(have: Sequence[int], want: Sequence[int | None]) -> bool:
    if len(have) != len(want):
        return False
    for size, wanted in zip(have, want, strict=True):  # noqa: SIM110 (a generator takes twice as long)
        if wanted is not None and size != wanted:
            return False
    return True


def check_activation(operation: str, name: str, tensor: torch.Tensor, dims: int) -> None:
    """Raise ValueError unless `tensor` is a dense floating-point activation of `dims` dimensions."""
    if tensor.dim() != dims or not tensor.is_floating_point() or not tensor.is_contiguous():
        raise ValueError(
            f"{operation}: {name} must be a contiguous floating-point tensor of {dims} dimensions, "
            f"got {list(tensor.shape)} {_short(tensor.dtype)}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
