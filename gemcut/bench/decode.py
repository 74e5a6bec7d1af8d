"""Decode: one token more for each of a batch of sequences, with so many tokens cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gemcut.bench.contender import LASTING, Contender, Gemcut, by_turns, text_prompt
from gemcut.bench.experts import ExpertCounter
from gemcut.bench.records import Table, ms, percent
from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import Times

BATCHES = (1, 8, 32, 64)
CACHED, NEW = 1024, 128
DEVICE_STEPS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds a step.

    slope: (wall of all tokens - wall of one) / (tokens - 1), of medians. step: steps that gave every sequence
    a token; None for an engine whose steps are not seen. device: on the GPU when it need not wait for the
    host. experts: distinct ones that a layer touched in a step, counted on our first contender's answers; the
    floor is made with them. share: floor / step, or floor / slope.
    """

    batch: int
    engine: str
    cached: int
    new_tokens: int
    floor: float
    slope: float
    step: Times | None
    device: Times | None
    experts: float | None
    share: float


def measure(
    contenders: Sequence[Contender],
    roofline: Roofline,
    batches: Sequence[int],
    rounds: int,
    *,
    note: Callable[[str], None],
    cached: int = CACHED,
    new_tokens: int = NEW,
    experts: Mapping[int, float | None] | None = None,
) -> list[Row]:
    """Every batch size, the contenders by turns.

    What does not fit into a contender's memory is left out, and `note` is told. experts: by batch, if they
    were counted before.
    """
    rows = []
    counter = ExpertCounter(contenders)
    for batch in batches:
        prompts = [text_prompt(roofline.plan, cached, seed=i) for i in range(batch)]
        ready = []
        for contender in contenders:
            # as long as the reading of all prompts, so that all run at once for a while
            trace = contender.generate(prompts, min(new_tokens, LASTING))
            if trace.most_running < batch or trace.preemptions:
                note(
                    f"{contender.name}: a batch of {batch} does not fit, {trace.most_running} sequences of "
                    f"{cached:,} tokens ran at once"
                )
            else:
                ready.append(contender)
        if not ready:
            continue
        firsts = by_turns(ready, rounds, lambda c, _, p=prompts: c.generate(p, 1))
        wholes = by_turns(ready, rounds, lambda c, _, p=prompts: c.generate(p, new_tokens))
        counted = (experts or {}).get(batch) or counter.distinct(prompts, wholes[ready[0].name][0].answers)
        floor = roofline.decode_ms(batch, cached, counted)
        for contender in ready:
            traces = wholes[contender.name]
            if preemptions := sum(trace.preemptions for trace in traces):
                note(f"{contender.name}: {preemptions} preemptions at a batch of {batch}: KV memory is short")
            first, whole = (
                Times.of([trace.wall_s * 1e3 for trace in some]).median
                for some in (firsts[contender.name], traces)
            )
            steps = [1e3 * seconds for trace in traces for seconds in trace.step_s]
            if not steps and isinstance(contender, Gemcut):
                note(f"{contender.name}: {new_tokens} tokens are too few for a batch of {batch}")
                continue
            slope = (whole - first) / (new_tokens - 1)
            step = Times.of(steps) if steps else None
            rows.append(
                Row(
                    batch=batch,
                    engine=contender.name,
                    cached=cached,
                    new_tokens=new_tokens,
                    floor=floor,
                    slope=slope,
                    step=step,
                    device=_device(contender, prompts),
                    experts=counted,
                    share=floor / (slope if step is None else step.median),
                )
            )
    counter.close()
    return rows


def _device(contender: Contender, prompts: Sequence[Any]) -> Times | None:
    if not isinstance(contender, Gemcut):
        return None
    with contender.decoding(prompts) as step, contender.timed_on_device() as spans:
        for _ in islice(iter(step, None), DEVICE_STEPS):
            pass
    return Times.of(spans) if spans else None


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    header = (
        *("batch", "engine", "floor ms", "step ms", "p20", "p80", "by wall ms", "device ms", "experts"),
        *("tokens/s", "of the roofline"),
    )
    rows = [
        (
            str(r["batch"]),
            r["engine"],
            ms(r["floor"]),
            *(ms(r["step"] and r["step"][key]) for key in ("median", "p20", "p80")),
            ms(r["slope"]),
            ms(r["device"] and r["device"]["median"]),
            "-" if r["experts"] is None else f"{r['experts']:.1f}",
            f"{r['batch'] / (r['step']['median'] if r['step'] else r['slope']) * 1e3:,.0f}",
            percent(r["share"]),
        )
        for r in results
    ]
    cached = f"{results[0]['cached']:,}" if results else "no"
    return Table(f"Decode, {cached} tokens cached", header, rows)
