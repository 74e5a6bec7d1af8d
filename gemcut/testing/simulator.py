"""The engine's torch-free heart under a virtual clock, with faults.

    python -m gemcut.testing.simulator --seeds 1000 --steps 1000

A seed decides everything: sizes, requests, and what goes wrong when. Each step is checked by the
`FakeRunner`, the books are audited, and every request has to end exactly once, with the output that
it would have had alone. A failing seed is printed with the command that replays it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from random import Random

from gemcut.data import Step
from gemcut.engine.limits import Limits
from gemcut.engine.scheduler import Scheduler
from gemcut.errors import InvalidRequest, Overloaded
from gemcut.testing.fake_runner import FakeRunner, Truth
from gemcut.testing.workload import Workload, draw_limits

AUDIT_EVERY = 16  # steps between two full comparisons of the books
LONGEST_DRAIN = 20_000  # steps that must do for what is left when arrivals stop


class Simulation:
    """One seed's run. `counts` says what happened."""

    def __init__(self, seed: int, limits: Limits | None = None) -> None:
        self.random = random = Random(seed)
        self.limits = limits or draw_limits(random)
        self.scheduler = Scheduler(self.limits)
        failing = random.random() < 0.3
        self.runner = FakeRunner(
            self.limits, random, row_errors=0.004 * failing, encode_errors=0.03 * failing
        )
        self.workload = Workload(random, self.limits)
        self.ahead = random.random() < 0.75
        self.load = random.choice((0.08, 0.3, 0.8))
        self.abort_rate = random.choice((0.0, 0.004, 0.03))
        self.now_s = 0.0
        self.counts: Counter[str] = Counter()
        self._truths: dict[str, Truth] = {}
        self._outputs: dict[str, list[int]] = {}
        self._limit: dict[str, int | None] = {}
        self._ended: set[str] = set()
        self._ballast: tuple[list[int], list[int]] = ([], [])  # pages that an outage withholds
        self._outage = 0
        self._leaving: tuple[list[str], list[str]] = ([], [])  # ended before the last turn, and after

    def run(self, steps: int) -> Counter[str]:
        """`steps` steps under load, then until nothing is left."""
        while self.counts["steps"] < steps:
            self._arrive()
            self._turn()
        drain = 0
        while self.scheduler.num_unfinished or self.scheduler.num_in_flight:
            self._turn()
            drain += 1
            assert drain < LONGEST_DRAIN, "the engine does not come to an end"
        self._end_outage()
        self._check_baseline()
        scheduler, memory = self.scheduler, self.scheduler.memory
        self.counts["preemptions"] = scheduler.num_preemptions
        self.counts["prefix hit tokens"] = scheduler.num_prefix_hits
        self.counts["encoder hits"] = memory.encoder.num_hits
        self.counts["rows"] = self.runner.num_rows
        self.counts["tokens computed"] = self.runner.num_tokens
        self.counts["row errors injected"] = self.runner.num_errors
        return self.counts

    # ---- what comes in

    def _arrive(self) -> None:
        random = self.random
        count = 1 if random.random() < self.load else 0
        if random.random() < 0.004:
            count = random.randint(5, 40)
            self.counts["bursts"] += 1
        for _ in range(count):
            request = self.workload.draw(self.now_s)
            request_id = request.request_id
            try:
                self.scheduler.submit(request, self.now_s)
            except InvalidRequest:
                self.counts["refused"] += 1
            except Overloaded as error:
                self.counts["turned away"] += 1
                if not 1 <= error.retry_after_s <= 120:
                    raise
            else:
                self.counts["admitted"] += 1
                self._truths[request_id] = self.runner.know(request)
                self._outputs[request_id] = []
                self._limit[request_id] = request.max_tokens

    def _meddle(self, phase: str) -> None:
        """Perhaps a client leaves now, or a stop string is found, or memory is short for a while."""
        random = self.random
        if self._truths and random.random() < self.abort_rate:
            request_id = random.choice(list(self._truths))
            act = self.scheduler.abort if random.random() < 0.8 else self.scheduler.finish
            assert act(request_id), f"{request_id} is not known to the scheduler"
            assert not act(request_id), f"{request_id} ended twice"
            self.counts[f"left {phase}"] += 1
            self._read_news()
        if self._outage:
            self._outage -= 1
            if not self._outage:
                self._end_outage()
        elif random.random() < 0.002:
            memory = self.scheduler.memory
            self._outage = random.randint(1, 60)
            self.counts["outages"] += 1
            for pool, ballast in zip((memory.full, memory.sliding), self._ballast, strict=True):
                if pool is not None:
                    ballast += pool.take(random.randint(0, pool.available))

    def _end_outage(self) -> None:
        memory = self.scheduler.memory
        for pool, ballast in zip((memory.full, memory.sliding), self._ballast, strict=True):
            if pool is not None:
                pool.give(ballast)
            ballast.clear()
        self._outage = 0

    # ---- one turn of the engine's loop

    def _turn(self) -> None:
        scheduler, runner = self.scheduler, self.runner
        self._meddle("before a plan")
        step = scheduler.plan(self.now_s)
        self._read_news()
        early = self.random.random() < 0.3  # the last step settles before this one is launched
        if step is not None:
            self.counts["steps"] += 1
            self._count(step)
            self._meddle("before a launch")
            if early and scheduler.num_in_flight == 2:
                self._settle()
            runner.launch(step)
        self._meddle("in flight")
        self._pass_time(step)
        while scheduler.num_in_flight > (1 if self.ahead and step is not None else 0):
            self._settle()
        for request_id in self._leaving[0]:  # a step planned with it was launched by now
            runner.forget(request_id)
        self._leaving = (self._leaving[1], [])
        if self.counts["steps"] % AUDIT_EVERY == 0:
            scheduler.memory.audit(scheduler.running, self._ballast)

    def _settle(self) -> None:
        self.scheduler.settle(self.runner.collect())
        self._read_news()

    def _pass_time(self, step: Step | None) -> None:
        seconds = 0.1
        if step is not None and self.random.random() < 0.01:
            seconds = 15.0
            self.counts["slow steps"] += 1
        self.now_s += seconds

    def _count(self, step: Step) -> None:
        counts, budget = self.counts, self.limits.max_num_batched_tokens
        counts["media encoded"] += len(step.encode)
        counts["media freed"] += len(step.free_media)
        if len(step.rows) == 1 and step.rows[0].count > budget:
            counts["blocks larger than the budget"] += 1

    def _read_news(self) -> None:
        for news in self.scheduler.drain():
            request_id = news.request_id
            assert request_id not in self._ended, f"{request_id} has news after its end"
            output = self._outputs[request_id]
            if news.token_id is not None:
                output.append(news.token_id)
            if news.end is not None:
                self._end(request_id, news.end)
            elif news.error is not None:
                raise AssertionError("an error without an end")

    def _end(self, request_id: str, end: str) -> None:
        truth = self._truths.pop(request_id)
        output, limit = self._outputs.pop(request_id), self._limit.pop(request_id)
        self.counts[end] += 1
        if end == "length" and limit is None:
            limit = len(output)  # all that the context, or the pools, left
            assert limit + len(truth.request.prompt) == self.scheduler.limits.longest, (
                "the default fell short"
            )
        expected, expected_end = truth.alone(limit or self.limits.max_model_len)
        if end == "length":
            assert (output, end) == (expected, expected_end), f"{request_id} differs from its solo run"
        elif end == "stop" and output == expected:
            pass
        else:
            assert output == expected[: len(output)], f"{request_id} differs from its solo run"
        self._ended.add(request_id)
        self._leaving[1].append(request_id)

    def _check_baseline(self) -> None:
        """Everything is where it was at the start."""
        scheduler, memory = self.scheduler, self.scheduler.memory
        assert scheduler.plan(self.now_s) is None, "an empty engine has a step to run"
        memory.audit([])
        for pool in (memory.full, memory.sliding):
            assert pool is None or pool.num_used == 0, "pages are held by nobody"
        assert memory.encoder.num_held == 0, "encoder entries are held by nobody"
        assert not scheduler.running, "a sequence runs on"
        assert not len(scheduler.waiting), "a sequence waits on"
        assert not self._truths, f"{list(self._truths)} have not ended"
        ends = ("stop", "length", "aborted", "expired", "failed")
        total = sum(self.counts[end] for end in ends)
        assert total == self.counts["admitted"], f"{total} ends of {self.counts['admitted']} requests"


def main(arguments: list[str] | None = None) -> int:
    """Run many seeds; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gemcut.testing.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args(arguments)
    total: Counter[str] = Counter()
    began = time.perf_counter()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        simulation = Simulation(seed)
        try:
            total += simulation.run(options.steps)
        except Exception:
            traceback.print_exc()
            print(f"seed {seed} failed after {simulation.counts['steps']} steps: {simulation.limits}")
            command = f"{parser.prog} --first-seed {seed} --seeds 1 --steps {options.steps}"
            print(f"replay: {command}")
            return 1
    seconds = time.perf_counter() - began
    print(f"{options.seeds} seeds, {total['steps']:,} steps, {seconds:.0f} s: nothing broken")
    for name, count in sorted(total.items()):
        print(f"  {name:32} {count:12,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
