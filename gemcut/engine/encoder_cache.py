"""Which encoded media the runner keeps, counted in soft tokens.

Keys and integers only: the embeddings belong to the runner, which learns through `Step.encode` what
to add and through `Step.free_media` what to drop. Only sequences with a row in flight, or with a
medium half computed, hold an entry: what waits in the queue holds nothing, so holders always move on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class EncoderCache:
    """At most `capacity` soft tokens. Entries that nobody holds stay until room is wanted; the
    longest unused goes first."""

    def __init__(self, capacity: int) -> None:
        assert capacity >= 0, f"the encoder cache cannot hold {capacity} soft tokens"
        self.capacity = capacity
        self._sizes: dict[bytes, int] = {}
        self._holders: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # longest unused first
        self._doomed: set[bytes] = set()  # wrong content, dropped by the last holder
        self._num_idle = 0
        self._num_tokens = 0
        self._freed: list[bytes] = []
        self.num_hits = 0
        self.num_misses = 0

    @property
    def num_tokens(self) -> int:
        """Soft tokens of all entries."""
        return self._num_tokens

    @property
    def num_held(self) -> int:
        """Soft tokens of the entries that a sequence holds."""
        return self._num_tokens - self._num_idle

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes and key not in self._doomed

    def missing(self, items: Iterable[tuple[bytes, int]]) -> int | None:
        """Soft tokens that must be encoded so that all `items` (key, size) are held at once; None
        if they do not fit beside what others hold."""
        fresh = spared = 0
        for key, size in dict(items).items():
            if key in self._doomed:
                return None  # the old entry must go before the new one can come
            if key not in self._sizes:
                fresh += size
            elif self._holders[key] == 0:
                spared += size  # idle, but wanted: it cannot make room
        return fresh if self.num_held + spared + fresh <= self.capacity else None

    def take(self, key: bytes, size: int) -> bool:
        """Add a holder to the entry; True if it is new and the runner has to encode it. When several
        are wanted together, take the present ones first: a new one may evict what nobody holds."""
        assert key not in self._doomed, "a doomed entry was taken"
        if key in self._sizes:
            assert self._sizes[key] == size, f"one medium has {self._sizes[key]} and {size} soft tokens"
            if self._holders[key] == 0:
                del self._idle[key]
                self._num_idle -= size
            self._holders[key] += 1
            self.num_hits += 1
            return False
        while self._num_tokens + size > self.capacity:
            assert self._idle, f"no room for {size} soft tokens: {self.num_held} of {self.capacity} are held"
            self._drop(next(iter(self._idle)))
        self._sizes[key] = size
        self._holders[key] = 1
        self._num_tokens += size
        self.num_misses += 1
        return True

    def give(self, key: bytes) -> None:
        """Take one holder off the entry; it stays cached until room is wanted."""
        assert self._holders.get(key, 0) > 0, "an encoder entry was given back more often than taken"
        self._holders[key] -= 1
        if self._holders[key] == 0:
            self._idle[key] = None
            self._num_idle += self._sizes[key]
            if key in self._doomed:
                self._drop(key)

    def doom(self, key: bytes) -> None:
        """The entry's content is not to be trusted: never hand it out again."""
        if key in self._sizes:
            self._doomed.add(key)
            if self._holders[key] == 0:
                self._drop(key)

    def drain_freed(self) -> tuple[bytes, ...]:
        """The keys dropped since the last call, for `Step.free_media`."""
        freed, self._freed = tuple(self._freed), []
        return freed

    def _drop(self, key: bytes) -> None:
        size = self._sizes.pop(key)
        del self._holders[key], self._idle[key]
        self._doomed.discard(key)
        self._num_idle -= size
        self._num_tokens -= size
        self._freed.append(key)

    def check(self) -> None:
        """The books balance. Cheap: done at every step."""
        assert 0 <= self._num_idle <= self._num_tokens <= self.capacity, (
            f"encoder cache: {self._num_idle} idle, {self._num_tokens} all, {self.capacity} bound"
        )

    def audit(self, holdings: dict[bytes, int]) -> None:
        """The books agree with `holdings` (key -> holders counted elsewhere). Dear: for tests."""
        self.check()
        assert self._num_tokens == sum(self._sizes.values()), "the sum of the entries is wrong"
        assert self._num_idle == sum(self._sizes[key] for key in self._idle), "the sum of the idle is wrong"
        held = {key: count for key, count in self._holders.items() if count}
        assert held == holdings, f"encoder holders {held} are not those known, {holdings}"
