from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from statistics import median
from time import perf_counter

import pytest
from scenes import audio, image, limits, request

from gemcut.data import Step, StepResult
from gemcut.engine.limits import Limits
from gemcut.engine.scheduler import STUCK_AFTER, Scheduler
from gemcut.errors import InvalidRequest, Overloaded
from gemcut.testing.fake_engine import FakeEngine


def shape(step: Step | None) -> list[tuple[int, int, int]]:
    """(slot, start, count) of each row."""
    return [] if step is None else [(row.slot, row.start, row.count) for row in step.rows]


def chunks(engine: FakeEngine, slot: int = 0) -> list[tuple[int, int]]:
    return [
        (row.start, row.start + row.count)
        for step in engine.steps
        for row in step.rows
        if row.slot == slot and row.token_ids is not None
    ]


# ---- chunks and budgets


def test_prefill_is_cut_to_the_budget_and_decode_rows_go_first():
    engine = FakeEngine(limits(max_num_batched_tokens=10))
    engine.submit(request("a", 4))
    assert shape(engine.turn()) == [(0, 0, 4)]
    engine.submit(request("b", 25))
    assert shape(engine.turn()) == [(0, 4, 1), (1, 0, 9)]
    assert shape(engine.turn()) == [(0, 5, 1), (1, 9, 9)]
    assert shape(engine.turn()) == [(0, 6, 1), (1, 18, 7)]
    engine.run()
    assert engine.right("a")
    assert engine.right("b")


def test_the_budget_for_decode_rows_is_kept_even_if_the_older_one_is_in_prefill():
    engine = FakeEngine(limits(max_num_batched_tokens=10))
    engine.submit(request("old", 60), request("young", 4, priority=1))
    engine.scheduler._least_chunk = 1
    engine.turn()
    engine.run()
    for step in engine.steps:
        assert sum(row.count for row in step.rows) <= 10
    assert engine.right("young")


def test_a_chunk_never_ends_inside_a_vision_block():
    made = request("a", 10, image(12), 6, image(9, "dog"), 3)
    engine = FakeEngine(limits())
    engine.run(made)
    assert chunks(engine) == [(0, 10), (10, 26), (26, 40)]  # not [0, 16): that cuts the block [10, 22)
    assert engine.right("a")
    # Without bidirectional vision the chunks are full.
    engine = FakeEngine(limits(bidirectional_vision=False))
    engine.run(made)
    assert chunks(engine) == [(0, 16), (16, 32), (32, 40)]
    assert engine.right("a")


def test_audio_may_be_cut_and_its_soft_tokens_stay_until_the_last_one_is_used():
    engine = FakeEngine(limits(encoder_tokens=30))
    engine.run(request("a", 10, audio(30), 5))
    assert chunks(engine) == [(0, 16), (16, 32), (32, 45)]
    assert [len(step.encode) for step in engine.steps[:3]] == [1, 0, 0]
    assert engine.right("a")


def test_a_block_larger_than_the_budget_has_a_step_of_its_own():
    engine = FakeEngine(limits(max_num_batched_tokens=8))
    engine.submit(request("a", 4, max_tokens=20))
    engine.turn()
    engine.submit(request("b", 3, image(20), 5))
    engine.run()
    own = [step for step in engine.steps if sum(row.count for row in step.rows) > 8]
    assert [shape(step) for step in own] == [[(1, 3, 20)]]
    assert engine.right("a")
    assert engine.right("b")


def test_a_block_that_finds_no_room_beside_decode_rows_makes_them_step_back_once():
    engine = FakeEngine(limits(max_num_batched_tokens=12))
    engine.submit(*(request(f"d{i}", 3, max_tokens=40) for i in range(3)))
    engine.turn()
    engine.submit(request("b", image(11), 2, image(10, "dog"), 2))
    numbers = [shape(engine.turn()) for _ in range(6)]
    assert [(3, 0, 12)] in numbers  # the block needs 11, and 12 - 3 were left beside decode rows
    own = [i for i, rows in enumerate(numbers) if len(rows) == 1]
    assert all(later - earlier > 1 for earlier, later in pairwise(own))  # decode between
    engine.run()
    assert all(engine.right(name) for name in engine.ends)


