"""Means, errors and distances, against cases worked by hand."""

from __future__ import annotations

import math

import pytest

from gemcut.data import TokenLogprobs
from gemcut.evaluate.statistics import Estimate, distance, percentile


def listed(*probabilities: float, chosen: int = 0) -> TokenLogprobs:
    top = tuple((token, math.log(p)) for token, p in enumerate(probabilities))
    return TokenLogprobs(token_id=chosen, logprob=top[chosen][1], rank=chosen + 1, top=top)


def test_an_error_is_that_of_the_mean() -> None:
    # 3 of 4 right: variance (3 * 0.25**2 + 0.75**2) / 3 = 0.25, error sqrt(0.25 / 4)
    assert Estimate.of([1, 1, 0, 1]) == Estimate(0.75, 0.25, 4)
    assert Estimate.of([0.5]) == Estimate(0.5, 0.0, 1)


def test_the_same_distributions_are_no_distance_apart() -> None:
    found = distance(listed(0.7, 0.2), listed(0.7, 0.2))
    assert found.kl == pytest.approx(0.0, abs=1e-12)
    assert found.listed == pytest.approx(0.9)
    assert found.same


def test_a_distance_by_hand() -> None:
    found = distance(listed(0.5, 0.25), listed(0.25, 0.5))
    # 1/2 ln 2 + 1/4 ln 1/2 + 1/4 ln 1
    assert found.kl == pytest.approx(0.25 * math.log(2))


def test_the_bucket_holds_what_only_one_side_lists() -> None:
    first, second = listed(0.6, 0.3), listed(0.5)
    # token 0, and 0.4 against 0.5 for all others
    assert distance(first, second).kl == pytest.approx(0.6 * math.log(1.2) + 0.4 * math.log(0.8))
    assert distance(first, second).listed == pytest.approx(0.6)


def test_merging_never_enlarges_the_distance() -> None:
    p, q = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    whole = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    for count in range(1, 5):
        assert distance(listed(*p[:count]), listed(*q[:count])).kl <= whole + 1e-12


def test_a_token_that_the_other_side_holds_impossible_is_far_but_not_endless() -> None:
    certain = TokenLogprobs(token_id=0, logprob=0.0, rank=1, top=((0, 0.0),))
    other = TokenLogprobs(token_id=0, logprob=-30.0, rank=2, top=((1, 0.0), (0, -30.0)))
    found = distance(certain, other)
    assert 10 < found.kl < 50
    assert not found.same


def test_percentiles() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1, 1, 3, 5, 5]


def test_values_of_one_draw_count_once() -> None:
    """Four equal answers to each of two questions tell as much as one to each."""
    single = Estimate.of([1.0, 0.0])
    fourfold = Estimate.of([1.0, 0.0] * 4, ["a", "b"] * 4)
    assert (fourfold.mean, fourfold.error) == (single.mean, single.error)
    assert fourfold.count == 8
    assert Estimate.of([1.0, 0.0, 0.0], "abc") == Estimate.of([1.0, 0.0, 0.0])
    assert Estimate.of([1.0, 0.0], "aa").error == 0.0
    # by hand: means 1/2 and 1 around 3/4, as two draws
    assert Estimate.of([1.0, 0.0, 1.0, 1.0], "aabb").error == pytest.approx(0.25)
