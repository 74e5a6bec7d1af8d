"""A runner without a model, which knows what every KV entry should hold.

Each computed position leaves a mark in the page it is written to: a number made from the salt, all
tokens and all media up to there, which is all that a real KV entry depends on. Every row checks that
each entry it would read bears the mark of its own sequence, so that a page released early, used
twice, or found for the wrong picture or tenant is an error at once. The sampled token is a function
of the last mark: whatever happens on the way, the output must be that of the request alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from gemcut.data import EncodeItem, ForwardCounts, MediaSpan, PageRun, Row, Seat, Step, StepResult
from gemcut.engine.limits import Limits
from gemcut.engine.sequence import End, Request, media_spans, vision_blocks

VOCABULARY = 24
GARBAGE = -1  # the mark of an entry that a failed row left


def _next_mark(mark: int, token: int, medium: int) -> int:
    return hash((mark, token, medium))  # of integers: the same in every process


def _sample(mark: int) -> int:
    return (mark >> 7) % VOCABULARY


class Truth:
    """What a request's KV entries should be, from the request alone."""

    def __init__(self, request: Request, bidirectional: bool) -> None:
        self.request = request
        self.spans = media_spans(request)
        self.blocks = vision_blocks(self.spans) if bidirectional else ()
        self.block_starts = [start for start, _ in self.blocks]
        self.origin = int.from_bytes(b"salt" + request.salt, "big") % (1 << 61)
        self._media = [0] * len(request.prompt)
        identities = [hash((int.from_bytes(medium.digest, "big"),)) for medium in request.media]
        for span, identity in zip(self.spans, identities, strict=True):
            self._media[span.start : span.stop] = [identity] * (span.stop - span.start)
        for start, stop in self.blocks:  # each position depends on the whole block
            self._media[start:stop] = [hash(tuple(self._media[start:stop]))] * (stop - start)

    def mark(self, marks: list[int], token: int) -> int:
        """The mark of position len(marks), given those before it."""
        position = len(marks)
        medium = self._media[position] if position < len(self._media) else 0
        return _next_mark(marks[-1] if marks else self.origin, token, medium)

    def cuts(self, position: int) -> bool:
        """The position lies strictly inside a vision block."""
        i = bisect_right(self.block_starts, position) - 1
        return i >= 0 and self.blocks[i][0] < position < self.blocks[i][1]

    def alone(self, max_tokens: int) -> tuple[list[int], End]:
        """The tokens and the end of the request if nothing else were there."""
        marks: list[int] = []
        for token in self.request.prompt.token_ids:
            marks.append(self.mark(marks, token))
        output: list[int] = []
        while True:
            token = _sample(marks[-1])
            output.append(token)
            if token in self.request.stop_ids and len(output) > self.request.min_tokens:
                return output, "stop"
            if len(output) == max_tokens:
                return output, "length"
            marks.append(self.mark(marks, token))


@dataclass(slots=True)
class _Chair:
    """A row slot and the sequence in it."""

    truth: Truth
    ids: list[int]
    marks: list[int]
    computed: int | None = None  # None until its first row says how much was cached
    full: list[int] = field(default_factory=list)
    sliding: list[int] = field(default_factory=list)
    void: bool = False  # a row of it failed: what it writes now is garbage


