"""Floors at the ceilings that were measured on one H100, as a separate roofline script gives them."""

from __future__ import annotations

import pytest
import torch
from sizes import config

from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import Ceilings, measure_ceilings
from gemcut.plan import parse_config

H100 = Ceilings(copy_bytes=2.992e12, matrix_flops=771.5e12)


@pytest.fixture(scope="module")
def of_26b() -> Roofline:
    return Roofline(parse_config(config("26B-A4B")), H100, width=2)


PREFILL = {
    16: 11.5,
    64: 16.8,
    128: 17.2,
    256: 17.6,
    512: 19.1,
    1024: 22.4,
    2048: 29.4,
    4096: 44.1,
    8192: 81.5,
}


@pytest.mark.parametrize(("tokens", "ms"), PREFILL.items())
def test_prefill(of_26b: Roofline, tokens: int, ms: float) -> None:
    assert of_26b.prefill_ms(tokens) == pytest.approx(ms, abs=0.06)


@pytest.mark.parametrize(("batch", "ms"), [(1, 2.63), (8, 8.40), (32, 17.49), (64, 21.74)])
def test_decode(of_26b: Roofline, batch: int, ms: float) -> None:
    assert of_26b.decode_ms(batch, 1024) == pytest.approx(ms, abs=0.006)


def test_tower(of_26b: Roofline) -> None:
    assert of_26b.tower_ms(1, 2520) == pytest.approx(4.6, abs=0.06)


@pytest.mark.parametrize(("at_once", "seconds"), [(66, 13.5), (94, 11.4), (128, 9.3), (256, 7.1)])
def test_batch(of_26b: Roofline, at_once: int, seconds: float) -> None:
    assert of_26b.batch_s(256, 1024, 128, at_once, 8192) == pytest.approx(seconds, abs=0.06)


def test_half_the_bandwidth_takes_twice_as_long_where_bytes_decide(of_26b: Roofline) -> None:
    slower = Roofline(of_26b.plan, Ceilings(H100.copy_bytes / 2, H100.matrix_flops), width=2)
    assert slower.decode_ms(1, 1024) == pytest.approx(2 * of_26b.decode_ms(1, 1024), rel=1e-6)


def test_ceilings_of_a_cpu_are_those_of_a_cpu() -> None:
    ceilings = measure_ceilings(torch.device("cpu"))
    assert 1e8 < ceilings.copy_bytes < 1e13
    assert 1e8 < ceilings.matrix_flops < 1e15
