"""Prefill: one prompt, one new token, from the engine's door to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemcut.bench.contender import Contender, Gemcut, by_turns, text_prompt
from gemcut.bench.profile import count_launches, warm_up
from gemcut.bench.records import Table, ms, percent
from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import Times

TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WARM_UPS = 2  # the first compiles what is left to compile
DEVICE_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds. wall: what a user of the Python API waits for the token. device: the step on the GPU
    when it need not wait for the host. share: floor / wall. kernels: launched on the device, a layer;
    host_launches: calls of the driver, a graph's replay counting as one; both None unless they were counted.
    """

    tokens: int
    engine: str
    floor: float
    wall: Times
    device: Times | None
    share: float
    kernels: float | None = None
    host_launches: int | None = None


def measure(
    contenders: Sequence[Contender],
    roofline: Roofline,
    tokens: Sequence[int],
    rounds: int,
    *,
    launches: bool = False,
) -> list[Row]:
    """Every length, the contenders by turns; each round has a prompt of its own. launches: count them too,
    after everything is timed."""
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
    return _with_launches(rows, contenders) if launches else rows


def _with_launches(rows: Sequence[Row], contenders: Sequence[Contender]) -> list[Row]:
    ours = {contender.name: contender for contender in contenders if isinstance(contender, Gemcut)}
    for contender in ours.values():
        warm_up(contender)
    found = []
    for row in rows:
        contender = ours.get(row.engine)
        if contender is not None:
            prompt = text_prompt(contender.plan, row.tokens, seed=0)
            kernels, host_launches = count_launches(contender, prompt)
            row = replace(row, kernels=kernels, host_launches=host_launches)
        found.append(row)
    return found


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
    counted = any(r["kernels"] is not None for r in results)
    if counted:
        header += ("kernels a layer", "driver calls")
    rows = [
        (
            f"{r['tokens']:,}",
            r["engine"],
            ms(r["floor"]),
            *(ms(r["wall"][key]) for key in ("median", "p20", "p80")),
            ms(r["device"] and r["device"]["median"]),
            percent(r["share"]),
            *((f"{r['kernels']:.1f}", f"{r['host_launches']:,}") if counted else ()),
        )
        for r in results
    ]
    return Table("Prefill of one prompt, one new token", header, rows)
