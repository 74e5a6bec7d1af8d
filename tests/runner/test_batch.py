"""A step's integers as tensors, against the same written as loops over rows and positions."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from gemcut.data import MediaSpan, PageRun, Row, Seat, Step
from gemcut.models.batch import Batch
from gemcut.runner.batch import Inputs, PageTables, Size
from gemcut.runner.sample import Draws

CPU = torch.device("cpu")
SLOTS, LONGEST, SIZE = 6, 90, 4
MOST = 200  # tokens of a step


def draws_of(step: Step) -> Draws:
    """Some rows sample, each with numbers of its own."""
    rows = [i for i, row in enumerate(step.rows) if row.samples]
    numbers = np.array([step.rows[i].slot + 1 for i in rows])
    columns = {"temperature": numbers / 2, "top_p": numbers / 4, "min_p": numbers / 8, "top_k": numbers * 3}
    return Draws(
        rows=np.array(rows, dtype=np.int64),
        slots=[step.rows[i].slot for i in rows],
        indices=[0] * len(rows),
        columns=columns | {"uniform": numbers / 16},
        max_top_k=20,
        plain=True,
    )


def exact(step: Step) -> Size:
    """A size without padding."""
    pages = max(-(-(row.start + row.count) // SIZE) for row in step.rows)
    media = any(row.spans for row in step.rows)
    return Size(sum(row.count for row in step.rows), len(step.rows), pages, media)


@dataclass
class Scene:
    """Random steps of a few slots, and beside them the plain books of what each slot holds."""

    choose: random.Random
    tables: PageTables = field(default_factory=lambda: PageTables(SLOTS, LONGEST, SIZE, CPU))
    inputs: Inputs = field(init=False)
    pages: dict[tuple[str, int], dict[int, int]] = field(
        default_factory=dict
    )  # (kind, slot) -> entry -> page
    position: dict[int, int] = field(default_factory=dict)
    soft: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.tables, MOST, torch.full((MOST, 5), float("nan")), CPU)

    def batch(self, step: Step, size: Size) -> Batch:
        """What the model gets of a step, in whatever state the last one left the memory."""
        self.tables.enter(step.seats, step.rows)
        self.inputs.block[self.inputs.last_tokens.numel() :] = -(2**60)
        self.inputs.fill(step.rows, size, self.soft, draws_of(step))
        return self.inputs.batch(size)

    def step(self, number: int) -> Step:
        rows, seats = [], []
        for slot in self.choose.sample(range(SLOTS), self.choose.randint(1, SLOTS)):
            fresh = slot not in self.position or self.position[slot] > LONGEST - 30
            if fresh:
                seats.append(Seat(slot, f"r{number}", (1, 2, 3), 3))
                self.position[slot] = self.choose.choice((0, 0, 8, 12))  # behind a cached prefix
            rows.append(self.row(slot, fresh))
        return Step(number, tuple(rows), tuple(seats))

    def row(self, slot: int, fresh: bool) -> Row:
        start = self.position[slot]
        decode = not fresh and self.choose.random() < 0.4
        count = 1 if decode else self.choose.randint(1, 25)
        runs = {}
        for kind in ("full", "sliding"):
            entries = self.pages.setdefault((kind, slot), {})
            if fresh:
                entries.clear()
                # the sliding table of a prefix names the window's pages only
                first = max(0, start - 7) // SIZE if kind == "sliding" else 0
            else:
                first = -(-start // SIZE)
            last = -(-(start + count) // SIZE)
            new = tuple(self.choose.randrange(1000) for _ in range(first, last))
            entries.update(zip(range(first, last), new, strict=True))
            runs[kind] = PageRun(first, new) if new else None
        self.position[slot] = start + count
        spans = () if decode else self.spans(start, count)
        ids = None if decode else tuple(self.choose.randrange(300) for _ in range(count))
        samples = decode or self.choose.random() < 0.5
        return Row(slot, start, count, ids, samples, runs["full"], runs["sliding"], spans)

    def spans(self, start: int, count: int) -> tuple[MediaSpan, ...]:
        """Pictures within the chunk, some of them without text between, and audio, which chunks may cut."""
        found, at, stop = [], start, start + count
        while at < stop and self.choose.random() < 0.6:
            begin = at + self.choose.choice((0, 0, 1, 3))
            end = min(begin + self.choose.randint(1, 8), stop)
            if begin >= end:
                break
            kind = self.choose.choice(("image", "video", "audio"))
            before = self.choose.randint(0, 3) if kind == "audio" and begin == start and start > 5 else 0
            behind = self.choose.randint(0, 3) if kind == "audio" and end == stop else 0
            span = MediaSpan(kind, self.choose.randbytes(4), begin - before, end + behind)  # type: ignore[arg-type]
            self.soft[span.key] = torch.randn(span.stop - span.start, 5)
            found.append(span)
            at = end
        return tuple(found)


def check(scene: Scene, step: Step, batch: Batch, last: torch.Tensor, total: int | None = None) -> None:
    at = 0
    assert batch.query_start[0] == 0
    for i, row in enumerate(step.rows):
        assert batch.query_start[i + 1] == at + row.count
        assert batch.seq_lens[i] == row.start + row.count
        for kind, paged in (("full", batch.full), ("sliding", batch.sliding)):
            entries = scene.pages[kind, row.slot]
            for entry, page in entries.items():  # the others are not read
                assert entry >= paged.table.shape[1] or paged.table[i, entry] == page
            assert paged.table.shape[1] >= -(-(row.start + row.count) // SIZE)
        blocks: dict[int, tuple[int, int]] = {}
        places: dict[int, torch.Tensor] = {}
        for span in row.spans:
            for p in range(span.start, span.stop):
                places[p] = scene.soft[span.key][p - span.start]
        seen = [s for s in row.spans if s.kind != "audio"]
        for span in seen:
            begin, end = span.start, span.stop
            while any(s.stop == begin for s in seen):
                begin = next(s.start for s in seen if s.stop == begin)
            while any(s.start == end for s in seen):
                end = next(s.stop for s in seen if s.start == end)
            for p in range(span.start, span.stop):
                blocks[p] = (begin, end)
        for offset in range(row.count):
            p, token = row.start + offset, at + offset
            assert batch.positions[token] == p
            want = last[row.slot] if row.token_ids is None else row.token_ids[offset]
            assert batch.token_ids[token] == want
            for kind, paged in (("full", batch.full), ("sliding", batch.sliding)):
                assert paged.slots[token] == scene.pages[kind, row.slot][p // SIZE] * SIZE + p % SIZE
            if batch.spans is None or batch.soft_rows is None or batch.soft is None:
                assert not any(r.spans for r in step.rows)
                assert batch.spans is batch.soft_rows is batch.soft is None
                continue
            assert tuple(batch.spans[token].tolist()) in (blocks.get(p, (0, 0)),)
            if p in places:
                assert torch.equal(batch.soft[batch.soft_rows[token]], places[p])
            else:
                assert batch.soft_rows[token] == -1
        at += row.count
    assert at == (len(batch.token_ids) if total is None else total)


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_is_what_the_step_says(seed: int) -> None:
    scene = Scene(random.Random(seed))
    for number in range(20):
        step = scene.step(number)
        last = torch.randint(0, 300, (SLOTS,), generator=torch.Generator().manual_seed(number))
        scene.inputs.last_tokens[:SLOTS] = last
        check(scene, step, scene.batch(step, exact(step)), last)
        check_draws(scene, step, len(draws_of(step).slots))


@pytest.mark.parametrize("seed", range(10))
def test_padding_is_empty_and_changes_nothing(seed: int) -> None:
    """The same steps with room for more tokens and rows: what is theirs is theirs, the rest is empty."""
    scene = Scene(random.Random(seed))
    for number in range(20):
        step = scene.step(number)
        last = torch.randint(0, 300, (SLOTS,), generator=torch.Generator().manual_seed(number))
        scene.inputs.last_tokens[:SLOTS] = last
        total, rows = exact(step).tokens, len(step.rows)
        size = Size(total + number, SLOTS + number % 2, scene.tables.width, scene.inputs.soft.numel() > 0)
        batch = scene.batch(step, size)
        assert batch.token_ids.shape == batch.positions.shape == (size.tokens,)
        assert batch.seq_lens.shape == batch.full.table.shape[:1] == (size.rows,)
        assert batch.query_start.tolist()[rows:] == [total] * (size.rows + 1 - rows)
        assert not batch.seq_lens[rows:].any()
        for padding in (batch.token_ids, batch.positions):
            assert not padding[total:].any()
        assert batch.spans is not None
        assert batch.soft_rows is not None
        assert not batch.spans[total:].any()
        for padding in (batch.full.slots, batch.sliding.slots, batch.soft_rows):
            assert (padding[total:] == -1).all()
        check(scene, step, batch, last, total)
        check_draws(scene, step, SLOTS)


def check_draws(scene: Scene, step: Step, count: int) -> None:
    """Every row that samples has its own numbers; the others are greedy, and go to the slot of nobody."""
    got, ends = scene.inputs.draws(count), scene.inputs.ends(count)
    stops = np.cumsum([row.count for row in step.rows])
    expected = [(stop - 1, row.slot) for stop, row in zip(stops, step.rows, strict=True) if row.samples]
    for i, (end, slot) in enumerate(expected):
        assert (ends[i], got.slots[i]) == (end, slot)
        assert got.temperature[i] == (slot + 1) / 2
        assert got.top_p[i] == (slot + 1) / 4
        assert got.min_p[i] == (slot + 1) / 8
        assert got.uniform[i] == (slot + 1) / 16
        assert got.top_k[i] == (slot + 1) * 3
    assert (got.slots[len(expected) :] == SLOTS).all()
    assert not got.temperature[len(expected) :].any()
    assert not ends[len(expected) :].any()


def test_the_scenes_hold_what_they_are_for() -> None:
    steps = []
    for seed in range(10):
        scene = Scene(random.Random(seed))
        steps += [scene.step(number) for number in range(20)]
    rows = [row for step in steps for row in step.rows]
    assert any(row.token_ids is None for row in rows)
    assert any(row.spans and row.start for row in rows)
    assert any(a.stop == b.start for row in rows for a, b in zip(row.spans, row.spans[1:], strict=False))
    assert any(span.start < row.start for row in rows for span in row.spans)
    assert any(not any(row.spans for row in step.rows) for step in steps)
    assert any(row.sliding_pages and row.sliding_pages.index > 0 for row in rows)


def test_a_position_without_a_page_is_not_written() -> None:
    scene = Scene(random.Random(0))
    step = Step(0, (Row(1, 4, 8, (5,) * 8, False, PageRun(1, (7, 3)), PageRun(2, (9,))),))
    batch = scene.batch(step, exact(step))
    assert batch.full.slots.tolist() == [28, 29, 30, 31, 12, 13, 14, 15]
    assert batch.sliding.slots.tolist() == [-1, -1, -1, -1, 36, 37, 38, 39]


def test_a_step_that_does_not_fit_is_a_mistake_of_ours() -> None:
    scene = Scene(random.Random(0))
    step = Step(0, (Row(1, 0, 8, (5,) * 8, False, PageRun(0, (7, 3)), PageRun(0, (9, 1))),))
    for size in (Size(7, 1, 2, False), Size(MOST + 1, 1, 2, False), Size(8, SLOTS + 2, 2, False)):
        with pytest.raises(AssertionError, match="do not fit"):
            scene.batch(step, size)