def test_media_of_one_step_keep_to_their_share_unless_one_alone_is_larger():
    engine = FakeEngine(limits(max_num_batched_tokens=64, encode_tokens=10))
    engine.run(request("a", 2, image(6), 2, image(6, "dog"), 2, image(16, "cow"), 2))
    sizes = [[item.medium.soft_tokens for item in step.encode] for step in engine.steps if step.encode]
    assert sizes == [[6], [6], [16]]
    assert engine.right("a")


def test_one_picture_in_two_requests_is_encoded_once():
    engine = FakeEngine(limits(max_num_batched_tokens=64))
    engine.run(request("a", 2, image(6), 2), request("b", 3, image(6), 2))
    assert sum(len(step.encode) for step in engine.steps) == 1
    engine.run(request("c", 5, image(6), 2))
    assert sum(len(step.encode) for step in engine.steps) == 1
    assert all(engine.right(name) for name in "abc")


def test_the_runner_is_told_to_drop_what_left_the_encoder_cache():
    engine = FakeEngine(limits(encoder_tokens=10))
    engine.run(request("a", 2, image(6), 2))
    engine.run(request("b", 2, image(6, "dog"), 2))
    cat = engine.truths["a"].spans[0].key
    assert [step.free_media for step in engine.steps if step.free_media] == [(cat,)]


# ---- page tables


def test_tables_travel_as_additions_and_whole_only_with_a_seat():
    engine = FakeEngine(limits(page_size=4, window=8))
    engine.run(request("a", 6, max_tokens=8))
    first, *decode = [row for step in engine.steps for row in step.rows]
    assert first.full_pages is not None
    assert (first.full_pages.index, len(first.full_pages.pages)) == (0, 2)
    runs = [(row.start, row.full_pages.index) for row in decode if row.full_pages is not None]
    assert runs == [(8, 2), (12, 3)]
    assert [len(step.seats) for step in engine.steps] == [1] + [0] * (len(engine.steps) - 1)


def test_the_window_gives_pages_back_as_it_moves():
    engine = FakeEngine(limits(page_size=4, window=8, max_num_batched_tokens=64))
    engine.submit(request("a", 40, max_tokens=20))
    engine.turn()
    sliding = engine.scheduler.memory.sliding
    assert sliding is not None
    assert sliding.num_used == 10  # the chunk in flight
    most = 0
    while engine.turn() is not None:
        most = max(most, sliding.num_used)
    assert most == 3  # 8 positions lie in at most 3 pages of 4
    assert engine.right("a")


def test_models_of_one_kind_of_layers():
    for size in (limits(num_sliding_pages=0, window=0), limits(num_full_pages=0)):
        engine = FakeEngine(size)
        engine.run(request("a", 30), request("b", 30, max_tokens=30))
        assert engine.right("a")
        assert engine.right("b")


# ---- one step ahead


def stop_at(name: str, count: int, **changes):
    """A request whose `count`-th token is its first stop id."""
    made = request(name, 6, max_tokens=20, **changes)
    engine = FakeEngine(limits())
    engine.run(made)
    output = engine.outputs[name]
    assert output.index(output[count - 1]) == count - 1, "pick another prompt"
    return request(name, 6, max_tokens=20, stop_ids=frozenset({output[count - 1]}), **changes)


def test_a_decode_row_is_planned_before_its_token_is_known():
    scheduler = Scheduler(limits())
    scheduler.submit(request("a", 5), 0.0)
    first = scheduler.plan(0.0)
    second = scheduler.plan(0.0)  # nothing is settled yet
    assert shape(first) == [(0, 0, 5)]
    assert shape(second) == [(0, 5, 1)]
    assert second is not None
    assert second.rows[0].token_ids is None
    with pytest.raises(AssertionError, match="a third step"):
        scheduler.plan(0.0)


def test_an_end_found_late_drops_the_ghosts_token_and_frees_its_pages():
    made = stop_at("a", 3)
    for ahead in (True, False):
        engine = FakeEngine(limits(), ahead)
        engine.submit(made)
        while "a" not in engine.ends:
            engine.turn()
        memory = engine.scheduler.memory
        assert memory.full is not None
        assert memory.full.num_used == 0  # at once, with the ghost still in flight
        assert engine.scheduler.num_in_flight == (1 if ahead else 0)
        engine.run()
        assert engine.ends["a"] == "stop"
        assert len(engine.outputs["a"]) == 3
        assert engine.right("a")
        rows = sum(len(step.rows) for step in engine.steps)
        assert rows == (4 if ahead else 3)  # the ghost


