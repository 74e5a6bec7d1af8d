"""What sequences hold: pages of both pools and entries of the encoder cache.

The scheduler decides who gets what; here it is taken, written down in the sequence, and given back.
Integers only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from gemcut.data import EncodeItem, PageRun
from gemcut.engine.encoder_cache import EncoderCache
from gemcut.engine.limits import Limits
from gemcut.engine.pages import PagePool
from gemcut.engine.prefix import cached_prefix
from gemcut.engine.sequence import Sequence

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Completion:
    """In a step page number `index` of the sequence becomes full: (page, epoch) of each pool."""

    sequence: Sequence
    slot: int
    index: int
    full: tuple[int, int] | None
    sliding: tuple[int, int] | None


class Memory:
    """The pools and the encoder cache of one engine. A pool is None if no layer is of its kind."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.full = PagePool(limits.num_full_pages) if limits.num_full_pages else None
        self.sliding = PagePool(limits.num_sliding_pages) if limits.num_sliding_pages else None
        self.encoder = EncoderCache(limits.encoder_tokens)
        self._spent: list[bytes] = []  # encoder entries whose holders' last row is in the newest step

    def begin_step(self) -> None:
        """A step is about to be planned: the last one's media may make room for others."""
        for key in self._spent:
            self.encoder.give(key)
        self._spent.clear()

    def share_prefix(self, seq: Sequence) -> None:
        """Hold what is cached of the sequence and move `planned` behind it; at least one token is
        left to compute."""
        limits, full, sliding = self.limits, self.full, self.sliding
        if not (limits.prefix_caching and seq.request.reads_prefix):
            return
        size, chain = limits.page_size, seq.chain
        count = cached_prefix(chain, seq.total - 1, size, limits.window, full, sliding, seq.blocks.floor)
        seq.planned = count * size
        if full is not None:
            seq.full_pages = _share(full, [chain.name(i) for i in range(count)])
        if sliding is not None:
            seq.sliding_first = max(0, seq.planned - limits.window + 1) // size
            seq.sliding_pages = _share(sliding, [chain.name(i) for i in range(seq.sliding_first, count)])

    def reach(self, seq: Sequence, reserve: int = 0) -> int:
        """The position up to which pages could be had, leaving `reserve` of each pool alone."""
        size, reach = self.limits.page_size, seq.total
        if self.full is not None:
            pages = len(seq.full_pages) + max(0, self.full.available - reserve)
            reach = min(reach, pages * size)
        if self.sliding is not None:
            pages = len(seq.sliding_pages) + max(0, self.sliding.available - reserve)
            reach = min(reach, (seq.sliding_first + pages) * size)
        return reach

    def holds_all(self, seq: Sequence, reserve: int) -> bool:
        """Whether full pages for every known token could be had, leaving `reserve` alone."""
        if self.full is None:
            return True
        missing = -(-seq.total // self.limits.page_size) - len(seq.full_pages)
        return missing + reserve <= self.full.available

    def leave_window(self, seq: Sequence) -> None:
        """Give back the sliding pages that no position from `planned` on can see."""
        if self.sliding is None:
            return
        first = max(0, seq.planned - self.limits.window + 1) // self.limits.page_size
        count = first - seq.sliding_first
        if count > 0:
            self.sliding.give(seq.sliding_pages[:count])
            del seq.sliding_pages[:count]
            seq.sliding_first = first

    def extend(self, seq: Sequence, stop: int) -> tuple[PageRun | None, PageRun | None, list[Completion]]:
        """Take the pages for [planned, stop) and move `planned`. Returns what joins the slot's tables
        (all that it holds, if the sequence is not seated yet) and the pages that become full."""
        limits, start = self.limits, seq.planned
        size, all_of_it = limits.page_size, not seq.is_seated
        full_run = sliding_run = None
        if self.full is not None:
            have = len(seq.full_pages)
            seq.full_pages += self.full.take(max(0, -(-stop // size) - have))
            full_run = _run(0 if all_of_it else have, seq.full_pages, 0)
        if self.sliding is not None:
            first, have = seq.sliding_first, seq.sliding_first + len(seq.sliding_pages)
            seq.sliding_pages += self.sliding.take(max(0, -(-stop // size) - have))
            sliding_run = _run(first if all_of_it else have, seq.sliding_pages, first)
        seq.planned = stop
        # The next position that is first in its page takes one, and the one before it completes one.
        seq.quiet_until = -(-stop // size) * size - limits.prefix_caching
        if self.sliding is not None:
            seq.quiet_until = min(seq.quiet_until, (seq.sliding_first + 1) * size + limits.window - 1)
        full_up = range(start // size, stop // size) if limits.prefix_caching else ()
        return full_run, sliding_run, [self._completion(seq, i) for i in full_up]

    def _completion(self, seq: Sequence, index: int) -> Completion:
        full = sliding = None
        if self.full is not None:
            page = seq.full_pages[index]
            full = (page, self.full.epoch(page))
        if self.sliding is not None:
            page = seq.sliding_pages[index - seq.sliding_first]
            sliding = (page, self.sliding.epoch(page))
        return Completion(seq, seq.slot, index, full, sliding)

    def name_pages(self, done: Completion) -> None:
        """The completion is settled: the pages can be found, even if they were given back meanwhile."""
        seq = done.sequence
        if (done.index + 1) * self.limits.page_size > len(seq.ids):
            return  # a ghost's page: the sequence ended before the last id became known
        name = seq.chain.name(done.index)
        if self.full is not None and done.full is not None:
            self.full.name(*done.full, name)
        if self.sliding is not None and done.sliding is not None:
            self.sliding.name(*done.sliding, name)

    def distrust(self, seq: Sequence) -> None:
        """The sequence's output is broken, and nobody knows since which position: none of its pages,
        shared ones included, may be found again. A poisoned prefix would break all who come after."""
        for index in range(len(seq.ids) // self.limits.page_size):
            name = seq.chain.name(index)
            for pool in (self.full, self.sliding):
                if pool is not None:
                    pool.disown(name)

    def encodable(self, seq: Sequence, stop: int, encoded: int) -> int:
        """Cut the chunk [planned, stop) before the first piece whose media cannot be held, or not be
        encoded in a step that encodes `encoded` soft tokens already."""
        start = seq.planned
        spans = seq.spans_in(start, stop)
        if spans and seq.held_key is not None:
            spans = spans[1:]  # half computed, so held already
        wanted: list[tuple[bytes, int]] = []
        piece, before, fresh = -1, 0, 0
        for span in spans:
            if (begin := seq.blocks.floor(span.start)) != piece:
                piece, before = begin, encoded + fresh
            wanted.append((span.key, span.stop - span.start))
            missing = self.encoder.missing(wanted)
            # A piece larger than a step's share of encoding is encoded nevertheless, alone.
            if missing is None or (before and encoded + missing > self.limits.encode_tokens):
                return max(start, piece)
            fresh = missing
        return stop

    def take_media(self, seq: Sequence, stop: int) -> list[EncodeItem]:
        """Hold the entries of chunk [planned, stop): for this step, or until a span that goes on is
        computed. Returns what has to be encoded."""
        encode = []
        spans = seq.spans_in(seq.planned, stop)
        held = seq.held_key is not None
        # Those present first, or a new one might evict them.
        for span in sorted(spans[held:], key=lambda span: span.key not in self.encoder):
            if self.encoder.take(span.key, span.stop - span.start):
                encode.append(EncodeItem(span.kind, span.key, seq.request.media[seq.spans.index(span)]))
        seq.held_key = None
        for span in spans:
            if span.stop <= stop:
                self._spent.append(span.key)
            else:
                seq.held_key = span.key
        return encode

    def give_back(self, seq: Sequence) -> None:
        """The sequence holds nothing any more. Rows in flight do not mind: later steps run later."""
        # The tail first: the head of a prefix serves more of those who come later.
        if self.full is not None:
            self.full.give(seq.full_pages[::-1])
        if self.sliding is not None:
            self.sliding.give(seq.sliding_pages[::-1])
        if seq.held_key is not None:
            self.encoder.give(seq.held_key)
        seq.clear()

    def check(self) -> None:
        """Every page is free, cached or used, and the encoder cache keeps its bound."""
        if self.full is not None:
            self.full.check()
        if self.sliding is not None:
            self.sliding.check()
        self.encoder.check()

    def describe(self) -> str:
        """What is available and what is held, for an error's text."""
        full = f"{self.full.available} of {self.full.num_pages}" if self.full else "no"
        sliding = f"{self.sliding.available} of {self.sliding.num_pages}" if self.sliding else "no"
        encoder = self.encoder
        return (
            f"{full} full and {sliding} sliding pages are available; {encoder.num_held} of "
            f"{encoder.capacity} encoder tokens are held."
        )

    def audit(self, running: list[Sequence], ballast: tuple[list[int], list[int]] = ([], [])) -> None:
        """The books agree with what the sequences say they hold (and with full and sliding pages held
        for other reasons). Dear: for tests."""
        for pool, held in (
            (self.full, [seq.full_pages for seq in running] + [ballast[0]]),
            (self.sliding, [seq.sliding_pages for seq in running] + [ballast[1]]),
        ):
            if pool is not None:
                pool.audit(_count(page for pages in held for page in pages))
        keys = [seq.held_key for seq in running if seq.held_key is not None]
        self.encoder.audit(_count(keys + self._spent))


def _count(things: Iterable[_T]) -> dict[_T, int]:
    counts: dict[_T, int] = {}
    for thing in things:
        counts[thing] = counts.get(thing, 0) + 1
    return counts


def _share(pool: PagePool, names: list[bytes]) -> list[int]:
    pages = []
    for name in names:
        page = pool.find(name)
        assert page is not None, "a page of the prefix that was just found is gone"
        pool.share(page)
        pages.append(page)
    return pages


def _run(index: int, pages: list[int], origin: int) -> PageRun | None:
    """The table entries from `index` on, where pages[0] is entry `origin`."""
    return PageRun(index, tuple(pages[index - origin :])) if index - origin < len(pages) else None
