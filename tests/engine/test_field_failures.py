"""Failures that were seen in other engines, as far as they could happen in these rooms."""

from __future__ import annotations

from random import Random

import pytest
from scenes import audio, image, limits, request

from gemcut.data import StepResult
from gemcut.engine.scheduler import Scheduler
from gemcut.engine.sequence import Request
from gemcut.errors import InvalidRequest
from gemcut.testing.fake_engine import FakeEngine
from gemcut.testing.workload import picture


def test_the_same_text_with_another_picture_reuses_no_kv():
    engine = FakeEngine(limits(max_num_batched_tokens=64))
    engine.run(request("cat", 6, image(10, "cat"), 20))
    engine.run(request("dog", 6, image(10, "dog"), 20))
    assert engine.cached["dog"] == 4  # the page before the picture
    assert engine.right("dog")
    assert engine.outputs["dog"] != engine.outputs["cat"]


def test_twins_among_ten_thousand_pictures_never_meet():
    """Every picture has the same placeholders; only its digest is its own."""
    engine = FakeEngine(limits(max_num_batched_tokens=64, num_full_pages=512, num_sliding_pages=512))
    random = Random(3)
    for i in range(400):
        name = f"picture {random.randint(0, 9999)}"
        engine.run(request(f"r{i}", image(8, name), 4, max_tokens=2))
        assert engine.right(f"r{i}")


def test_one_tenants_text_and_pictures_are_never_found_by_another():
    engine = FakeEngine(limits(max_num_batched_tokens=64))
    made = {salt: request(salt.decode() or "none", 6, image(8), 20, salt=salt) for salt in (b"", b"a", b"b")}
    for salt in made:
        engine.run(made[salt])
    assert set(engine.cached.values()) == {0}
    assert sum(len(step.encode) for step in engine.steps) == 3  # not even the timing tells
    again = request("again", 6, image(8), 20, salt=b"a")
    engine.run(again)
    assert engine.cached["again"] > 0
    assert all(engine.right(name) for name in engine.ends)


def test_no_chunk_ends_inside_a_picture_whatever_the_budget():
    for budget in range(1, 40):
        engine = FakeEngine(limits(max_num_seqs=1, max_num_batched_tokens=budget))
        engine.run(request("a", 3, image(14), 5, image(7, "dog"), 2))  # the runner checks each end
        assert engine.right("a")


def test_a_picture_longer_than_the_window_is_computed_whole():
    engine = FakeEngine(limits(window=8, max_num_batched_tokens=64))
    engine.run(request("a", 10, image(30), 10))
    assert engine.right("a")


def test_models_without_bidirectional_vision_are_not_restricted():
    engine = FakeEngine(limits(bidirectional_vision=False, max_num_batched_tokens=5, largest_block=0))
    engine.run(request("a", 3, image(14), 5))
    assert max(row.count for step in engine.steps for row in step.rows) == 5
    assert engine.right("a")


def test_waiting_requests_do_not_hold_the_encoder_cache():
    """The encoder cache has room for one; many wait, each with its own picture."""
    engine = FakeEngine(limits(max_num_seqs=2, encoder_tokens=12, max_num_batched_tokens=16))
    engine.submit(*(request(f"r{i}", 2, image(12, f"p{i}"), 3) for i in range(12)))
    assert engine.scheduler.memory.encoder.num_held == 0
    engine.run()
    assert all(engine.right(f"r{i}") for i in range(12))


def test_sequences_that_hold_and_want_encoder_room_do_not_block_each_other():
    """The first holds the pages that the second needs to finish its clip, and waits for the clip's room.
    Found by the simulator."""
    size = limits(
        max_num_seqs=4,
        max_num_batched_tokens=4,
        max_model_len=56,
        page_size=2,
        num_sliding_pages=9,
        num_full_pages=68,
        largest_block=16,
        encoder_tokens=14,
    )
    for first in range(1, 12):
        engine = FakeEngine(size)
        engine.submit(request("a", first, image(9), 4, max_tokens=6))
        engine.turn()
        engine.submit(request("b", 1, audio(8), 4, max_tokens=6), request("c", 2, audio(12, "talk"), 4))
        engine.run()
        assert all(engine.right(name) for name in "abc")


def test_an_item_larger_than_the_encoder_cache_is_refused_at_the_door():
    engine = FakeEngine(limits(encoder_tokens=10))
    with pytest.raises(InvalidRequest, match="11 soft tokens"):
        engine.submit(request("a", 2, image(11), 3))
    engine.run(request("b", 2, image(10), 3))
    assert engine.right("b")


def test_a_picture_that_cannot_be_encoded_ends_its_request_and_is_not_kept():
    engine = FakeEngine(limits(max_num_batched_tokens=64), encode_errors=1.0)
    engine.submit(request("bad", 2, image(10), 8), request("good", 20))
    engine.run()
    assert engine.ends == {"bad": "failed", "good": "length"}
    engine.runner._encode_errors = 0.0
    engine.run(request("again", 2, image(10), 8))
    assert engine.ends["again"] == "length"
    assert engine.cached["again"] == 0  # nor is the failed row's KV
    assert engine.right("again")


