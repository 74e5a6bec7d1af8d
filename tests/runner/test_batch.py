"""A step's integers as tensors, against the same written as loops over rows and positions."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from gemcut.data import MediaSpan, PageRun, Row, Seat, Step
from gemcut.models.batch import Batch
from gemcut.runner.batch import PageTables, build

CPU = torch.device("cpu")
SLOTS, LONGEST, SIZE = 6, 90, 4


@dataclass
class Scene:
    """Random steps of a few slots, and beside them the plain books of what each slot holds."""

    choose: random.Random
    tables: PageTables = field(default_factory=lambda: PageTables(SLOTS, LONGEST, SIZE))
    pages: dict[tuple[str, int], dict[int, int]] = field(
        default_factory=dict
    )  # (kind, slot) -> entry -> page
    position: dict[int, int] = field(default_factory=dict)
    soft: dict[bytes, torch.Tensor] = field(default_factory=dict)

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
        return Row(slot, start, count, ids, True, runs["full"], runs["sliding"], spans)

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


def check(scene: Scene, step: Step, batch: Batch, last: torch.Tensor) -> None:
    at = 0
    assert batch.query_start[0] == 0
    for i, row in enumerate(step.rows):
        assert batch.query_start[i + 1] == at + row.count
        assert batch.seq_lens[i] == row.start + row.count
        for kind, paged in (("full", batch.full), ("sliding", batch.sliding)):
            entries = scene.pages[kind, row.slot]
            for entry in range(paged.table.shape[1]):
                assert paged.table[i, entry] == entries.get(entry, -1)
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
    assert len(batch.token_ids) == at


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_is_what_the_step_says(seed: int) -> None:
    scene = Scene(random.Random(seed))
    for number in range(20):
        step = scene.step(number)
        for seat in step.seats:
            scene.tables.seat(seat)
        for row in step.rows:
            scene.tables.extend(row)
        last = torch.randint(0, 300, (SLOTS,), generator=torch.Generator().manual_seed(number))
        check(scene, step, build(step, scene.tables, scene.soft, last, CPU), last)  # type: ignore[arg-type]


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
    tables = PageTables(2, LONGEST, SIZE)
    row = Row(1, 4, 8, (5,) * 8, False, PageRun(1, (7, 3)), PageRun(2, (9,)))
    tables.extend(row)
    batch = build(Step(0, (row,)), tables, {}, torch.zeros(2, dtype=torch.int64), CPU)  # type: ignore[arg-type]
    assert batch.full.slots.tolist() == [28, 29, 30, 31, 12, 13, 14, 15]
    assert batch.sliding.slots.tolist() == [-1, -1, -1, -1, 36, 37, 38, 39]
