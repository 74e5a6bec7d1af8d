"""The dense product of a few rows: which products it serves, and that its bits depend on shapes alone."""

from __future__ import annotations

import pytest
import torch

from gemcut.kernels import Backend, linear
from gemcut.kernels.linear import hopper

TRITON = Backend("triton")

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def test_the_shapes_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda _: True)

    def serves(count: int, outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        x = torch.empty(count, inputs, dtype=dtype, device="meta")
        return hopper.serves(x, torch.empty(outputs, inputs, dtype=dtype, device="meta"))

    assert [count for count in (0, 1, 2, 63, 64, 65, 8192) if serves(count, 2816, 2112)] == [2, 63, 64]
    for outputs, inputs in ((8192, 2816), (2816, 4096), (2816, 8192), (4224, 2816), (2816, 2112)):
        assert serves(8, outputs, inputs)
    assert not serves(8, 262144, 2816)  # the head
    assert not serves(8, 9216, 2816)  # 144 tiles for 132 processors
    assert not serves(8, 5376, 8192)  # 84 tiles: too many to share, too few
    assert not serves(8, 128, 2816)
    assert not serves(8, 2816, 704)
    assert not serves(8, 2816, 2116)  # its rows do not begin at multiples of 16 bytes
    assert serves(8, 2816, 2112, torch.float16)
    assert not serves(8, 2816, 2112, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here, not interpreted")
def test_the_interpreter_does_without() -> None:
    x, weight = torch.empty(8, 2112, dtype=torch.bfloat16), torch.empty(2816, 2112, dtype=torch.bfloat16)
    assert not hopper.serves(x, weight)


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("count", [2, 9, 64])
def test_bits_do_not_depend_on_time(count: int) -> None:
    """Whichever program of a tile is the last, eager or replayed, beside other work: the same sum."""
    x, weight, other = draw(count, 4096), draw(2816, 4096), draw(8192, 4096)
    assert hopper.serves(x, weight)
    want = linear(x, weight, backend=TRITON)
    linear(x, other, backend=TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = []
        for _ in range(50):
            linear(x, other, backend=TRITON)
            found.append(linear(x, weight, backend=TRITON))
            found.append(linear(x, weight, backend=TRITON))
    for _ in range(4):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, want) for y in found)
