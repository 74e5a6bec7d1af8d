"""The engine's loop: plan, launch, settle. Requests enter with their texts, deltas and outputs leave.

One thread owns a loop. The plan of step n + 1 is made while step n runs, if the runner is asynchronous.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from gemcut.data import Step, StepResult, TokenLogprobs
from gemcut.engine.answer import Answer
from gemcut.engine.limits import Limits
from gemcut.engine.model_files import ChatPrompt, ModelFiles
from gemcut.engine.pages import PagePool
from gemcut.engine.protocol import Runner
from gemcut.engine.scheduler import Scheduler
from gemcut.engine.sequence import End, Progress, Request
from gemcut.errors import InvalidRequest
from gemcut.outputs import Delta, FinishReason, RequestOutput, Stats, Timings, Usage
from gemcut.prompt.grammar import Grammar, Grammars, GrammarState, Phase
from gemcut.sampling import SamplingParams, SlotSampling

log = logging.getLogger(__name__)

REASONS: Mapping[End, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "aborted": "abort",
    "expired": "timeout",
    "failed": "error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a caller wants of the engine.

    chat: the answer is a reply to parse. deadline_s: seconds from now. salt: tenant of the caches.
    """

    request_id: str
    prompt: ChatPrompt
    params: SamplingParams
    chat: bool = True
    priority: int = 0
    deadline_s: float | None = None
    salt: bytes = b""


@dataclass(frozen=True, slots=True)
class Update:
    """News of a job: a delta, and the whole output with the last one."""

    request_id: str
    delta: Delta
    output: RequestOutput | None = None


@dataclass(slots=True)
class _Group:
    """A job in the engine: its answers, one sequence each."""

    job: Job
    answers: list[Answer]
    arrived_s: float
    cached_tokens: int = 0
    seated_s: float | None = None  # when a step first computed something of it
    first_token_s: float | None = None
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    unfinished: int = 0


