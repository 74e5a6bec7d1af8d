"""One pool of KV pages: who holds which page, which pages are kept for their content, which are free.

Integers and hash keys only. A page id covers all layers of the pool's kind (sliding or full); the
memory behind it belongs to the runner. A page is in exactly one of three conditions:

* used: at least one sequence holds it; a shared prefix page is held by several;
* cached: nobody holds it, but its content has a name and can be found again;
* free: neither.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """`num_pages` pages, numbered from 0. Free pages are handed out first, then the longest unused
    cached ones, whose names are then forgotten."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0, f"a page pool needs at least one page, got {num_pages}"
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        # Counts how often a page was handed out: a name that arrives late (with the settled step)
        # is given only if the page was not handed to somebody else in the meantime.
        self._epochs = [0] * num_pages
        self._names: list[bytes | None] = [None] * num_pages
        self._found: dict[bytes, int] = {}
        # First in, first out, so that a page that was given back unsettled can still get its name.
        # OrderedDict and not deque: such a page leaves from the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._num_used = 0

    @property
    def available(self) -> int:
        """Pages that `take` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self._num_used

    def epoch(self, page: int) -> int:
        """The stamp that `name` wants back."""
        return self._epochs[page]

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages to one holder. The caller has looked at `available`."""
        assert count <= self.available, f"{count} pages were taken where {self.available} are available"
        pages = []
        for _ in range(count):
            if self._free:
                page, _ = self._free.popitem(last=False)
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            assert self._holders[page] == 0, f"page {page} was available while held"
            self._holders[page] = 1
            self._epochs[page] += 1
            pages.append(page)
        self._num_used += count
        return pages

    def find(self, name: bytes) -> int | None:
        """The page of that content, or None. It may be evicted unless it is shared at once."""
        return self._found.get(name)

    def share(self, page: int) -> None:
        """Add a holder to a page that was found by its name."""
        assert self._names[page] is not None, f"page {page} has no name and cannot be shared"
        if self._holders[page] == 0:
            del self._cached[page]
            self._num_used += 1
        self._holders[page] += 1

    def give(self, pages: Sequence[int]) -> None:
        """Take one holder off each page. Of those that become unheld, the first is reused first."""
        for page in pages:
            holders = self._holders[page] - 1
            assert holders >= 0, f"page {page} was given back more often than taken"
            self._holders[page] = holders
            if holders == 0:
                self._num_used -= 1
                if self._names[page] is None:
                    self._free[page] = None
                else:
                    self._cached[page] = None

    def name(self, page: int, epoch: int, name: bytes) -> None:
        """Remember what the page holds, so that `find` finds it; held or given back already.

        Does nothing if the page went to somebody else since `epoch`, or if another page bears the
        name (two sequences computed the same prefix side by side: the second copy stays private).
        """
        if self._epochs[page] != epoch or name in self._found:
            return
        assert self._names[page] is None, f"page {page} was named twice in one life"
        self._names[page] = name
        self._found[name] = page
        if self._holders[page] == 0:
            del self._free[page]
            self._cached[page] = None

    def disown(self, name: bytes) -> None:
        """What bears the name is not to be trusted: nobody finds it any more. Holders keep their page."""
        page = self._found.get(name)
        if page is None:
            return
        self._forget(page)
        if self._holders[page] == 0:
            del self._cached[page]
            self._free[page] = None

    def _forget(self, page: int) -> None:
        name = self._names[page]
        assert name is not None, f"page {page} has no name to forget"
        del self._found[name]
        self._names[page] = None

    def check(self) -> None:
        """The books balance. Cheap: done at every step."""
        total = len(self._free) + len(self._cached) + self._num_used
        assert total == self.num_pages, (
            f"{len(self._free)} free + {len(self._cached)} cached + {self._num_used} used pages "
            f"are not {self.num_pages}"
        )

    def audit(self, holdings: dict[int, int]) -> None:
        """The books agree with `holdings` (page -> holders counted elsewhere). Dear: for tests."""
        self.check()
        for page in range(self.num_pages):
            held, name = self._holders[page], self._names[page]
            assert held == holdings.get(page, 0), (
                f"page {page}: {held} holders, {holdings.get(page, 0)} known"
            )
            places = (page in self._free) + (page in self._cached) + (held > 0)
            assert places == 1, f"page {page} is in {places} conditions at once"
            assert (page in self._cached) <= (name is not None), f"cached page {page} has no name"
            assert (page in self._free) <= (name is None), f"free page {page} still has a name"
            assert name is None or self._found.get(name) == page, f"page {page} cannot be found by its name"
        assert len(self._found) == sum(n is not None for n in self._names), "a name leads to a nameless page"
