"""The queue: who waits, in which order, and when to turn newcomers away."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from gemcut.engine.sequence import Sequence
from gemcut.errors import Overloaded

_rank = attrgetter("rank")

SMOOTHING = 0.1  # weight of the newest interval in the mean
SHORTEST_RETRY_S, LONGEST_RETRY_S = 1.0, 120.0


class WaitingLine:
    """Sequences by (priority, arrival). Preempted ones wait here too but are never turned away."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._line: list[Sequence] = []
        self._num_preempted = 0
        self._mean_interval_s = 0.0  # between two that left the queue to run
        self._last_left_s: float | None = None

    def __len__(self) -> int:
        return len(self._line)

    @property
    def first(self) -> Sequence:
        return self._line[0]

    def check_room(self, now_s: float) -> None:
        """Raise Overloaded if as many wait as may wait."""
        waiting = len(self._line) - self._num_preempted
        if waiting >= self._max_waiting:
            raise Overloaded(
                f"{waiting} requests wait already, and {self._max_waiting} may.", self.retry_after_s(now_s)
            )

    def retry_after_s(self, now_s: float) -> float:
        """When a tenth of the queue should have moved on, judged by the pace so far. A newcomer that
        comes back for the very next place would meet all the others that were turned away."""
        interval = self._mean_interval_s
        if self._last_left_s is not None:
            interval = max(interval, now_s - self._last_left_s)  # a stalled queue has no pace
        return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, interval * max(1, len(self._line) // 10)))

    def join(self, sequence: Sequence) -> None:
        """Take a place by rank; one that was preempted is, among equals, before all who came later."""
        insort(self._line, sequence, key=_rank)
        self._num_preempted += sequence.num_preempted > 0

    def leave(self, now_s: float) -> Sequence:
        """The first one goes to run."""
        sequence = self._line.pop(0)
        if sequence.num_preempted:
            self._num_preempted -= 1
            return sequence
        if self._last_left_s is not None:
            interval = now_s - self._last_left_s
            if self._mean_interval_s == 0.0:
                self._mean_interval_s = interval
            self._mean_interval_s += SMOOTHING * (interval - self._mean_interval_s)
        self._last_left_s = now_s
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """One that ended while it waited."""
        place = bisect_left(self._line, sequence.rank, key=_rank)
        assert self._line[place] is sequence, "a sequence is not where its rank says"
        del self._line[place]
        self._num_preempted -= sequence.num_preempted > 0
