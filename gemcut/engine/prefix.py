"""Names for the content of KV pages, and the longest prefix that is cached under them.

A page's KV depends on every token before it and in it, on the media whose soft tokens lie there, and
on whose it is. Its name is therefore SHA-256 over the name of the page before, the page's ids, and the
identity of the media in it; the chain begins with the tenant's salt. The full digest is the key: a
shortened or seeded hash would make collisions, and with them other people's pictures, a possibility.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from hashlib import sha256

from gemcut.data import MediaSpan
from gemcut.engine.pages import PagePool


class Chain:
    """The page names of one sequence, computed as far as they are asked for."""

    __slots__ = ("_groups", "_ids", "_names", "_page_size", "_starts")

    def __init__(self, page_size: int, salt: bytes, ids: Sequence[int], spans: tuple[MediaSpan, ...]) -> None:
        self._page_size = page_size
        self._ids = ids  # the sequence's own list: it grows
        self._names = [sha256(b"gemcut pages" + len(salt).to_bytes(8, "little") + salt).digest()]
        # Spans that touch form one block and see each other's soft tokens in both directions, so the
        # identity of each goes into every page of the block.
        self._groups: list[list[MediaSpan]] = []
        for span in spans:
            if self._groups and self._groups[-1][-1].stop == span.start:
                self._groups[-1].append(span)
            else:
                self._groups.append([span])
        self._starts = [group[0].start for group in self._groups]

    def name(self, page: int) -> bytes:
        """The name of page number `page` of the sequence; all its ids must be known."""
        names, size = self._names, self._page_size
        for i in range(len(names) - 1, page + 1):
            start, stop = i * size, (i + 1) * size
            assert stop <= len(self._ids), f"page {i} was named before its last id was known"
            digest = sha256(names[i])
            digest.update(array("q", self._ids[start:stop]).tobytes())
            if self._groups and start < self._groups[-1][-1].stop:
                for group in self._groups[max(0, bisect_right(self._starts, start) - 1) :]:
                    if group[0].start >= stop:
                        break
                    if group[-1].stop > start:
                        digest.update(_identity(group, start))
            names.append(digest.digest())
        return names[page + 1]


def _identity(group: list[MediaSpan], origin: int) -> bytes:
    parts = [array("q", [len(group)]).tobytes()]
    for span in group:
        parts.append(array("q", [span.start - origin, span.stop - origin, len(span.key)]).tobytes())
        parts.append(span.key)
        parts.append(span.kind.encode())
    return b"".join(parts)


def cached_prefix(
    chain: Chain,
    num_tokens: int,
    page_size: int,
    window: int,
    full: PagePool | None,
    sliding: PagePool | None,
    floor: Callable[[int], int],
) -> int:
    """Pages of the longest usable prefix of the first `num_tokens` tokens.

    A prefix of h tokens is usable if every full page below h is cached, and every sliding page with a
    position of [h - window + 1, h): what the first computed query reads. `floor` maps an end inside
    a vision block to the block's start (the block's early KV depends on its late tokens).
    """
    count = num_tokens // page_size
    if full is not None:
        found = 0
        while found < count and full.find(chain.name(found)) is not None:
            found += 1
        count = found
    while count > 0:
        end = count * page_size
        start = floor(end)
        if start < end:
            count = start // page_size
            continue
        if sliding is None:
            return count
        # A window of 1 reads nothing back, yet something has to show that the prefix was computed.
        first = max(0, min(end - window + 1, end - 1)) // page_size
        for page in range(count - 1, first - 1, -1):
            if sliding.find(chain.name(page)) is None:
                count = page  # a shorter prefix that includes this page's successor needs it too
                break
        else:
            return count
    return 0
