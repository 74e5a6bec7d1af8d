"""Figure 11: NaN in one row's cache ends that request; the others' tokens and log-probabilities are the same
bits. And what it costs to look."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch

from gemcut import LLM, SamplingParams
from gemcut.data import Row, Step
from gemcut.kernels.logits.op import num_blocks
from gemcut.runner.sample import is_broken
from soak.soak_rig import Figure, missed

ROWS = 16
PAGE = 16
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
PROMPTS = [
    f"<bos>{number} of many things to say, and then {'again ' * (number % 5)}" for number in range(ROWS)
]
MOST_SHARE = 0.01


class Spoiler:
    """Puts NaN into the values of one row's own pages once it has written `after` tokens."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._launch = runner, runner.launch
        self.victim: tuple[int, int] | None = None  # slot, tokens
        self.num_spoiled = 0
        runner.launch = self

    def __call__(self, step: Step, masks: Any = None) -> None:
        for row in step.rows:
            if self.victim is not None and row.slot == self.victim[0] and row.count == 1:
                self.victim = self.victim[0], self.victim[1] - 1
                if self.victim[1] == 0:
                    self._spoil(row)
        self._launch(step, masks)

    def _spoil(self, row: Row) -> None:
        self.victim = None
        self.num_spoiled += 1
        runner = self._runner
        # the page before the one that is being written: full, and none but this row's without prefix caching
        page = int(runner.tables.host[1, row.slot, (row.start - 1) // PAGE])
        for plan, kv in zip(runner.decoder.plan.layers, runner.kv.layers, strict=True):
            if plan.kind == "full":
                kv.v_pages[page] = float("nan")


def run(count: int, seed: int = 0) -> Figure:
    """`count` batches with one row spoiled each."""
    llm = LLM(
        deterministic=True, device="cpu", max_num_seqs=ROWS, page_size=PAGE, enable_prefix_caching=False
    )
    rng = random.Random(seed)
    spoiler = Spoiler(llm._engine.runner)

    def answers() -> list[tuple[str, Any]]:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        return [
            (o.outputs[0].finish_reason, (o.outputs[0].token_ids, o.outputs[0].logprobs)) for o in outputs
        ]

    want = answers()
    errors = changed = 0
    for _ in range(count):
        spoiler.victim = rng.randrange(ROWS), rng.randint(2, 20)
        got = answers()
        errors += sum(reason == "error" for reason, _ in got)
        changed += sum(now != was for now, was in zip(got, want, strict=True) if now[0] != "error")
    after = answers()
    share = guard_share(llm)
    return Figure(
        11,
        f"{count} batches of {ROWS} rows with NaN in one: {errors} requests erred, {changed} others changed "
        f"by a bit; looking for NaN took {100 * share:.2f} % of a decode step",
        missed(
            exactly_those_erred=errors == count == spoiler.num_spoiled,
            neighbours_equal_bit_by_bit=changed == 0,
            pages_are_clean_afterwards=after == want,
            guard_within_1_percent=share <= MOST_SHARE,
        ),
    )


def guard_share(llm: LLM) -> float:
    """Time of the guard over time of a decode step with all rows, medians."""
    engine: Any = llm._engine
    runner = engine.runner
    launch, took = runner.launch, []

    def timed(step: Step, masks: Any = None) -> None:
        began = time.perf_counter()
        launch(step, masks)
        if len(step.rows) == ROWS and all(row.count == 1 for row in step.rows):
            took.append(time.perf_counter() - began)

    runner.launch = timed
    llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    runner.launch = launch
    maxima = torch.randn(ROWS, num_blocks(runner.sampler.vocab))
    looks = []
    for _ in range(200):
        began = time.perf_counter()
        is_broken(maxima)
        looks.append(time.perf_counter() - began)
    return statistics.median(looks) / statistics.median(took)
