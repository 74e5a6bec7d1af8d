"""Prefill: one prompt, one new token, from the engine's door to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcut.bench.contender import Contender, Gemcut, by_turns, text_prompt
from gemcut.bench.records import Table, ms, percent
from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import Times

TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WARM_UPS = 2  # the first compiles what is left to compile
DEVICE_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds. wall: what a user of the Python API waits for the token. device: the step on the GPU
    when it need not wait for the host. share: floor / wall."""

    tokens: int
    engine: str
    floor: float
    wall: Times
    device: Times | None
    share: float


def measure(
    contenders: Sequence[Contender], roofline: Roofline, tokens: Sequence[int], rounds: int
) -> list[Row]:
    """Every length, the contenders by turns; each round has a prompt of its own."""
    rows = []
    for count in tokens:

        def run(contender: Contender, number: int, count: int = count) -> float:
            prompt = text_prompt(roofline.plan, count, seed=number)
            return contender.generate([prompt], 1).wall_s * 1e3

        by_turns(contenders, WARM_UPS, run)
        walls = by_turns(contenders, rounds, run)
        for contender in contenders:
            wall, floor = Times.of(walls[contender.name]), roofline.prefill_ms(count)
            device = _device(contender, count)
            rows.append(Row(count, contender.name, floor, wall, device, floor / wall.median))
    return rows


def _device(contender: Contender, count: int) -> Times | None:
    if not isinstance(contender, Gemcut):
        return None
    with contender.timed_on_device() as spans:
        for number in range(DEVICE_ROUNDS):
            contender.generate([text_prompt(contender.plan, count, seed=number)], 1)
    if not spans:
        return None
    steps = len(spans) // DEVICE_ROUNDS  # more than one if the prompt is read in chunks
    return Times.of([sum(spans[i : i + steps]) for i in range(0, len(spans), steps)])


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    header = ("tokens", "engine", "floor ms", "wall ms", "p20", "p80", "device ms", "of the roofline")
    rows = [
        (
            f"{r['tokens']:,}",
            r["engine"],
            ms(r["floor"]),
            *(ms(r["wall"][key]) for key in ("median", "p20", "p80")),
            ms(r["device"] and r["device"]["median"]),
            percent(r["share"]),
        )
        for r in results
    ]
    return Table("Prefill of one prompt, one new token", header, rows)
