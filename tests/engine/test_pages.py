from __future__ import annotations

from random import Random

import pytest

from gemcut.engine.pages import PagePool


def name(text: str) -> bytes:
    return text.encode()


def test_free_pages_go_before_cached_ones_and_the_longest_unused_of_these_first():
    pool = PagePool(4)
    a, b, c = pool.take(3)
    for page, text in ((a, "a"), (b, "b"), (c, "c")):
        pool.name(page, pool.epoch(page), name(text))
    pool.give([b, a, c])
    assert (pool.num_free, pool.num_cached, pool.num_used) == (1, 3, 0)
    assert pool.take(2) == [3, b]  # page 3 was free, b was given back first
    assert pool.find(name("b")) is None
    assert pool.find(name("a")) == a


def test_a_shared_page_stays_until_its_last_holder_leaves():
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.name(page, pool.epoch(page), name("x"))
    pool.share(page)
    pool.give([page])
    assert pool.num_used == 1
    pool.give([page])
    assert (pool.num_used, pool.num_cached) == (0, 1)
    pool.share(page)
    assert (pool.num_used, pool.num_cached) == (1, 0)


def test_a_page_given_back_before_its_name_came_is_cached_if_nobody_took_it():
    pool = PagePool(2)
    a, b = pool.take(2)
    epochs = pool.epoch(a), pool.epoch(b)
    pool.give([a, b])
    assert pool.take(1) == [a]
    pool.name(a, epochs[0], name("a"))  # handed out again meanwhile: not what the name says
    pool.name(b, epochs[1], name("b"))
    assert pool.find(name("a")) is None
    assert pool.find(name("b")) == b
    assert (pool.num_free, pool.num_cached, pool.num_used) == (0, 1, 1)


def test_the_second_copy_of_a_content_stays_private():
    pool = PagePool(2)
    a, b = pool.take(2)
    for page in (a, b):
        pool.name(page, pool.epoch(page), name("same"))
    pool.give([b, a])
    assert pool.find(name("same")) == a
    assert (pool.num_free, pool.num_cached) == (1, 1)


def test_misuse_is_an_assertion():
    pool = PagePool(2)
    (page,) = pool.take(1)
    with pytest.raises(AssertionError, match="2 pages were taken where 1"):
        pool.take(2)
    with pytest.raises(AssertionError, match="no name"):
        pool.share(page)
    pool.give([page])
    with pytest.raises(AssertionError, match="more often than taken"):
        pool.give([page])


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_the_books(seed: int):
    random = Random(seed)
    pool = PagePool(12)
    held: list[int] = []
    for _ in range(2000):
        act = random.random()
        if act < 0.4 and pool.available:
            held += pool.take(random.randint(1, pool.available))
        elif act < 0.8 and held:
            random.shuffle(held)
            count = random.randint(1, len(held))
            pool.give(held[:count])
            del held[:count]
        elif act < 0.9 and held:
            page = random.choice(held)
            if not pool._names[page]:
                pool.name(page, pool.epoch(page), name(str(random.randint(0, 30))))
        else:
            page = pool.find(name(str(random.randint(0, 30))))
            if page is not None:
                pool.share(page)
                held.append(page)
        pool.audit({page: held.count(page) for page in held})
