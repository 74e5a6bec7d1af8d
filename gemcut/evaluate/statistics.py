"""Means with their errors, and how far two distributions of the next token are apart."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from gemcut.data import TokenLogprobs

NOTHING = 1e-7  # mass that fp32 logprobs cannot tell from none


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error, over `count` values. error: 0 for a single one, which tells nothing."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], draws: Sequence[Hashable] | None = None) -> Estimate:
        """draws: to which independent draw each value belongs, by default to one of its own; values of one
        draw may depend on each other. There must be one at least."""
        count = len(values)
        assert count, "a mean needs a value"
        mean = math.fsum(values) / count
        deviations: dict[Hashable, float] = {}
        for draw, value in zip(range(count) if draws is None else draws, values, strict=True):
            deviations[draw] = deviations.get(draw, 0.0) + value - mean
        if len(deviations) == 1:
            return cls(mean, 0.0, count)
        squares = math.fsum(deviation**2 for deviation in deviations.values())
        scale = len(deviations) / (len(deviations) - 1)
        return cls(mean, math.sqrt(scale * squares) / count, count)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two distributions of one next token are apart.

    kl: D(first || second) in nats, over the tokens that both list, and one bucket for all others. Merging
    tokens never enlarges it: the whole vocabulary's is at least as large. listed: what the first gives to
    tokens outside the bucket. same: whether both have the same likeliest token.
    """

    kl: float
    listed: float
    same: bool


def distance(first: TokenLogprobs, second: TokenLogprobs) -> Distance:
    """Of two accounts of the token after the same text."""
    a, b = (dict(one.top) | {one.token_id: one.logprob} for one in (first, second))
    shared = a.keys() & b.keys()
    p, q = [math.exp(a[token]) for token in shared], [math.exp(b[token]) for token in shared]
    listed = min(math.fsum(p), 1.0)
    p.append(1.0 - listed)
    q.append(1.0 - min(math.fsum(q), 1.0))
    kl = math.fsum(
        x * math.log(max(x, NOTHING) / max(y, NOTHING)) for x, y in zip(p, q, strict=True) if x > 0.0
    )
    return Distance(kl=max(kl, 0.0), listed=listed, same=first.top[0][0] == second.top[0][0])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
