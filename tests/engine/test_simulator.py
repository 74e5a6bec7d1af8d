"""The short run of the simulator, and faults planted to see that it finds them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

import gemcut.engine.memory
from gemcut.data import MediaSpan
from gemcut.engine import prefix
from gemcut.engine.encoder_cache import EncoderCache
from gemcut.engine.memory import Memory
from gemcut.engine.pages import PagePool
from gemcut.engine.prefix import Chain
from gemcut.engine.scheduler import Scheduler
from gemcut.engine.sequence import Blocks, Sequence
from gemcut.testing import simulator
from gemcut.testing.simulator import Simulation

SEEDS, STEPS = 100, 1000


def test_the_short_run_breaks_nothing_and_meets_every_fault():
    total: Counter[str] = Counter()
    for seed in range(SEEDS):
        total += Simulation(seed).run(STEPS)
    assert total["steps"] >= SEEDS * STEPS
    for what in (
        "stop",
        "length",
        "aborted",
        "expired",
        "failed",
        "refused",
        "turned away",
        "preemptions",
        "prefix hit tokens",
        "encoder hits",
        "media freed",
        "blocks larger than the budget",
        "outages",
        "bursts",
        "slow steps",
        "row errors injected",
        "left before a plan",
        "left before a launch",
        "left in flight",
    ):
        assert total[what] >= 50, f"{what} happened {total[what]} times: too seldom to prove anything"


def test_a_seed_replays_exactly_in_any_process():
    code = "from gemcut.testing.simulator import Simulation; print(sorted(Simulation(5).run(200).items()))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {f"{sorted(Simulation(5).run(200).items())}\n"}


def test_the_command_says_how_it_went(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert simulator.main(["--seeds", "2", "--steps", "50"]) == 0
    assert "nothing broken" in capsys.readouterr().out
    monkeypatch.setattr(EncoderCache, "give", lambda self, key: None)
    assert simulator.main(["--seeds", "20", "--steps", "200"]) == 1
    assert "--first-seed" in capsys.readouterr().out


# ---- planted faults: each is one line that somebody could get wrong


def window_left_one_page_early(patch: pytest.MonkeyPatch) -> None:
    def leave_window(self: Memory, seq: Sequence) -> None:
        first = max(0, seq.planned - self.limits.window + 2) // self.limits.page_size
        count = first - seq.sliding_first
        if self.sliding is not None and count > 0:
            self.sliding.give(seq.sliding_pages[:count])
            del seq.sliding_pages[:count]
            seq.sliding_first = first

    patch.setattr(Memory, "leave_window", leave_window)


def pictures_left_out_of_page_names(patch: pytest.MonkeyPatch) -> None:
    def identity(group: list[MediaSpan], origin: int) -> bytes:
        return b""

    patch.setattr(prefix, "_identity", identity)


def tenants_left_out_of_page_names(patch: pytest.MonkeyPatch) -> None:
    make = Chain.__init__
    patch.setattr(Chain, "__init__", lambda self, size, salt, ids, spans: make(self, size, b"", ids, spans))


def window_not_looked_up(patch: pytest.MonkeyPatch) -> None:
    find = gemcut.engine.memory.cached_prefix
    patch.setattr(
        gemcut.engine.memory,
        "cached_prefix",
        lambda chain, count, size, window, *rest: find(chain, count, size, max(1, window - 1), *rest),
    )


def prefixes_that_end_in_pictures(patch: pytest.MonkeyPatch) -> None:
    find = gemcut.engine.memory.cached_prefix
    patch.setattr(
        gemcut.engine.memory,
        "cached_prefix",
        lambda *arguments: find(*arguments[:-1], lambda position: position),
    )


def chunks_that_cut_pictures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "chunk_stop", lambda self, start, stop: max(start, stop))


def late_names_for_reused_pages(patch: pytest.MonkeyPatch) -> None:
    name = PagePool.name

    def late(self: PagePool, page: int, epoch: int, text: bytes) -> None:
        if self._names[page] is None:
            name(self, page, self.epoch(page), text)

    patch.setattr(PagePool, "name", late)


def failed_rows_named(patch: pytest.MonkeyPatch) -> None:
    settle = Scheduler.settle

    def careless(self: Scheduler, result) -> None:
        for done in self._in_flight[0].completions:
            self.memory.name_pages(done)
        settle(self, result)

    patch.setattr(Scheduler, "settle", careless)
    patch.setattr(Memory, "distrust", lambda self, seq: None)


def media_freed_in_the_step_that_needs_them(patch: pytest.MonkeyPatch) -> None:
    take = Memory.take_media

    def eager(self: Memory, seq: Sequence, stop: int):
        encode = take(self, seq, stop)
        self.begin_step()
        return encode

    patch.setattr(Memory, "take_media", eager)


def half_computed_media_forgotten(patch: pytest.MonkeyPatch) -> None:
    give = Memory.give_back

    def forgetful(self: Memory, seq: Sequence) -> None:
        seq.held_key = None
        give(self, seq)

    patch.setattr(Memory, "give_back", forgetful)


def pages_of_the_ended_kept(patch: pytest.MonkeyPatch) -> None:
    give = PagePool.give
    patch.setattr(PagePool, "give", lambda self, pages: give(self, pages[1:] if len(pages) > 6 else pages))


def results_read_by_slot(patch: pytest.MonkeyPatch) -> None:
    settle = Scheduler.settle

    def by_slot(self: Scheduler, result) -> None:
        here = {seq.slot: seq for seq in self.running}
        flight = self._in_flight[0]
        for i, row in enumerate(flight.step.rows):
            flight.sequences[i] = here.get(row.slot, flight.sequences[i])
        settle(self, result)

    patch.setattr(Scheduler, "settle", by_slot)


def blocks_not_merged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "gemcut.engine.sequence.vision_blocks",
        lambda spans: tuple((span.start, span.stop) for span in spans if span.kind != "audio"),
    )


def units_of_one_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Blocks, "unit", lambda self, start: 1)


FAULTS = [
    window_left_one_page_early,
    pictures_left_out_of_page_names,
    tenants_left_out_of_page_names,
    window_not_looked_up,
    prefixes_that_end_in_pictures,
    chunks_that_cut_pictures,
    late_names_for_reused_pages,
    failed_rows_named,
    media_freed_in_the_step_that_needs_them,
    half_computed_media_forgotten,
    pages_of_the_ended_kept,
    results_read_by_slot,
    blocks_not_merged,
    units_of_one_token,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(plant, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    for seed in range(60):
        try:
            Simulation(seed).run(400)
        except (AssertionError, RuntimeError, IndexError, KeyError):
            return
    pytest.fail("60 seeds did not find it")