def test_a_ghosts_slot_and_pages_may_go_to_another_in_the_next_step():
    made = stop_at("a", 3)
    engine = FakeEngine(limits(max_num_seqs=1, num_full_pages=7, num_sliding_pages=7))
    engine.run(made, request("b", 18, max_tokens=5))
    assert engine.right("a")
    assert engine.right("b")
    assert engine.outputs["b"] != engine.outputs["a"]
    ghost = next(i for i, step in enumerate(engine.steps) if step.seats and i > 0) - 1
    assert shape(engine.steps[ghost])[0][0] == shape(engine.steps[ghost + 1])[0][0] == 0


def test_no_row_is_planned_past_max_tokens():
    engine = FakeEngine(limits())
    engine.run(request("a", 5, max_tokens=3))
    assert sum(len(step.rows) for step in engine.steps) == 3


def test_a_row_that_waits_for_its_token_is_held_back_and_the_others_are_not():
    engine = FakeEngine(limits())
    engine.run(request("grammar", 4, waits_for_token=True, max_tokens=6), request("free", 5, max_tokens=12))
    of_slot = [{row.slot for row in step.rows} for step in engine.steps]
    assert of_slot[:4] == [{0, 1}, {1}, {0, 1}, {1}]
    assert engine.right("grammar")
    assert engine.right("free")
    # Nothing in flight, nothing to wait for: then it takes every step.
    engine = FakeEngine(limits(), ahead=False)
    engine.run(request("grammar", 4, waits_for_token=True, max_tokens=6))
    assert len(engine.steps) == 6


def test_results_must_come_in_order_and_whole():
    scheduler = Scheduler(limits())
    scheduler.submit(request("a", 5), 0.0)
    scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="step 1 is due, not 2"):
        scheduler.settle(StepResult(2, {}))
    scheduler = Scheduler(limits())
    scheduler.submit(request("a", 5), 0.0)
    scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="no token for slot 0"):
        scheduler.settle(StepResult(1, {}))


def test_min_tokens_puts_stop_ids_off():
    made = stop_at("a", 3)
    later = request("a", 6, max_tokens=20, stop_ids=made.stop_ids, min_tokens=5)
    engine = FakeEngine(limits())
    engine.run(later)
    assert len(engine.outputs["a"]) > 3
    assert engine.right("a")


# ---- preemption and order


def crowded(**changes) -> Limits:
    return limits(num_full_pages=14, num_sliding_pages=14, max_num_batched_tokens=32, **changes)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_growth_preempts_the_youngest_and_the_output_is_the_same(ahead: bool, prefix_caching: bool):
    engine = FakeEngine(crowded(prefix_caching=prefix_caching), ahead)
    engine.run(*(request(f"r{i}", 8 + i, max_tokens=30) for i in range(4)))
    assert engine.scheduler.num_preemptions > 0
    assert all(engine.right(f"r{i}") for i in range(4))
    assert next(iter(engine.ends)) == "r0"
    again = [seat.request_id for step in engine.steps for seat in step.seats]
    assert again.count("r0") == 1


def test_the_lowest_priority_is_preempted_first():
    engine = FakeEngine(crowded())
    engine.run(*(request(f"r{i}", 8 + i, max_tokens=30, priority=-i) for i in range(4)))
    again = [seat.request_id for step in engine.steps for seat in step.seats]
    assert again.count("r3") == 1
    assert again.count("r0") > 1
    assert all(engine.right(f"r{i}") for i in range(4))


def test_waiting_requests_go_by_priority_then_by_arrival():
    engine = FakeEngine(limits(max_num_seqs=1))
    engine.submit(request("first", 4))
    engine.turn()
    engine.submit(request("c", 4, priority=1), request("a", 4), request("b", 4), request("z", 4, priority=-1))
    engine.run()
    assert list(engine.ends) == ["first", "z", "a", "b", "c"]


def test_a_newcomer_waits_rather_than_begin_with_a_sliver():
    engine = FakeEngine(limits(num_full_pages=12, max_num_batched_tokens=64))
    engine.submit(request("a", 36, max_tokens=8))
    engine.turn()
    engine.turn()
    engine.submit(request("b", 20, salt=b"other"))
    step = engine.turn()
    assert step is not None
    assert len(step.rows) == 1
    engine.run()
    assert engine.right("b")


# ---- the door, the clock and the exit