def answer_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of a request: the request's own for the first, derived ones after."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Engine:
    """Requests to a runner and back. Not thread-safe: one thread calls all methods."""

    def __init__(
        self, files: ModelFiles, limits: Limits, runner: Runner, *, ahead: bool, seed: int | None = None
    ) -> None:
        """ahead: plan and launch a step before the one before it is collected. seed: requests that bring
        none get theirs from it, by order of arrival; None draws them."""
        self.files, self.runner, self.ahead = files, runner, ahead
        self._seeds = random.Random(seed) if seed is not None else random.SystemRandom()
        self.scheduler = Scheduler(limits)
        self._groups: dict[str, _Group] = {}
        self._in_flight: deque[Step] = deque()
        self._num_steps = 0
        self._slots: dict[int, str] = {}  # slot -> sequence seated there by the steps settled so far
        self.grammars = Grammars(
            files.tokenizer,
            files.plan.text.vocab,
            files.defaults.eos,
            suppressed=files.defaults.suppressed,
        )
        self._states: dict[str, GrammarState] = {}  # of the sequences that a grammar rules
        self._seated: dict[int, str] = {}  # slot -> sequence seated there by the steps launched so far
        self._failures: dict[str, str] = {}  # sequences that a grammar ended, until their end is news
        self._kept: list[Progress] = []  # news that came up between steps and are not read yet

    def close(self) -> None:
        """End what the engine started beside itself. It takes no grammars after that."""
        self.grammars.close()

    def add(self, job: Job, grammar: Grammar | None = None) -> None:
        """Queue a job. Raises InvalidRequest or Overloaded; then nothing of it stays.

        grammar: what `grammars.compile` made of the job's structured outputs, for callers with other
        requests to look after; by default it is compiled here and now, which may take seconds.
        """
        if job.request_id in self._groups:
            raise InvalidRequest(f"The request id {job.request_id!r} is in use.", "request_id")
        params = self.files.defaults.fill(job.params)
        params.check_ids(self.files.plan.text.vocab)
        stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(self.files.defaults.eos)
        )
        if params.structured_outputs is not None and grammar is None:
            grammar = self.grammars.compile(params.structured_outputs)
        ruled = grammar is not None or params.max_thought_tokens is not None
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        now = time.monotonic()
        group = _Group(job, [], now)
        submitted: list[str] = []
        try:
            for index in range(params.n):
                sampling = SlotSampling(
                    params=params,
                    seed=answer_seed(seed, index),
                    suppressed=self.files.defaults.suppressed,
                    stop_ids=tuple(sorted(stop_ids)),
                )
                sequence_id = f"{job.request_id}/{index}"
                self.scheduler.submit(
                    Request(
                        request_id=sequence_id,
                        prompt=job.prompt.prompt,
                        media=job.prompt.media,
                        max_tokens=params.max_tokens,
                        min_tokens=params.min_tokens,
                        stop_ids=stop_ids,
                        priority=job.priority,
                        deadline_s=None if job.deadline_s is None else now + job.deadline_s,
                        salt=job.salt,
                        waits_for_token=ruled,
                        reads_prefix=params.prompt_logprobs is None,
                        sampling=sampling,
                    ),
                    now,
                )
                submitted.append(sequence_id)
                if ruled:
                    phase, longest = _phase(job.prompt), params.max_thought_tokens
                    self._states[sequence_id] = self.grammars.begin(grammar, phase, longest)
                group.answers.append(
                    Answer(
                        index,
                        self.files.tokenizer,
                        chat=job.chat,
                        in_thought=job.prompt.in_thought,
                        stop=params.stop,
                    )
                )
        except BaseException:
            for sequence_id in submitted:
                self.scheduler.abort(sequence_id)
                self._states.pop(sequence_id, None)
            # news of others may be waiting beside theirs
            self._kept += [n for n in self.scheduler.drain() if n.request_id not in submitted]
            raise
        group.unfinished = params.n
        self._groups[job.request_id] = group

    def abort(self, request_id: str) -> None:
        """End a job; its last update comes with the next `step`. Nothing happens if it has ended."""
        group = self._groups.get(request_id)
        if group is not None:
            for answer in group.answers:
                self.scheduler.abort(f"{request_id}/{answer.index}")

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is in flight."""
        return not self._groups and not self._in_flight

    def stats(self) -> Stats:
        """Counters and holdings as of now."""
        scheduler, memory, counts = self.scheduler, self.scheduler.memory, self.runner.counts

        def pages(pool: PagePool | None) -> tuple[int, int, int]:
            return (0, 0, 0) if pool is None else (pool.num_free, pool.num_cached, pool.num_used)

        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            steps=self._num_steps,
            preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
            full_pages=pages(memory.full),
            sliding_pages=pages(memory.sliding),
            encoder_tokens=(memory.encoder.num_held, memory.encoder.num_tokens),
            encoder_hits=memory.encoder.num_hits,
            encoder_misses=memory.encoder.num_misses,
            graph_replays=dict(counts.replays),
            eager_forwards=dict(counts.eager),
            dropped_graphs=dict(counts.dropped),
        )

    def step(self) -> list[Update]:
        """Launch the next step, settle the oldest that is due, and return the news."""
        now = time.monotonic()
        step = self.scheduler.plan(now)
        if step is not None:
            self._note_seats(step, now)
            self.runner.launch(step, self._masks(step))
            self._in_flight.append(step)
            self._num_steps += 1
        due = len(self._in_flight) - (1 if self.ahead and step is not None else 0)
        updates: list[Update] = []
        for _ in range(due):
            result = self.runner.collect()
            settled = self._in_flight.popleft()
            for seat in settled.seats:
                self._slots[seat.slot] = seat.request_id
            self._take_prompt_logprobs(settled, result)
            self.scheduler.settle(result)
            updates += self._read_news(result)
        return updates + self._read_news(None)

    def _note_seats(self, step: Step, now: float) -> None:
        for seat in step.seats:
            group = self._groups.get(seat.request_id.rpartition("/")[0])
            if group is not None and group.seated_s is None:
                group.seated_s = now

    def _masks(self, step: Step) -> dict[int, np.ndarray] | None:
        """Masks of the rows that a grammar rules. Each waited for its token, so its state is up to date."""
        for seat in step.seats:
            self._seated[seat.slot] = seat.request_id
        if not self._states:
            return None
        ruled = {
            row.slot: state
            for row in step.rows
            if row.samples and (state := self._states.get(self._seated[row.slot])) is not None
        }
        return self.grammars.masks(ruled) if ruled else None

    # ---- news

    def _read_news(self, result: StepResult | None) -> list[Update]:
        now = time.monotonic()
        updates = []
        waiting, self._kept = [*self._kept, *self.scheduler.drain()], []
        for news in waiting:
            request_id, _, index = news.request_id.rpartition("/")
            group = self._groups.get(request_id)
            if group is not None:
                updates += self._progress(group, group.answers[int(index)], news, result, now)
        return updates

    def _progress(
        self, group: _Group, answer: Answer, news: Progress, result: StepResult | None, now: float
    ) -> list[Update]:
        if answer.finish_reason is not None and news.end is None:
            return []  # a token behind a stop string
        request_id = group.job.request_id
        delta, stopped = None, False
        error = self._failures.get(news.request_id) or self._follow(news)
        if news.token_id is not None and error is None:
            group.cached_tokens = max(group.cached_tokens, news.cached_tokens)
            group.first_token_s = group.first_token_s or now
            logprobs = None
            if result is not None and news.slot is not None:
                logprobs = result.logprobs.get(news.slot)
            try:
                delta, stopped = answer.push(news.token_id, logprobs)
            except Exception:
                error = self._give_up(news)
        if stopped and news.end is None:
            self.scheduler.finish(news.request_id)  # its end comes as news of its own
        if news.end is None:
            return [Update(request_id, delta)] if delta is not None else []
        self._states.pop(news.request_id, None)
        self._failures.pop(news.request_id, None)
        try:
            last = answer.finish("error" if error else REASONS[news.end], error or news.error)
        except Exception:
            last = answer.give_up(self._give_up(news))
        if delta is not None:
            last = _join(delta, last)
        group.unfinished -= 1
        output = None
        if group.unfinished == 0:
            del self._groups[request_id]
            output = self._output(group, now)
        return [Update(request_id, last, output)]

    def _give_up(self, news: Progress) -> str:
        """What goes wrong while one answer is read ends that answer, not the engine. Returns the error."""
        log.exception("the answer of %s could not be read", news.request_id)
        error = "its answer could not be read"
        if news.end is None:
            self._failures[news.request_id] = error
            self.scheduler.abort(news.request_id)  # its end comes as news of its own
        return error

    def _follow(self, news: Progress) -> str | None:
        """Let the sequence's grammar take the token. What it refuses ends the sequence, which is no fault
        of the others."""
        state = self._states.get(news.request_id)
        if state is None or news.token_id is None:
            return None
        error = state.take(news.token_id)
        if error is not None and news.end is None:
            self._failures[news.request_id] = error
            self.scheduler.abort(news.request_id)  # its end comes as news of its own
        return error

    def _output(self, group: _Group, now: float) -> RequestOutput:
        prompt = group.job.prompt.prompt
        outputs = tuple(answer.output() for answer in group.answers)
        first = group.first_token_s or now
        completion = sum(len(output.token_ids) for output in outputs)
        later = completion - len(outputs)
        entries = None
        if group.job.params.prompt_logprobs is not None:
            entries = tuple(group.prompt_logprobs.get(i) for i in range(len(prompt)))
        return RequestOutput(
            request_id=group.job.request_id,
            prompt_token_ids=prompt.token_ids,
            outputs=outputs,
            usage=Usage(
                prompt_tokens=len(prompt),
                cached_tokens=group.cached_tokens,
                image_tokens=sum(s.stop - s.start for s in prompt.spans if s.kind == "image"),
                completion_tokens=completion,
            ),
            timings=Timings(
                queue_s=(group.seated_s or now) - group.arrived_s,
                first_token_s=first - group.arrived_s,
                total_s=now - group.arrived_s,
                tokens_per_s=later / (now - first) if later > 0 and now > first else 0.0,
            ),
            prompt_logprobs=entries,
        )

    def _take_prompt_logprobs(self, step: Step, result: StepResult) -> None:
        for row in step.rows:
            if row.slot in result.prompt_logprobs:
                request_id, _, index = self._slots[row.slot].rpartition("/")
                group = self._groups.get(request_id)
                if group is not None and index == "0":
                    for i, entry in enumerate(result.prompt_logprobs[row.slot]):
                        group.prompt_logprobs[row.start + 1 + i] = entry


def _phase(prompt: ChatPrompt) -> Phase:
    """What a reply to the prompt begins with."""
    if prompt.in_thought:
        return "thought"
    return "opening" if prompt.may_think else "content"


def _join(first: Delta, last: Delta) -> Delta:
    return replace(
        last,
        text=first.text + last.text,
        reasoning=first.reasoning + last.reasoning,
        token_ids=first.token_ids,
        call_started=first.call_started + last.call_started,
        tool_calls=first.tool_calls + last.tool_calls,
        logprobs=first.logprobs,
    )
