"""`python -m soak [NAME...] [--scale X] [--minutes M]`: run soaks and print their figures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from soak import aborts, deaths, drains, drift, loris, malformed, media, nan, overload
from soak.soak_rig import Figure


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="soak", description="Long runs that print the figures of reliability."
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size; 1")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the drift; 60")
    given = parser.parse_args()
    scale = given.scale
    soaks: dict[str, Callable[[], Figure]] = {
        "malformed": lambda: malformed.run(round(10_000 * scale)),
        "media": lambda: media.run(round(100_000 * scale)),
        "aborts": lambda: aborts.run(round(10_000 * scale)),
        "deaths": lambda: deaths.run(max(1, round(50 * scale))),
        "drains": lambda: drains.run(max(2, round(20 * scale))),
        "overload": lambda: overload.run(60 * scale),
        "nan": lambda: nan.run(max(1, round(50 * scale))),
        "loris": lambda: loris.run(60 * scale),
        "drift": lambda: drift.run(given.minutes),
    }
    if unknown := set(given.names) - set(soaks):
        parser.error(f"no soak is called {', '.join(sorted(unknown))}; there are {', '.join(soaks)}")
    status = 0
    for name in given.names or soaks:
        began = time.monotonic()
        figure = soaks[name]()
        print(f"{figure}\n     {name}, {time.monotonic() - began:.0f} s", flush=True)
        status |= bool(figure.misses)
    return status


if __name__ == "__main__":
    sys.exit(main())