class FakeRunner:
    """Runs steps at launch, one after another, as a stream would.

    `row_errors` and `encode_errors` are the chances that a row, or a medium with all rows that use
    it, fails.
    """

    def __init__(
        self,
        limits: Limits,
        random: Random | None = None,
        row_errors: float = 0.0,
        encode_errors: float = 0.0,
    ) -> None:
        self._limits = limits
        self._random = random or Random(0)
        self._row_errors, self._encode_errors = row_errors, encode_errors
        self._truths: dict[str, Truth] = {}
        self._full = [GARBAGE] * (limits.num_full_pages * limits.page_size)
        self._sliding = [GARBAGE] * (limits.num_sliding_pages * limits.page_size)
        self._media: dict[bytes, EncodeItem | None] = {}  # None: its encoding failed
        self._media_sizes: dict[bytes, int] = {}
        self._chairs: dict[int, _Chair] = {}
        self._results: deque[StepResult] = deque()
        self.counts = ForwardCounts()
        self.num_steps = self.num_rows = self.num_tokens = self.num_errors = 0

    def know(self, request: Request) -> Truth:
        """Make the request known, so that its rows can be checked against it."""
        truth = Truth(request, self._limits.bidirectional_vision)
        self._truths[request.request_id] = truth
        return truth

    def forget(self, request_id: str) -> None:
        """The request ended; its ghosts still have their chair."""
        del self._truths[request_id]

    def launch(self, step: Step, masks: Mapping[int, object] | None = None) -> None:
        """Run the step: all rows write, then all read, as in a layer of a real forward. Its tokens follow
        from the marks, so it takes no masks."""
        assert not masks, "the fake runner samples by no grammar"
        self.num_steps += 1
        assert step.number == self.num_steps, f"step {step.number} was launched as number {self.num_steps}"
        self._encode(step)
        for seat in step.seats:
            self._sit(seat)
        self._check_size(step)
        errors: dict[int, str] = {}
        for row in step.rows:
            self._write(row)
        for row in step.rows:
            chair = self._chairs[row.slot]
            if chair.void or self._fails(row):
                chair.void = True
                errors[row.slot] = "injected"
                self._spoil(chair, row)
            else:
                self._read(chair, row)
        tokens: dict[int, int] = {}
        for row in step.rows:
            chair = self._chairs[row.slot]
            if row.samples and not chair.void:
                assert row.start + row.count == len(chair.ids), "a row samples before its sequence's end"
                token = _sample(chair.marks[-1])
                chair.ids.append(token)
                chair.marks.append(chair.truth.mark(chair.marks, token))
                tokens[row.slot] = token
        self.num_errors += len(errors)
        self._results.append(StepResult(step.number, tokens, errors))

    def collect(self) -> StepResult:
        """The result of the oldest step that was not collected yet."""
        return self._results.popleft()

    def _encode(self, step: Step) -> None:
        for key in step.free_media:
            del self._media[key], self._media_sizes[key]
        for item in step.encode:
            assert item.key not in self._media, "a medium that is cached is encoded again"
            self._media[item.key] = None if self._random.random() < self._encode_errors else item
            self._media_sizes[item.key] = item.medium.soft_tokens
        held = sum(self._media_sizes.values())
        assert held <= self._limits.encoder_tokens, f"{held} soft tokens overflow the encoder cache"

    def _sit(self, seat: Seat) -> None:
        truth = self._truths[seat.request_id]
        prompt = truth.request.prompt.token_ids
        assert seat.token_ids[: seat.num_prompt] == prompt, "a seat has another prompt than its request"
        marks: list[int] = []
        for position, token in enumerate(seat.token_ids):
            if position >= seat.num_prompt:
                assert token == _sample(marks[-1]), f"position {position} is not the token that was sampled"
            marks.append(truth.mark(marks, token))
        self._chairs[seat.slot] = _Chair(truth, list(seat.token_ids), marks)

    def _check_size(self, step: Step) -> None:
        slots = {row.slot for row in step.rows}
        assert len(slots) == len(step.rows) <= self._limits.max_num_seqs, "a slot has two rows"
        assert all(0 <= slot < self._limits.max_num_seqs for slot in slots), "there is no such slot"
        count = sum(row.count for row in step.rows)
        self.num_rows += len(step.rows)
        self.num_tokens += count
        if count > self._limits.max_num_batched_tokens:
            row = step.rows[0]
            block = (row.start, row.start + row.count)
            assert len(step.rows) == 1, f"{count} tokens exceed the budget"
            assert count <= self._limits.largest_block, f"{count} tokens overflow the runner's buffers"
            assert block in self._chairs[row.slot].truth.blocks, "an oversized row is not a block"

    def _write(self, row: Row) -> None:
        chair, start, stop = self._chairs[row.slot], row.start, row.start + row.count
        size = self._limits.page_size
        if chair.computed is None:
            assert start % size == 0, f"a cached prefix of {start} tokens ends inside a page"
            assert not chair.truth.cuts(start), (
                f"a cached prefix of {start} tokens ends inside a vision block"
            )
            chair.computed = start
        assert start == chair.computed, f"a row starts at {start}, not {chair.computed}"
        assert row.count > 0, "a row computes nothing"
        assert stop <= len(chair.ids) or chair.void, "a row is past its sequence's end"
        assert not chair.truth.cuts(stop), f"a chunk ends at {stop} inside a vision block"
        chair.computed = stop
        if row.token_ids is None:
            assert row.count == 1, "the device knows one token of a slot"
            assert row.samples, "a decode row samples"
        else:
            assert list(row.token_ids) == chair.ids[start:stop], "a chunk has the wrong ids"
            self._check_spans(chair, row)
        if chair.void:
            chair.marks += [GARBAGE] * (stop - len(chair.marks))
            chair.ids += [0] * (stop - len(chair.ids))
        for memory, table, run in (
            (self._full, chair.full, row.full_pages),
            (self._sliding, chair.sliding, row.sliding_pages),
        ):
            if run is not None:
                _join(table, run)
            if memory:
                for i in range(start // size, (stop - 1) // size + 1):
                    low, high = max(start, i * size), min(stop, (i + 1) * size)
                    base = (table[i] - i) * size
                    assert table[i] >= 0, f"table entry {i} is missing"
                    memory[base + low : base + high] = chair.marks[low:high]

    def _check_spans(self, chair: _Chair, row: Row) -> None:
        start, stop = row.start, row.start + row.count
        due: list[MediaSpan] = []
        for span, medium in zip(chair.truth.spans, chair.truth.request.media, strict=True):
            if span.start < stop and span.stop > start:
                due.append(span)
                assert span.key in self._media, f"the soft tokens of position {span.start} are not there"
                item = self._media[span.key]
                assert item is None or item.medium.digest == medium.digest, "a row has another one's picture"
        assert tuple(due) == row.spans, "a row has the wrong spans"

    def _fails(self, row: Row) -> bool:
        if any(self._media[span.key] is None for span in row.spans):
            return True
        return self._row_errors > 0 and self._random.random() < self._row_errors

    def _spoil(self, chair: _Chair, row: Row) -> None:
        size = self._limits.page_size
        for memory, table in ((self._full, chair.full), (self._sliding, chair.sliding)):
            if memory:
                for position in range(row.start, row.start + row.count):
                    memory[table[position // size] * size + position % size] = GARBAGE

    def _read(self, chair: _Chair, row: Row) -> None:
        stop = row.start + row.count
        first = max(0, row.start - self._limits.window + 1)
        self._expect(self._full, chair.full, chair.marks, 0, stop, "full")
        self._expect(self._sliding, chair.sliding, chair.marks, first, stop, "sliding")

    def _expect(
        self, memory: list[int], table: list[int], marks: list[int], start: int, stop: int, kind: str
    ) -> None:
        if not memory:
            return
        size = self._limits.page_size
        first = start // size
        entries: list[int] = []
        for page in table[first : (stop - 1) // size + 1]:
            assert page >= 0, f"a {kind} page inside the window is not in the table"
            entries += memory[page * size : page * size + size]
        got, want = entries[start - first * size : stop - first * size], marks[start:stop]
        if got != want:
            wrong = next(
                (i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), len(got)
            )
            raise AssertionError(f"{kind} entry of position {start + wrong} holds something else")


def _join(table: list[int], run: PageRun) -> None:
    table += [-1] * (run.index - len(table))
    assert run.index == len(table), f"pages join at entry {run.index} of a table of {len(table)}"
    table += run.pages
