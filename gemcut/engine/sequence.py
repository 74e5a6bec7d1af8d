"""A request as it enters the scheduler, the sequence it becomes, and the news it sends back.

No tensors and no clock. A `Sequence` is the scheduler's own book-keeping; other rooms see `Request`
and `Progress` only.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from gemcut.data import MediaSpan, Medium, Prompt
from gemcut.engine.prefix import Chain

End = Literal["stop", "length", "aborted", "expired", "failed"]
Phase = Literal["waiting", "running", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to compute. Ids only: text, stop strings and sampling belong to others.

    media: one encoder input for each of the prompt's spans, in their order.
    max_tokens: None for all that the context leaves.
    stop_ids: an id of these ends the sequence once `min_tokens` are there; empty to ignore the end.
    priority: lower goes first; equal ones in order of arrival.
    deadline_s: on the clock whose time is passed to the scheduler.
    salt: requests share cached prefixes and media only with those of the same salt (a tenant).
    waits_for_token: the next row needs the last token on the host (a grammar's mask), so it is not
        planned before that token is settled.
    reads_prefix: False if every prompt position has to be computed (prompt logprobs).
    sampling: handed to the runner with the `Seat`, unread.
    """

    request_id: str
    prompt: Prompt
    media: tuple[Medium, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    deadline_s: float | None = None
    salt: bytes = b""
    waits_for_token: bool = False
    reads_prefix: bool = True
    sampling: object = None


@dataclass(frozen=True, slots=True)
class Progress:
    """News of one request: a token, an end, or both.

    slot: the row slot the token was sampled in, to look into the step's other results by.
    cached_tokens: prompt tokens that the prefix cache spared it.
    error: why it failed, with end "failed".
    """

    request_id: str
    token_id: int | None
    end: End | None
    slot: int | None = None
    cached_tokens: int = 0
    error: str | None = None


def media_spans(request: Request) -> tuple[MediaSpan, ...]:
    """The request's spans with the keys of their encoder-cache entries.

    The salt is part of the key: whether a picture is cached must not tell one tenant what another
    one sent.
    """
    salt = request.salt
    return tuple(
        MediaSpan(span.kind, sha256(salt + m.digest).digest() if salt else m.digest, span.start, span.stop)
        for span, m in zip(request.prompt.spans, request.media, strict=True)
    )


def vision_blocks(spans: tuple[MediaSpan, ...]) -> tuple[tuple[int, int], ...]:
    """Maximal runs of positions with pictures or video frames (spec 3): they attend to each other."""
    blocks: list[tuple[int, int]] = []
    for span in spans:
        if span.kind == "audio":
            continue
        if blocks and blocks[-1][1] == span.start:
            blocks[-1] = (blocks[-1][0], span.stop)
        else:
            blocks.append((span.start, span.stop))
    return tuple(blocks)


class Blocks:
    """Stretches of a prompt that are computed in one piece or not at all."""

    __slots__ = ("starts", "stops")

    def __init__(self, blocks: tuple[tuple[int, int], ...]) -> None:
        self.starts = [start for start, _ in blocks]
        self.stops = [stop for _, stop in blocks]

    def floor(self, position: int) -> int:
        """The position itself, or the start of the block that has it strictly inside."""
        i = bisect_left(self.starts, position) - 1
        return self.starts[i] if i >= 0 and self.stops[i] > position else position

    def unit(self, start: int) -> int:
        """The least chunk from `start`: the block that begins there, or one token."""
        i = bisect_left(self.starts, start)
        return self.stops[i] - start if i < len(self.starts) and self.starts[i] == start else 1


class Sequence:
    """A request on its way. Positions [0, planned) have KV computed or in flight.

    `total` counts the ids of prompt and generation, the one still in flight (`unknown`) included;
    `ids` are those known on the host.
    """

    __slots__ = (
        "blocks", "cached_tokens", "chain", "end", "full_pages", "held_key", "ids", "in_prefill",
        "is_seated", "limit", "next_span", "num_preempted", "num_prompt", "phase", "planned",
        "quiet_until", "rank", "request",
        "sliding_first", "sliding_pages", "slot", "spans", "total", "unknown", "waits",
    )  # fmt: skip

    def __init__(self, request: Request, max_tokens: int, arrival: int, page_size: int, bidirectional: bool):
        self.request = request
        self.rank = (request.priority, arrival)
        self.ids = list(request.prompt.token_ids)
        self.num_prompt = len(self.ids)
        self.limit = self.num_prompt + max_tokens
        self.spans = media_spans(request)
        self.blocks = Blocks(vision_blocks(self.spans) if bidirectional else ())
        self.chain = Chain(page_size, request.salt, self.ids, self.spans)
        self.waits = request.waits_for_token
        self.phase: Phase = "waiting"
        self.end: End | None = None
        self.num_preempted = 0
        self.cached_tokens: int | None = None  # set by the first admission
        self.total = self.num_prompt
        self.unknown = False
        self.clear()

    def clear(self) -> None:
        """Forget where the KV was: the sequence starts again from its ids."""
        self.slot = -1
        self.planned = 0
        self.is_seated = False  # a step has told the runner of it
        self.in_prefill = True
        self.full_pages: list[int] = []
        self.sliding_first = 0  # table index of sliding_pages[0]
        self.sliding_pages: list[int] = []
        self.quiet_until = 0  # decode rows at positions below neither take, complete nor release a page
        self.next_span = 0  # the first span that is not computed whole
        self.held_key: bytes | None = None  # encoder entry of a span that is half computed

    @property
    def decodes(self) -> bool:
        """A decode row could be planned now."""
        return not self.in_prefill and self.total < self.limit and not (self.unknown and self.waits)

    def chunk_stop(self, start: int, stop: int) -> int:
        """The last admissible chunk end in [start, stop]; `start` if there is none beyond it."""
        return max(start, self.blocks.floor(stop))

    def spans_in(self, start: int, stop: int) -> tuple[MediaSpan, ...]:
        """The spans that overlap [start, stop), for start at `planned`. Moves `next_span` up to it."""
        spans, i = self.spans, self.next_span
        while i < len(spans) and spans[i].stop <= start:
            i += 1
        self.next_span = first = i
        while i < len(spans) and spans[i].start < stop:
            i += 1
        return spans[first:i]