def test_a_full_queue_turns_newcomers_away_with_an_estimate():
    engine = FakeEngine(limits(max_num_seqs=1, max_waiting=20))
    engine.submit(*(request(f"r{i}", 4, max_tokens=5) for i in range(20)))
    with pytest.raises(Overloaded, match="20 requests wait already, and 20 may") as caught:
        engine.submit(request("late", 4))
    assert caught.value.retry_after_s == 1.0  # no pace known yet
    for _ in range(30):
        engine.turn()
    engine.submit(*(request(f"s{i}", 4, max_tokens=5) for i in range(20 - len(engine.scheduler.waiting))))
    with pytest.raises(Overloaded) as caught:
        engine.submit(request("late", 4))
    assert 8 <= caught.value.retry_after_s <= 20  # two places, one about every five seconds
    engine.run()


def test_preempted_sequences_do_not_count_against_the_queue():
    engine = FakeEngine(crowded(max_waiting=1))
    for i in range(4):
        engine.submit(request(f"r{i}", 8 + i, max_tokens=30))
        engine.turn()
    while not engine.scheduler.num_preemptions:
        engine.turn()
    engine.submit(request("new", 5))
    engine.run()
    assert all(engine.right(name) for name in engine.ends)


def test_deadlines_end_requests_wherever_they_are():
    engine = FakeEngine(limits(max_num_seqs=1))
    engine.submit(request("runs", 4, max_tokens=50, deadline_s=10.0), request("waits", 4, deadline_s=5.0))
    engine.submit(request("in time", 4, deadline_s=100.0))
    engine.run()
    assert engine.ends == {"waits": "expired", "runs": "expired", "in time": "length"}
    assert engine.right("runs")
    # An id that is used again has its own deadline.
    engine = FakeEngine(limits())
    engine.run(request("a", 4, deadline_s=20.0))
    engine.ends.clear()
    engine.now_s = 15.0
    engine.run(request("a", 4, max_tokens=30, deadline_s=500.0))
    assert engine.ends == {"a": "length"}


def test_ids_in_use_are_refused_and_free_again_after_the_end():
    engine = FakeEngine(limits())
    engine.submit(request("a", 4))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        engine.scheduler.submit(request("a", 4), 0.0)
    engine.run()
    assert not engine.scheduler.abort("a")


def test_finish_ends_as_complete():
    engine = FakeEngine(limits())
    engine.submit(request("a", 4, max_tokens=50))
    for _ in range(4):
        engine.turn()
    assert engine.scheduler.finish("a")
    engine.run()
    assert engine.ends == {"a": "stop"}


def test_doing_nothing_while_something_could_run_is_an_error_in_time():
    scheduler = Scheduler(limits(num_full_pages=8, num_sliding_pages=8))
    memory = scheduler.memory
    assert memory.full is not None
    memory.full.take(8)  # a leak
    scheduler.submit(request("a", 4), 0.0)
    for _ in range(STUCK_AFTER - 1):
        assert scheduler.plan(0.0) is None
    with pytest.raises(
        RuntimeError, match=r"100 plans scheduled nothing: 0 sequences run, 1 wait. 0 of 8 full"
    ):
        scheduler.plan(0.0)
    # An empty engine may idle for ever.
    scheduler = Scheduler(limits())
    for _ in range(3 * STUCK_AFTER):
        assert scheduler.plan(0.0) is None


def test_planning_256_decode_rows_takes_little_time():
    """Some 0.4 ms on an idle core; the bound is for busy machines and catches a table rebuilt per row."""
    size = limits(max_num_seqs=256, max_num_batched_tokens=4096, max_model_len=4096, page_size=16, window=512)
    scheduler = Scheduler(replace(size, num_full_pages=256 * 80, num_sliding_pages=256 * 40))
    for i in range(256):
        scheduler.submit(request(f"r{i}", 1000 + i % 16, max_tokens=200, salt=bytes([i])), 0.0)
    seconds: list[float] = []
    while len(seconds) < 40:
        began = perf_counter()
        step = scheduler.plan(0.0)
        took = perf_counter() - began
        assert step is not None
        if all(row.token_ids is None for row in step.rows):
            assert len(step.rows) == 256
            seconds.append(took)
        scheduler.settle(StepResult(step.number, {row.slot: 5 for row in step.rows if row.samples}))
    assert median(seconds) < 0.004
