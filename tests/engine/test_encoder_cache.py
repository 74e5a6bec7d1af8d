from __future__ import annotations

import pytest

from gemcut.engine.encoder_cache import EncoderCache


def test_idle_entries_stay_until_room_is_wanted_longest_unused_first():
    cache = EncoderCache(10)
    assert cache.take(b"a", 4)
    assert cache.take(b"b", 4)
    cache.give(b"b")
    cache.give(b"a")
    assert not cache.take(b"a", 4)  # still there
    cache.give(b"a")
    assert cache.take(b"c", 5)
    assert cache.drain_freed() == (b"b",)
    assert b"a" in cache
    assert (cache.num_tokens, cache.num_held) == (9, 5)


def test_missing_counts_what_would_have_to_go():
    cache = EncoderCache(10)
    cache.take(b"a", 4)
    cache.take(b"b", 4)
    assert cache.missing([(b"c", 3)]) is None  # both are held
    cache.give(b"b")
    assert cache.missing([(b"c", 6)]) == 6
    assert cache.missing([(b"b", 4), (b"c", 3)]) is None  # b is wanted too and makes no room
    assert cache.missing([(b"b", 4), (b"c", 2), (b"c", 2)]) == 2  # one picture twice is one entry


def test_doomed_content_is_never_handed_out_again():
    cache = EncoderCache(10)
    cache.take(b"a", 4)
    cache.doom(b"a")
    assert b"a" not in cache
    assert cache.missing([(b"a", 4)]) is None
    cache.give(b"a")
    assert cache.drain_freed() == (b"a",)
    assert cache.missing([(b"a", 4)]) == 4
    cache.take(b"b", 4)
    cache.give(b"b")
    cache.doom(b"b")  # idle: gone at once
    assert cache.drain_freed() == (b"b",)
    cache.doom(b"unknown")
    cache.audit({})


def test_misuse_is_an_assertion():
    cache = EncoderCache(4)
    cache.take(b"a", 4)
    with pytest.raises(AssertionError, match="no room for 1"):
        cache.take(b"b", 1)
    with pytest.raises(AssertionError, match="4 and 3 soft tokens"):
        cache.take(b"a", 3)
    cache.give(b"a")
    with pytest.raises(AssertionError, match="more often than taken"):
        cache.give(b"a")
