"""An offline batch: all requests are there at the beginning, and the last answer ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcut.bench.contender import Contender, Gemcut, by_turns, text_prompt
from gemcut.bench.records import Table, percent
from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import Times

REQUESTS, PROMPT, ANSWER = 256, 1024, 128
WARM_UP = 8  # prompts, and tokens of their answers


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds. at_once: the most sequences that ran together; the floor is made with it. share: floor /
    wall."""

    engine: str
    requests: int
    prompt: int
    answer: int
    at_once: int
    preemptions: int
    floor: float
    wall: Times
    tokens_per_s: float
    share: float


def measure(
    contenders: Sequence[Contender],
    roofline: Roofline,
    rounds: int,
    *,
    note: Callable[[str], None],
    requests: int = REQUESTS,
    prompt: int = PROMPT,
    answer: int = ANSWER,
) -> list[Row]:
    prompts = [text_prompt(roofline.plan, prompt, seed=i) for i in range(requests)]
    by_turns(contenders, 1, lambda contender, _: contender.generate(prompts[:WARM_UP], WARM_UP))
    traces = by_turns(contenders, rounds, lambda contender, _: contender.generate(prompts, answer))
    rows = []
    for contender in contenders:
        runs = traces[contender.name]
        wall = Times.of([run.wall_s for run in runs])
        at_once, preemptions = runs[0].most_running, runs[0].preemptions
        chunk = (
            contender.config.max_num_batched_tokens if isinstance(contender, Gemcut) else requests * prompt
        )
        floor = roofline.batch_s(requests, prompt, answer, at_once, chunk)
        rows.append(
            Row(
                engine=contender.name,
                requests=requests,
                prompt=prompt,
                answer=answer,
                at_once=at_once,
                preemptions=preemptions,
                floor=floor,
                wall=wall,
                tokens_per_s=requests * answer / wall.median,
                share=floor / wall.median,
            )
        )
        if preemptions:
            note(f"{contender.name}: {preemptions} preemptions, its KV memory was full")
    return rows


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    header = ("requests", "engine", "at once", "floor s", "wall s", "new tokens/s", "of the roofline")
    rows = [
        (
            f"{r['requests']} x {r['prompt']:,} + {r['answer']:,}",
            r["engine"],
            str(r["at_once"]),
            f"{r['floor']:.2f}",
            f"{r['wall']['median']:.2f}",
            f"{r['tokens_per_s']:,.0f}",
            percent(r["share"]),
        )
        for r in results
    ]
    return Table("Offline batch", header, rows)
