"""Pictures of all shapes, head sizes of every tower, empty pictures, padding."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch

from gemcut.kernels.case import Case
from gemcut.kernels.tower_attention.op import tower_attention


def make_inputs(
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    *,
    pictures: tuple[int, ...],
    heads: int,
    head: int,
) -> dict[str, Any]:
    def normal(scale: float) -> torch.Tensor:
        shape = sum(pictures), heads, head
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    starts = torch.tensor([0, *accumulate(pictures)], dtype=torch.int32, device=device)
    return {"q": normal(head**-0.5), "k": normal(1.0), "v": normal(1.0), "starts": starts}


def case(*pictures: int, heads: int = 2, head: int = 8, full_size: bool = False) -> Case:
    count = sum(pictures)
    return Case(
        name=f"{'+'.join(map(str, pictures))} heads={heads} D={head}",
        operation=tower_attention,
        make_inputs=partial(make_inputs, pictures=pictures, heads=heads, head=head),
        outputs=("o",),
        bytes=2 * 4 * count * heads * head,
        flops=4 * heads * head * sum(n * n for n in pictures),
        full_size=full_size,
        numerics=("reference",),
        flips=None,  # probabilities are rounded before the second product
        capturable_reference=False,
    )


CASES = (
    case(9),
    case(36, 0, 81, 9),
    case(63, 45, head=32),
    case(1, 70, head=64),
    case(99, 36, head=72),
    case(*[630] * 8, heads=16, head=72, full_size=True),
    case(2520, heads=16, head=72, full_size=True),
    case(2520, heads=12, head=64, full_size=True),
)