@pytest.mark.parametrize("ahead", [True, False])
def test_a_failed_row_ends_its_request_alone_and_leaves_nothing_behind(ahead: bool):
    engine = FakeEngine(limits(max_num_batched_tokens=64), ahead, row_errors=0.03)
    for i in range(150):
        engine.submit(request(f"r{i}", 12 + i % 9, max_tokens=12))
        engine.turn()
    engine.run()
    ends = list(engine.ends.values())
    assert 10 < ends.count("failed") < 140
    assert all(engine.right(name) for name in engine.ends)


def test_no_step_is_empty():
    """156,000 zero-token passes."""
    engine = FakeEngine(limits(num_full_pages=14, num_sliding_pages=14, encoder_tokens=12))
    parts = ((5,), (2, image(12), 4), (3, audio(9), 2), (20,))
    engine.run(*(request(f"r{i}", *parts[i % 4], max_tokens=15) for i in range(16)))
    assert all(row.count > 0 for step in engine.steps for row in step.rows)
    assert all(step.rows for step in engine.steps)


def test_an_aborted_requests_tokens_reach_nobody_else():
    """The slot and the pages go on to the next one while the aborted one's rows are in flight."""
    for turns in range(1, 8):
        engine = FakeEngine(limits(max_num_seqs=1, num_full_pages=6, num_sliding_pages=6))
        engine.submit(request("a", 10, max_tokens=14), request("b", 13, max_tokens=9, salt=b"other"))
        for _ in range(turns):
            engine.turn()
        engine.scheduler.abort("a")
        engine.run()
        assert engine.ends == {"a": "aborted", "b": "length"}
        assert engine.right("a")
        assert engine.right("b")


@pytest.mark.parametrize("phase", ["before a plan", "before a launch", "in flight"])
def test_an_abort_frees_everything_at_once_in_every_phase(phase: str):
    for steps in range(8):
        scheduler = Scheduler(limits(max_num_batched_tokens=8, bidirectional_vision=False))
        memory = scheduler.memory
        scheduler.submit(request("a", 3, image(9), 12, max_tokens=5), 0.0)
        for _ in range(steps):
            step = scheduler.plan(0.0)
            assert step is not None
            scheduler.settle(StepResult(step.number, {row.slot: 5 for row in step.rows if row.samples}))
            if not scheduler.num_unfinished:
                break
        step = None if phase == "before a plan" else scheduler.plan(0.0)
        if phase == "in flight" and step is not None:
            scheduler.plan(0.0)  # two of them
        found = scheduler.abort("a")
        assert found == any(news.end == "aborted" for news in scheduler.drain())
        assert memory.full is not None
        assert memory.sliding is not None
        assert (memory.full.num_used, memory.sliding.num_used) == (0, 0)
        scheduler.plan(0.0) if not scheduler.num_in_flight else memory.begin_step()
        assert memory.encoder.num_held == 0
        assert not scheduler.abort("a")  # late: nothing to do, nothing leaks


def test_an_abort_storm_ends_at_the_baseline():
    random = Random(11)
    engine = FakeEngine(limits(max_num_seqs=4, num_full_pages=40, num_sliding_pages=40))
    alive: list[str] = []
    count = 0
    while count < 3000:
        while len(alive) < 12:
            count += 1
            parts = random.choice(((9,), (2, image(9), 3), (4, audio(5), 4), (15,)))
            engine.submit(request(f"r{count}", *parts, max_tokens=8))
            alive.append(f"r{count}")
        for _ in range(random.randint(1, 6)):
            engine.scheduler.abort(alive.pop(random.randrange(len(alive))))
        if random.random() < 0.7:
            engine.turn()
        engine.read_news()
        alive = [name for name in alive if name not in engine.ends]
    engine.run()
    memory = engine.scheduler.memory
    assert engine.scheduler.plan(0.0) is None
    memory.audit([])
    assert memory.encoder.num_held == 0
    assert len(engine.scheduler._free_slots) == 4
    assert len(engine.ends) == count


def test_ten_percent_of_the_pages_change_no_output():
    made = [request(f"r{i}", 6 + i % 11, max_tokens=20 + i % 7, salt=bytes([i % 3])) for i in range(24)]
    pages = 10  # of some 24 * 8
    engine = FakeEngine(limits(max_num_seqs=16, num_full_pages=pages, num_sliding_pages=pages))
    engine.run(*made)
    assert engine.scheduler.num_preemptions > 5
    assert all(engine.right(f"r{i}") for i in range(24))


def test_a_bad_request_does_not_leave_its_own_scope():
    engine = FakeEngine(limits())
    engine.submit(request("good", 10, max_tokens=10))
    engine.turn()
    good = request("x", 2, image(4), 2)
    for bad in (
        request("bad", 0),
        request("bad", 500),
        request("bad", 5, max_tokens=-3),
        request("bad", image(60)),
        Request(request_id="bad", prompt=good.prompt, media=()),
        Request(request_id="bad", prompt=good.prompt, media=(picture(5, "cat"),)),
    ):
        with pytest.raises(InvalidRequest):
            engine.scheduler.submit(bad, 0.0)
        engine.turn()
    engine.run()
    assert engine.right("good")
