from __future__ import annotations

import pytest
from scenes import audio, image, limits, request

from gemcut.data import Prompt, StepResult
from gemcut.engine.pages import PagePool
from gemcut.engine.prefix import Chain, cached_prefix
from gemcut.engine.scheduler import Scheduler
from gemcut.engine.sequence import Blocks, Request, media_spans
from gemcut.testing.fake_engine import FakeEngine


def chain(made: Request, page_size: int = 4) -> Chain:
    return Chain(page_size, made.salt, list(made.prompt.token_ids), media_spans(made))


def test_a_name_covers_all_tokens_up_to_the_page_and_none_after():
    ids = list(range(12))
    names = [Chain(4, b"", ids, ()).name(i) for i in range(3)]
    for changed in range(12):
        other = Chain(4, b"", [*ids[:changed], 99, *ids[changed + 1 :]], ())
        same = [other.name(i) == names[i] for i in range(3)]
        assert same == [i < changed // 4 for i in range(3)]
    assert len({len(n) for n in names}) == 1
    assert len(names[0]) == 32


def test_a_chain_follows_the_ids_as_they_grow():
    ids = [1, 2, 3, 4]
    growing = Chain(4, b"", ids, ())
    first = growing.name(0)
    with pytest.raises(AssertionError, match="before its last id was known"):
        growing.name(1)
    ids += [5, 6, 7, 8]
    assert growing.name(1) == Chain(4, b"", ids, ()).name(1)
    assert growing.name(0) == first


def test_the_picture_is_part_of_the_pages_it_lies_in():
    one, other = (chain(request("r", 5, image(6, name), 5)) for name in ("cat", "dog"))
    assert one.name(0) == other.name(0)  # tokens 0..3: before the picture
    assert one.name(1) != other.name(1)
    assert one.name(3) != other.name(3)  # after it: by the chain


def test_touching_pictures_see_each_other_so_both_are_in_both_their_pages():
    alone = chain(request("r", 4, image(4, "cat"), 8))
    touched = chain(request("r", 4, image(4, "cat"), image(4, "dog"), 4))
    assert alone.name(0) == touched.name(0)
    assert alone.name(1) != touched.name(1)  # the same tokens and picture, other KV


def test_tenants_share_nothing():
    names = {chain(request("r", 8, salt=salt)).name(0) for salt in (b"", b"a", b"b")}
    assert len(names) == 3
    # No salt can imitate another one by running into what follows it.
    assert chain(request("r", 8, salt=b"a\0")).name(0) != chain(request("r", 8, salt=b"a")).name(0)


def find(prompt_pages: int, full: set[int] | None, sliding: set[int] | None, window: int, blocks=()) -> int:
    """Pages of the longest usable prefix when the pages of these numbers are cached (page size 4)."""
    names = Chain(4, b"", list(range(prompt_pages * 4)), ())
    pools: list[PagePool | None] = []
    for cached in (full, sliding):
        if cached is None:
            pools.append(None)
            continue
        pool = PagePool(prompt_pages)
        for i, page in enumerate(pool.take(prompt_pages)):
            if i in cached:
                pool.name(page, pool.epoch(page), names.name(i))
        pools.append(pool)
    return cached_prefix(names, prompt_pages * 4, 4, window, *pools, Blocks(tuple(blocks)).floor)


def test_full_pages_must_be_there_from_the_start():
    assert find(6, {0, 1, 2, 4, 5}, None, 8) == 3
    assert find(6, {1, 2}, None, 8) == 0


def test_sliding_pages_must_cover_the_window_before_the_end():
    everything = set(range(6))
    # Window 8: the first query after page k reads back 7 positions, that is 2 pages.
    assert find(6, everything, {4, 5}, 8) == 6
    assert find(6, everything, {5}, 8) == 0
    assert find(6, everything, {2, 3, 5}, 8) == 4
    assert find(6, everything, {0}, 8) == 1  # the window begins at position 0
    # Window 9 reads back 8 positions, still 2 pages; window 10 reads 9, which are 3.
    assert find(6, everything, {4, 5}, 9) == 6
    assert find(6, everything, {4, 5}, 10) == 0
    # Window 1 reads nothing back, but nothing shows nothing.
    assert find(6, None, set(), 1) == 0
    assert find(6, everything, {5}, 1) == 6


def test_the_shorter_of_both_pools_decides():
    assert find(6, {0, 1, 2}, {1, 2, 3, 4, 5}, 8) == 3
    assert find(6, None, {4, 5}, 8) == 6


def test_a_prefix_never_ends_inside_a_vision_block():
    everything = set(range(6))
    assert find(6, everything, everything, 8, blocks=[(6, 23)]) == 6
    assert find(6, everything, everything, 8, blocks=[(6, 25)]) == 1  # page 5 ends inside: down to token 6
    assert find(6, everything, everything, 8, blocks=[(4, 25)]) == 1
    assert find(6, everything, everything, 8, blocks=[(3, 25)]) == 0
    # Down from one block into the next.
    assert find(6, everything, everything, 8, blocks=[(2, 11), (11, 25)]) == 0


# ---- through the scheduler


def test_the_second_turn_of_a_chat_computes_only_what_is_new():
    engine = FakeEngine(limits())
    engine.run(request("first", 21, max_tokens=6))
    told = (*engine.truths["first"].request.prompt.token_ids, *engine.outputs["first"])
    engine.run(Request(request_id="second", prompt=Prompt((*told, 5, 6, 7)), max_tokens=3))
    assert engine.right("second")
    # 21 + 6 tokens, of which the last was never computed: 26, that is 6 whole pages of 4.
    assert engine.cached == {"first": 0, "second": 24}


def test_one_token_is_computed_even_if_all_are_cached():
    engine = FakeEngine(limits())
    engine.run(request("a", 16))
    engine.run(request("b", 16))
    assert engine.cached["b"] == 12
    assert engine.right("b")


def test_a_window_that_has_moved_on_makes_a_shorter_prefix_useless_until_it_is_cached():
    # A pool of 8 sliding pages holds a prompt's last window, not its middle.
    engine = FakeEngine(limits(num_sliding_pages=8, window=8))
    long = request("long", 80)
    engine.run(long)
    same_start = Request(request_id="x", prompt=Prompt((*long.prompt.token_ids[:40], 9, 9)), max_tokens=2)
    engine.run(same_start)
    assert engine.right("x")
    assert engine.cached["x"] == 0
    engine.run(request("again", 80))
    assert engine.right("again")


def test_pages_in_the_middle_of_a_chunk_can_be_found_although_the_window_has_left_them():
    engine = FakeEngine(limits(max_num_batched_tokens=64))
    long = request("long", 60)
    engine.run(long)
    assert len(engine.steps[0].rows[0].token_ids or ()) == 60
    engine.run(Request(request_id="x", prompt=Prompt((*long.prompt.token_ids[:30], 9)), max_tokens=2))
    assert engine.cached["x"] == 28
    assert engine.right("x")


def test_pages_of_a_step_in_flight_are_not_shared_before_it_is_settled():
    engine = FakeEngine(limits(max_num_batched_tokens=64))
    engine.submit(request("a", 16))
    engine.turn()
    engine.submit(request("b", 16))
    engine.run()
    assert engine.cached == {"a": 0, "b": 0}
    assert engine.right("b")


def test_a_picture_in_the_cached_prefix_is_not_encoded_again():
    engine = FakeEngine(limits(max_num_batched_tokens=64))
    engine.run(request("a", 4, image(8), 8))
    engine.run(request("b", 4, image(8), 20))
    assert engine.cached["b"] == 20
    assert [len(step.encode) for step in engine.steps].count(1) == 1


def test_audio_is_causal_and_may_be_cut_by_a_cached_prefix():
    engine = FakeEngine(limits(max_num_batched_tokens=64))
    engine.run(request("a", 4, audio(9), max_tokens=1))
    engine.run(request("b", 4, audio(9), 3))
    assert engine.cached["b"] == 12
    assert engine.right("b")


def test_the_cache_can_be_off_and_a_request_can_pass_it_by():
    engine = FakeEngine(limits(prefix_caching=False))
    engine.run(request("a", 20))
    engine.run(request("b", 20))
    assert engine.cached["b"] == 0
    engine = FakeEngine(limits())
    engine.run(request("a", 20))
    engine.run(request("b", 20, reads_prefix=False))
    assert engine.cached["b"] == 0


def test_nobody_finds_the_pages_of_a_sequence_whose_output_broke() -> None:
    """NaN in K or V of an early chunk shows only when the row samples: by then its pages had names."""
    scheduler = Scheduler(limits(max_num_batched_tokens=8))
    hits = []
    for name, breaks in (("broken", True), ("after", False), ("third", False)):
        scheduler.submit(request(name, 24), 0.0)
        while scheduler.num_unfinished:
            step = scheduler.plan(0.0)
            assert step is not None
            sampling = [row.slot for row in step.rows if row.samples]
            errors = dict.fromkeys(sampling, "not a number") if breaks else {}
            scheduler.settle(StepResult(step.number, dict.fromkeys(set(sampling) - set(errors), 9), errors))
        ends = [news for news in scheduler.drain() if news.end]
        assert [news.end for news in ends] == ["failed" if breaks else "length"]
        hits.append(ends[0].cached_tokens)
    assert hits == [0, 0, 20]
    scheduler.memory.audit([])
