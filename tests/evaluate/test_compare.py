"""Two settings on the same questions: equal ones are found equal, a broken kernel is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from gemcut.config import EngineConfig
from gemcut.evaluate.compare import Comparison, Limits, Side, compare, findings
from gemcut.evaluate.demo import Demo
from gemcut.evaluate.statistics import Estimate
from gemcut.evaluate.task import Item
from gemcut.kernels.attention import op

BASE = EngineConfig(device="cpu", kv_bytes=64 << 20, enable_prefix_caching=False)
NAMES = ("deterministic=off", "deterministic=on")
SIDES = ({"deterministic": False}, {"deterministic": True})
Attend = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(islice(Demo(signs=False).items(), 16))


def test_settings_that_compute_the_same_are_found_the_same(items: list[Item]) -> None:
    told: list[str] = []
    found = compare(Demo(), items, BASE, SIDES, NAMES, tell=told.append)
    assert found.findings == []
    assert found.agreeing == found.items == 16
    assert found.partings == []
    assert found.difference == Estimate(0.0, 0.0, 16)
    assert [side.score.mean for side in found.sides] == [found.sides[0].score.mean] * 2
    assert found.sides[0].score.mean > 0.9
    assert [each.where for each in found.divergences] == [
        "in the questions",
        "in the answers, read at once",
        "in the answers, token by token",
    ]
    for each in found.divergences:
        assert each.mean < 1e-5, each
        assert each.listed > 0.99
    # every token of every answer was judged, both ways
    assert found.divergences[1].positions == found.divergences[2].positions > 32
    assert any(NAMES[1] in line for line in told)


def causal_pictures(attend: Attend) -> Attend:
    """Vision blocks that do not see themselves whole, as `use_bidirectional_attention` ignored would do."""

    def broken(*given: Any) -> torch.Tensor:
        *tensors, _spans, window, deterministic = given
        return attend(*tensors, None, window, deterministic)

    return broken


def short_window(attend: Attend) -> Attend:
    """Sliding windows that are too short by half."""

    def broken(*given: Any) -> torch.Tensor:
        *tensors, window, deterministic = given
        return attend(*tensors, window and window // 2, deterministic)

    return broken


def late_heads(attend: Attend) -> Attend:
    """The last head's output a little too small, as a wrong scale of one tile would make it."""

    def broken(*given: Any) -> torch.Tensor:
        out = attend(*given)
        out[:, -1] *= 0.5
        return out

    return broken


@pytest.mark.parametrize("fault", [causal_pictures, short_window, late_heads])
def test_a_broken_kernel_is_found(
    fault: Callable[[Attend], Attend], items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken in one of the two settings only."""
    attend = op.attend

    def either(*given: Any) -> torch.Tensor:
        return (fault(attend) if given[-1] else attend)(*given)

    monkeypatch.setattr(op, "attend", either)
    found = compare(Demo(), items, BASE, SIDES, NAMES, reference={"dtype": "float32"})
    assert found.findings
    assert found.from_reference is not None
    for one, other in zip(*found.from_reference, strict=True):
        assert one.mean < 1e-5 < other.mean
    for parting in found.partings:
        # the reference computes what the first side does
        assert parting.reference_margin == pytest.approx(parting.margin, abs=1e-3)
        assert parting.tokens[0] != parting.tokens[1]


def test_a_request_that_fails_is_found(items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are none end the request; its answer is not taken for one that agrees."""
    attend = op.attend

    def either(*given: Any) -> torch.Tensor:
        out = attend(*given)
        return out * math.nan if given[-1] else out

    monkeypatch.setattr(op, "attend", either)
    found = compare(Demo(), items[:4], BASE, SIDES, NAMES)
    assert found.agreeing == 0
    assert all(parting.answers[1] == "" and parting.at == 0 for parting in found.partings)
    assert any("requests failed" in finding for finding in found.findings)
    assert found.difference.mean == -found.sides[0].score.mean


def test_limits_by_hand() -> None:
    side = Side(
        name="s", used={"dtype": "float32"}, forwards={}, score=Estimate(1, 0, 4), errors={}, wall_s=1.0
    )
    same = Comparison(
        task="demo",
        model=None,
        items=4,
        sides=(side, side),
        agreeing=4,
        difference=Estimate(0.0, 0.0, 4),
        partings=[],
        divergences=[],
        reference=None,
        from_reference=None,
    )
    assert findings(same, Limits()) == []
    assert findings(replace(same, difference=Estimate(-0.02, 0.01, 4)), Limits()) == []
    assert "-4.00%" in findings(replace(same, difference=Estimate(-0.04, 0.01, 4)), Limits())[0]
