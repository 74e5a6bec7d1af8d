"""Scheduler and `FakeRunner` in the engine's loop, for tests that set a scene and look at the steps."""

from __future__ import annotations

from gemcut.data import Step
from gemcut.engine.limits import Limits
from gemcut.engine.scheduler import Scheduler
from gemcut.engine.sequence import Request
from gemcut.testing.fake_runner import FakeRunner, Truth


class FakeEngine:
    """`ahead`: the plan of a step is made while the one before is in flight."""

    def __init__(
        self, limits: Limits, ahead: bool = True, row_errors: float = 0.0, encode_errors: float = 0.0
    ) -> None:
        self.scheduler = Scheduler(limits)
        self.runner = FakeRunner(limits, row_errors=row_errors, encode_errors=encode_errors)
        self.ahead = ahead
        self.steps: list[Step] = []
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.truths: dict[str, Truth] = {}
        self.now_s = 0.0

    def submit(self, *requests: Request) -> None:
        """Queue requests at the present time."""
        for request in requests:
            self.scheduler.submit(request, self.now_s)
            self.truths[request.request_id] = self.runner.know(request)
            self.outputs[request.request_id] = []

    def turn(self) -> Step | None:
        """Plan, launch, and settle what is due."""
        scheduler, runner = self.scheduler, self.runner
        step = scheduler.plan(self.now_s)
        self.now_s += 1.0
        if step is not None:
            self.steps.append(step)
            runner.launch(step)
        while scheduler.num_in_flight > (1 if self.ahead and step is not None else 0):
            scheduler.settle(runner.collect())
        self.read_news()
        scheduler.memory.audit(scheduler.running)
        return step

    def read_news(self) -> None:
        """Note tokens and ends; nobody ends twice."""
        for news in self.scheduler.drain():
            assert news.request_id not in self.ends, f"{news.request_id} has news after its end"
            if news.token_id is not None:
                self.outputs[news.request_id].append(news.token_id)
            if news.end is not None:
                self.ends[news.request_id] = news.end
                self.cached[news.request_id] = news.cached_tokens

    def run(self, *requests: Request, most_turns: int = 10_000) -> None:
        """Submit, and turn until all have ended and every step is settled."""
        self.submit(*requests)
        turns = 0
        while self.scheduler.num_unfinished or self.scheduler.num_in_flight:
            self.turn()
            turns += 1
            assert turns <= most_turns, f"not at an end after {most_turns} turns"

    def right(self, request_id: str) -> bool:
        """The request has the output of its solo run (as far as it came, if it was cut short)."""
        truth, output = self.truths[request_id], self.outputs[request_id]
        limit = truth.request.max_tokens or self.scheduler.limits.longest - len(truth.request.prompt)
        tokens, end = truth.alone(limit)
        if self.ends[request_id] in ("stop", "length"):
            return (tokens, end) == (output, self.ends[request_id])
        return tokens[: len(output)] == output
