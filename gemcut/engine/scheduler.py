"""Who runs next. Requests and settled results enter; steps and news leave. Integers only.

    submit -> plan -> (the runner launches) -> settle -> drain

One step ahead: `plan` may be called for step n + 1 while step n is in flight. A sequence whose
sampled token is still unknown then gets a decode row for "the slot's last sampled id". That it ended
shows when step n settles; its row in step n + 1 is by then a ghost: it runs, and its token is
dropped. Everything the sequence held is given back at once nevertheless, because the runner runs
steps in order: whoever gets a page in step n + 2 writes after the ghost.

Order: running sequences before waiting ones, by (priority, arrival). A sequence that needs a page
preempts only those ranked after it, and otherwise stalls with what it has; the first in rank can
always preempt all others and was admitted at the door only if it can run alone, so it always moves.
Who waits preempts nobody.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from gemcut.data import EncodeItem, Row, Seat, Step, StepResult
from gemcut.engine.limits import Limits, admit
from gemcut.engine.memory import Completion, Memory
from gemcut.engine.sequence import End, Progress, Request, Sequence
from gemcut.engine.waiting import WaitingLine
from gemcut.errors import InvalidRequest

STUCK_AFTER = 100  # plans in a row that schedule nothing while something could run

_rank = attrgetter("rank")


@dataclass(slots=True)
class _Draft:
    """A step being planned. `budget`: tokens left; `reserved`: those kept for decode rows to come;
    `own`: the step is for one chunk, whatever the size of its vision block."""

    budget: int
    reserved: int = 0
    own: bool = False
    rows: list[Row] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    seats: list[Seat] = field(default_factory=list)
    encode: list[EncodeItem] = field(default_factory=list)
    encode_tokens: int = 0
    completions: list[Completion] = field(default_factory=list)
    num_chunks: int = 0


@dataclass(frozen=True, slots=True)
class _InFlight:
    step: Step
    sequences: list[Sequence]
    completions: list[Completion]


class Scheduler:
    """Plans steps within `limits`. Time is passed in; equal calls give equal steps."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.memory = Memory(limits)
        self.running: list[Sequence] = []  # by rank
        self.waiting = WaitingLine(limits.max_waiting)
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens that were looked up
        self.num_prefix_hits = 0  # and those that were found
        self._longest = limits.longest
        # Under a page shortage a newcomer waits rather than begin with a sliver.
        self._least_chunk = max(limits.page_size, limits.max_num_batched_tokens // 8)
        self._sequences: dict[str, Sequence] = {}
        self._free_slots = list(range(limits.max_num_seqs))  # a heap: low slots first, dense batches
        self._deadlines: list[tuple[float, int, str]] = []
        self._in_flight: deque[_InFlight] = deque()
        self._news: list[Progress] = []
        self._arrivals = 0
        self._number = 0
        self._num_idle = 0
        self._own_step_due = False
        self._preempting = False  # in this plan somebody was preempted: no newcomers

    # ---- the door and the exit

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. Raises InvalidRequest if it can never run, Overloaded if the queue is full."""
        if request.request_id in self._sequences:
            raise InvalidRequest(f"The request id {request.request_id!r} is in use.", "request_id")
        limits = self.limits
        max_tokens = admit(request, limits, self._longest)
        self.waiting.check_room(now_s)
        self._arrivals += 1
        seq = Sequence(request, max_tokens, self._arrivals, limits.page_size, limits.bidirectional_vision)
        self._sequences[request.request_id] = seq
        self.waiting.join(seq)
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, self._arrivals, request.request_id))

    def abort(self, request_id: str) -> bool:
        """End a request in whatever phase; what it held is free at once. False if it is not here."""
        return self._end_early(request_id, "aborted")

    def finish(self, request_id: str) -> bool:
        """End a request as complete (a stop string was found in its text). False if it is not here."""
        return self._end_early(request_id, "stop")

    def drain(self) -> list[Progress]:
        """The news since the last call, in order."""
        news, self._news = self._news, []
        return news

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not settled: 0, 1 or 2."""
        return len(self._in_flight)

    # ---- planning

    def plan(self, now_s: float) -> Step | None:
        """The next step, or None if nothing can run now. At most one earlier step may be unsettled."""
        assert len(self._in_flight) <= 1, "a third step was planned while two are not settled"
        self._expire(now_s)
        self.memory.begin_step()
        self._preempting = False
        draft = self._plan_own_step(now_s) if self._own_step_due else None
        if draft is None or not draft.rows:
            draft = self._plan_mixed(now_s)
            if not draft.rows and self._own_step_due:  # there are no decode rows to alternate with
                draft = self._plan_own_step(now_s)
        self.memory.check()
        if not draft.rows:
            self._count_idle()
            return None
        self._num_idle = 0
        self._number += 1
        step = Step(
            self._number,
            tuple(draft.rows),
            tuple(draft.seats),
            tuple(draft.encode),
            self.memory.encoder.drain_freed(),
        )
        self._in_flight.append(_InFlight(step, draft.sequences, draft.completions))
        return step

    def _plan_mixed(self, now_s: float) -> _Draft:
        """Decode rows for all that can, chunks with what is left of the budget, then newcomers."""
        running = self.running
        draft = _Draft(self.limits.max_num_batched_tokens, sum([seq.decodes for seq in running]))
        i = 0
        while i < len(running):  # preemption shortens the list behind i
            seq = running[i]
            i += 1
            if seq.in_prefill:
                self._continue(draft, seq)
            elif seq.decodes:
                draft.reserved -= 1
                position = seq.planned
                if position < seq.quiet_until:  # most rows: nothing changes but the position
                    draft.rows.append(Row(seq.slot, position, 1, None, True))
                    draft.sequences.append(seq)
                    draft.budget -= 1
                    seq.planned = position + 1
                    seq.total += 1
                    seq.unknown = True
                elif self._reach_by_preempting(draft, seq, position + 1) > position:
                    self._add_row(draft, seq, position + 1)
        while self.waiting and self._free_slots and not self._preempting and draft.budget > 0:
            if not self._seat(draft, now_s):
                break
        return draft

    def _plan_own_step(self, now_s: float) -> _Draft:
        """One chunk without decode rows beside it: for a vision block that finds no room among them."""
        self._own_step_due = False
        draft = _Draft(self.limits.max_num_batched_tokens, own=True)
        for seq in self.running[:]:
            if seq.in_prefill and seq.phase == "running":
                self._continue(draft, seq)
                if draft.rows:
                    return draft
        if self.waiting and self._free_slots and not self._preempting:
            self._seat(draft, now_s)
        return draft

    def _continue(self, draft: _Draft, seq: Sequence) -> None:
        """The next chunk of a running sequence, as long as budgets and pages admit."""
        start = seq.planned
        stop = self._stop_by_budget(draft, seq)
        if stop > start:
            stop = self._encodable_by_preempting(draft, seq, stop)
        if stop > start:
            stop = self._reach_by_preempting(draft, seq, stop)
        if stop > start:
            self._add_row(draft, seq, stop)

    def _seat(self, draft: _Draft, now_s: float) -> bool:
        """Admit the first that waits, if its next chunk fits. Holds nothing if it does not."""
        seq = self.waiting.first
        assert not seq.unknown, "a sequence was to be seated while its token is in flight"
        self.memory.share_prefix(seq)
        start, others = seq.planned, len(self.running)
        stop = self.memory.encodable(seq, self._stop_by_budget(draft, seq), draft.encode_tokens)
        reach = seq.chunk_stop(start, min(stop, self.memory.reach(seq, others)))
        if others and (
            # Beside others: no sliver, and one that was preempted comes back only when all that it had
            # fits again, or it would be the next victim.
            reach < min(stop, start + self._least_chunk)
            or (seq.num_preempted and not self.memory.holds_all(seq, others))
        ):
            reach = start
        if reach == start:
            self.memory.give_back(seq)
            return False
        self.waiting.leave(now_s)
        seq.slot = heapq.heappop(self._free_slots)
        seq.phase = "running"
        insort(self.running, seq, key=_rank)
        if self.limits.prefix_caching and seq.request.reads_prefix:
            self.num_prefix_queries += seq.total
            self.num_prefix_hits += start
        if seq.num_preempted == 0:
            seq.cached_tokens = start
        self._add_row(draft, seq, reach)
        return True

    def _stop_by_budget(self, draft: _Draft, seq: Sequence) -> int:
        """Where the next chunk may end by the token budget; `planned` if nowhere."""
        start = seq.planned
        room = draft.budget - draft.reserved
        if draft.own:
            room = max(room, seq.blocks.unit(start))
        stop = seq.chunk_stop(start, min(start + room, seq.total))
        if stop == start and draft.num_chunks == 0 and not draft.own:
            self._own_step_due = True  # first in line and yet no room: decode rows step back once
        return stop

    def _encodable_by_preempting(self, draft: _Draft, seq: Sequence, stop: int) -> int:
        """How far towards `stop` the encoder cache has room. If nowhere, those ranked after `seq` with a
        medium half computed lose it: they may themselves be waiting for pages that `seq` holds."""
        while True:
            reach = self.memory.encodable(seq, stop, draft.encode_tokens)
            if reach > seq.planned:
                return reach
            after = self.running[self.running.index(seq) + 1 :]
            victim = next((other for other in reversed(after) if other.held_key is not None), None)
            if victim is None:
                return reach  # held by rows of this step, or by one that goes first
            self._preempt(victim)

    def _reach_by_preempting(self, draft: _Draft, seq: Sequence, stop: int) -> int:
        """How far towards `stop` the pages reach; if nowhere, those ranked after `seq` lose theirs."""
        start = seq.planned
        self.memory.leave_window(seq)
        while True:
            reach = seq.chunk_stop(start, min(stop, self.memory.reach(seq)))
            victim = self.running[-1]
            if reach > start or victim is seq:
                return reach
            if not draft.own:
                draft.reserved -= victim.decodes
            self._preempt(victim)

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        seq.num_preempted += 1
        self._preempting = True
        self._leave_row(seq)
        seq.phase = "waiting"
        self.waiting.join(seq)

    def _add_row(self, draft: _Draft, seq: Sequence, stop: int) -> None:
        """Put [planned, stop) into the step; the pages and encoder room were found to be there."""
        start = seq.planned
        ids, spans, samples = None, (), True
        if seq.in_prefill:
            ids, spans, samples = tuple(seq.ids[start:stop]), seq.spans_in(start, stop), stop == seq.total
            seq.in_prefill = not samples
            draft.num_chunks += 1
            for item in self.memory.take_media(seq, stop):
                draft.encode.append(item)
                draft.encode_tokens += item.medium.soft_tokens
        full_run, sliding_run, completions = self.memory.extend(seq, stop)
        if not seq.is_seated:
            seq.is_seated = True
            request = seq.request
            draft.seats.append(
                Seat(seq.slot, request.request_id, tuple(seq.ids), seq.num_prompt, request.sampling)
            )
        draft.rows.append(Row(seq.slot, start, stop - start, ids, samples, full_run, sliding_run, spans))
        draft.sequences.append(seq)
        draft.completions += completions
        draft.budget -= stop - start
        if samples:
            seq.total += 1
            seq.unknown = True

    def _count_idle(self) -> None:
        """Nothing was planned although nothing is in flight: an error in time, never a spin."""
        if self._in_flight or not self._sequences:
            self._num_idle = 0
            return
        self._num_idle += 1
        if self._num_idle >= STUCK_AFTER:
            raise RuntimeError(
                f"{self._num_idle} plans scheduled nothing: {len(self.running)} sequences run, "
                f"{len(self.waiting)} wait. {self.memory.describe()}"
            )

    # ---- settling

    def settle(self, result: StepResult) -> None:
        """What came of the oldest step in flight: tokens, ends, and pages that may now be found again."""
        flight = self._in_flight.popleft()
        assert result.number == flight.step.number, f"step {flight.step.number} is due, not {result.number}"
        errors, tokens = result.errors, result.tokens
        for done in flight.completions:
            if done.slot not in errors and done.sequence.end != "failed":
                self.memory.name_pages(done)
        for row, seq in zip(flight.step.rows, flight.sequences, strict=True):
            if row.slot in errors:
                for span in row.spans:
                    self.memory.encoder.doom(span.key)
                if seq.phase != "ended":  # judged by the sequence: the slot may be another's by now
                    self.memory.distrust(seq)
                    self._end(seq, "failed")
                    self._report(seq, None, row.slot, errors[row.slot])
            elif row.samples and seq.phase != "ended":
                token = tokens.get(row.slot)
                assert token is not None, f"step {result.number} brings no token for slot {row.slot}"
                seq.ids.append(token)
                seq.unknown = False
                num_generated = len(seq.ids) - seq.num_prompt
                request = seq.request
                if token in request.stop_ids and num_generated > request.min_tokens:
                    self._end(seq, "stop")
                elif len(seq.ids) == seq.limit:
                    self._end(seq, "length")
                self._report(seq, token, row.slot)

    def _report(self, seq: Sequence, token: int | None, slot: int | None, error: str | None = None) -> None:
        self._news.append(
            Progress(seq.request.request_id, token, seq.end, slot, seq.cached_tokens or 0, error)
        )

    def _expire(self, now_s: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, arrival, request_id = heapq.heappop(self._deadlines)
            seq = self._sequences.get(request_id)
            if seq is not None and seq.rank[1] == arrival:  # not a later one that reuses the id
                self._end_early(request_id, "expired")

    def _end_early(self, request_id: str, end: End) -> bool:
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._end(seq, end)
        self._report(seq, None, None)
        return True

    def _end(self, seq: Sequence, end: End) -> None:
        assert seq.phase != "ended", f"request {seq.request.request_id} ended twice"
        if seq.phase == "running":
            self._leave_row(seq)
        else:
            self.waiting.remove(seq)
        seq.phase, seq.end = "ended", end
        del self._sequences[seq.request.request_id]

    def _leave_row(self, seq: Sequence) -> None:
        self.running.remove(seq)
        heapq.heappush(self._free_slots, seq.slot)
        self.memory.give_back(seq)
