"""Each soak in a short version. Times of a busy machine are not judged here, what is right and wrong is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from soak import aborts, deaths, drains, drift, loris, malformed, media, nan, overload
from soak.soak_rig import Figure

# what another program on the same cores can spoil in a run of a few seconds
TIMED = {
    "goodput at least 95 percent",
    "refused within 20 ms p99",
    "live within 100 ms p99",
    "p99 rises less than 10 percent",
    "guard within 1 percent",
    "told within 1 s",
    "not ready within 1 s",
    "back within 10 s",
}
SHORT: dict[str, Callable[[], Figure]] = {
    "malformed": lambda: malformed.run(60),
    "media": lambda: media.run(300),
    "aborts": lambda: aborts.run(150),
    "deaths": lambda: deaths.run(1),
    "drains": lambda: drains.run(2),
    "overload": lambda: overload.run(0.5),
    "nan": lambda: nan.run(1),
    "loris": lambda: loris.run(0.5, connections=200),
    "drift": lambda: drift.run(0.04),
}


@pytest.mark.parametrize("name", SHORT)
def test_short(name: str) -> None:
    figure = SHORT[name]()
    print(figure)
    assert set(figure.misses) <= TIMED, figure
