"""A task run from its first item to its score. Every answer is kept, and a run that broke off goes on.

`answers.jsonl` holds a line an item, in the order in which answers came; `run.json` says what was asked of
whom, `result.json` what came of it. Replies that are there are not asked for again, and are marked anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from gemcut.errors import ConfigError, GemcutError
from gemcut.evaluate.answerers import Answerer
from gemcut.evaluate.baselines import Baseline, baselines
from gemcut.evaluate.statistics import Estimate
from gemcut.evaluate.task import Item, Reply, Task

ANSWERS, RUN, RESULT = "answers.jsonl", "run.json", "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One item, what was replied, and what it is worth. seconds: until the reply was there."""

    item: Item
    reply: Reply
    points: float
    read: Any
    guessed: bool
    seconds: float

    def line(self) -> str:
        """The item's line of answers.jsonl, without pictures."""
        entry = {
            "id": self.item.id,
            "group": self.item.group,
            "question": self.item.question,
            "target": self.item.target,
            **asdict(self.reply),
            "read": self.read,
            "points": self.points,
            "guessed": self.guessed,
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(entry, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """guessed: answers that could not be found in their replies, and were drawn. cut_off: replies that ended
    at max_tokens. failed: items without an answer, with the first error of each kind; the score leaves them
    out."""

    task: str
    asked: Mapping[str, Any]
    score: Estimate
    groups: Mapping[str, Estimate]
    guessed: int
    cut_off: int
    failed: int
    errors: Sequence[str]
    wall_s: float
    baselines: Sequence[Baseline]


def run(
    task: Task,
    answer: Answerer,
    folder: Path,
    asked: Mapping[str, Any],
    *,
    items: int | None = None,
    concurrency: int = 64,
    advance: Callable[[int], object] = lambda number: None,
) -> Result:
    """Ask all items, or the first `items`, and write what comes to `folder`.

    asked: who answers and how, as JSON has it; answers to other things in the folder are not mixed with
    these: ConfigError. advance: called with the number of items that joined the answered ones.
    """
    assert items != 0, "there is nothing to ask"
    began = time.perf_counter()
    wanted = list(islice(task.items(), items))
    if not wanted:
        raise GemcutError(f"{task.name} has no items: its data set is empty.")
    asked = {**asked, **task.choices}
    _check_same(folder, {"task": task.name, **asked})
    held = _held(folder / ANSWERS)
    outcomes = [
        _outcome(task, item, reply, seconds)
        for item in wanted
        if item.id in held
        for reply, seconds in [held[item.id]]
    ]
    advance(len(outcomes))
    errors: list[str] = []
    with (folder / ANSWERS).open("a", encoding="utf-8") as file:
        _end_torn_line(file)
        missing = [item for item in wanted if item.id not in held]
        for item, reply, seconds in _answers(answer, missing, concurrency, errors):
            outcomes.append(_outcome(task, item, reply, seconds))
            file.write(outcomes[-1].line())
            file.flush()
            advance(1)
    if not outcomes:
        raise GemcutError(f"None of {len(wanted)} items was answered: {errors[0]}")
    result = _result(task, asked, outcomes, errors, time.perf_counter() - began)
    _write(folder / RESULT, asdict(result))
    return result


def _answers(
    answer: Answerer, items: Sequence[Item], concurrency: int, errors: list[str]
) -> Iterator[tuple[Item, Reply, float]]:
    """(item, reply, seconds) as they come. Errors of single requests join `errors`."""

    def timed(item: Item) -> tuple[Item, Reply, float]:
        began = time.perf_counter()
        return item, answer(item), time.perf_counter() - began

    left = iter(items)
    threads = ThreadPoolExecutor(concurrency, thread_name_prefix="question")
    running = {threads.submit(timed, item) for item in islice(left, concurrency)}
    try:
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {threads.submit(timed, item) for item in islice(left, len(done))}
            for future in done:
                try:
                    yield future.result()
                except GemcutError as error:
                    errors.append(str(error))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # none runs, unless we were interrupted


def _outcome(task: Task, item: Item, reply: Reply, seconds: float) -> Outcome:
    mark = task.mark(item, reply)
    return Outcome(
        item=item, reply=reply, points=mark.points, read=mark.read, guessed=mark.guessed, seconds=seconds
    )


def _result(
    task: Task, asked: Mapping[str, Any], outcomes: Sequence[Outcome], errors: Sequence[str], wall_s: float
) -> Result:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.item.group, []).append(outcome)
    return Result(
        task=task.name,
        asked=asked,
        score=_score(outcomes),
        groups={name: _score(groups[name]) for name in sorted(groups)},
        guessed=sum(outcome.guessed for outcome in outcomes),
        cut_off=sum(not outcome.reply.complete for outcome in outcomes),
        failed=len(errors),
        errors=list(dict.fromkeys(errors)),
        wall_s=wall_s,
        baselines=baselines(task.name),
    )


def _score(outcomes: Sequence[Outcome]) -> Estimate:
    return Estimate.of(
        [outcome.points for outcome in outcomes],
        [outcome.item.draw for outcome in outcomes],
    )


def _check_same(folder: Path, asked: Mapping[str, Any]) -> None:
    """Make the folder of a run, or check that the one in it is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN
    if not path.exists():
        _write(path, asked)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    other = sorted(key for key in before.keys() | asked.keys() if before.get(key) != asked.get(key))
    if other:
        told = ", ".join(f"{key} {before.get(key)!r}, now {asked.get(key)!r}" for key in other)
        raise ConfigError(f"{folder} holds a run of {told}. Name another --out, or remove the folder.")


def _held(path: Path) -> dict[str, tuple[Reply, float]]:
    """Replies that are there, by item. The last line may be torn: its item is asked again."""
    if not path.exists():
        return {}
    held = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            entry = json.loads(line)
            reply = Reply(text=entry["text"], reasoning=entry["reasoning"], complete=entry["complete"])
            held[entry["id"]] = reply, entry["seconds"]
        except (ValueError, KeyError, TypeError):
            continue
    return held


def _end_torn_line(file: TextIO) -> None:
    """What is written next begins a line of its own."""
    if file.tell():
        with open(file.name, "rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                file.write("\n")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
