"""What there is: pages, slots, budgets. And the door: may this request ever run?

Integers only. A request is refused if, and only if, it could not be completed with the whole engine
to itself; everything else is a matter of waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcut.engine.sequence import Request, media_spans, vision_blocks
from gemcut.errors import ConfigError, InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes that the scheduler works within.

    num_sliding_pages, num_full_pages: 0 for a model without layers of that kind.
    window: positions a sliding query sees, its own included (spec 3).
    bidirectional_vision: pictures and frames attend within themselves, so they are never cut.
    largest_block: the longest vision block that the runner's buffers admit beside (not on top of)
        `max_num_batched_tokens`.
    encoder_tokens: soft tokens that the runner keeps; `encode_tokens`: those encoded in one step,
        one larger medium alone excepted.
    max_waiting: requests in the queue before newcomers are turned away.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    window: int
    num_sliding_pages: int
    num_full_pages: int
    bidirectional_vision: bool = True
    largest_block: int = 1120
    encoder_tokens: int = 8192
    encode_tokens: int = 4096
    prefix_caching: bool = True
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("num_sliding_pages", "num_full_pages", "largest_block", "encoder_tokens", "max_waiting"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not self.num_sliding_pages and not self.num_full_pages:
            raise ConfigError("Neither sliding nor full pages: there is nowhere to keep KV.")
        if self.num_sliding_pages and self.window < 1:
            raise ConfigError(f"Sliding layers need a window of at least 1, got {self.window}.")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs {self.max_num_seqs} exceeds max_num_batched_tokens "
                f"{self.max_num_batched_tokens}: a step could not hold a decode row for every sequence. "
                "Raise the latter or lower the former."
            )

    def sliding_pages(self, start: int, stop: int) -> int:
        """Sliding pages that a row computing [start, stop) reads and writes."""
        return (stop - 1) // self.page_size - max(0, start - self.window + 1) // self.page_size + 1

    def sliding_pages_of(self, num_tokens: int) -> int:
        """The most sliding pages that any single position below `num_tokens` needs at a time."""
        last = num_tokens - 1
        first = min(self.window - 1, last)  # the need grows until the window is full, then repeats
        return max(self.sliding_pages(p, p + 1) for p in range(first, min(last, first + self.page_size) + 1))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, the last one included (it never needs KV), that text could
        reach alone."""
        tokens = self.max_model_len - 1
        if self.num_full_pages:
            tokens = min(tokens, self.num_full_pages * self.page_size)
        if self.num_sliding_pages and tokens and self.sliding_pages_of(tokens) > self.num_sliding_pages:
            fits, too_long = 0, tokens
            while too_long - fits > 1:
                middle = (fits + too_long) // 2
                if self.sliding_pages_of(middle) > self.num_sliding_pages:
                    too_long = middle
                else:
                    fits = middle
            tokens = fits
        return tokens + 1


def admit(request: Request, limits: Limits, longest: int) -> int:
    """Check a request at the door; returns its max_tokens. `longest` is `limits.longest`.

    Raises InvalidRequest with what was asked and what there is.
    """
    num_prompt = len(request.prompt)
    if num_prompt == 0:
        raise InvalidRequest("The prompt is empty.", "prompt")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {request.max_tokens}.", "max_tokens")
    _check_media(request, num_prompt)

    if num_prompt >= limits.max_model_len:
        raise InvalidRequest(
            f"The prompt has {num_prompt} tokens; the model's context of {limits.max_model_len} must also "
            "hold the answer. Shorten the prompt.",
            "prompt",
        )
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = max(1, longest - num_prompt)
    elif num_prompt + max_tokens > limits.max_model_len:
        raise InvalidRequest(
            f"The prompt has {num_prompt} tokens and max_tokens is {max_tokens}; the context holds "
            f"{limits.max_model_len}. Ask for at most {limits.max_model_len - num_prompt}.",
            "max_tokens",
        )

    num_cached = num_prompt + max_tokens - 1  # the last token is never read back
    param = "max_tokens" if num_prompt < longest else "prompt"
    if limits.num_full_pages:
        needed = -(-num_cached // limits.page_size)
        if needed > limits.num_full_pages:
            raise InvalidRequest(
                f"{num_prompt} prompt tokens and {max_tokens} to generate need {needed} full-attention pages "
                f"of {limits.page_size} tokens; there are {limits.num_full_pages}. Ask for less, or start "
                "the engine with more KV memory.",
                param,
            )
    if limits.num_sliding_pages:
        needed = limits.sliding_pages_of(num_cached)
        if needed > limits.num_sliding_pages:
            raise InvalidRequest(
                f"{num_prompt} prompt tokens and {max_tokens} to generate need {needed} sliding pages of "
                f"{limits.page_size} tokens at a time; there are {limits.num_sliding_pages}. Ask for less, "
                "or start the engine with more KV memory.",
                param,
            )
    _check_room_for_media(request, limits)
    return max_tokens


def _check_media(request: Request, num_prompt: int) -> None:
    """Spans lie in order inside the prompt, and each is as long as its medium's soft tokens."""
    spans = request.prompt.spans
    if len(spans) != len(request.media):
        raise InvalidRequest(
            f"The prompt has {len(spans)} media spans for {len(request.media)} media.", "prompt"
        )
    end = 0
    for span, medium in zip(spans, request.media, strict=True):
        if not end <= span.start < span.stop <= num_prompt:
            raise InvalidRequest(
                f"The {span.kind} span [{span.start}, {span.stop}) overlaps another or leaves the prompt.",
                "prompt",
            )
        if span.stop - span.start != medium.soft_tokens:
            raise InvalidRequest(
                f"The {span.kind} at position {span.start} has {medium.soft_tokens} soft tokens for "
                f"{span.stop - span.start} placeholders.",
                "prompt",
            )
        end = span.stop


def _check_room_for_media(request: Request, limits: Limits) -> None:
    """Each piece that is computed at one go fits: its rows, its sliding pages, its soft tokens."""
    spans = media_spans(request)
    blocks = vision_blocks(spans) if limits.bidirectional_vision else ()
    most_rows = max(limits.max_num_batched_tokens, limits.largest_block)
    for start, stop in blocks:
        if stop - start > most_rows:
            raise InvalidRequest(
                f"The vision block at position {start} has {stop - start} tokens, which are computed at one "
                f"go; a step holds {most_rows}. Lower the picture's max_soft_tokens.",
                "prompt",
            )
        if limits.num_sliding_pages and limits.sliding_pages(start, stop) > limits.num_sliding_pages:
            raise InvalidRequest(
                f"The vision block [{start}, {stop}) and the window before it need "
                f"{limits.sliding_pages(start, stop)} sliding pages; there are {limits.num_sliding_pages}. "
                "Lower the picture's max_soft_tokens, or start the engine with more KV memory.",
                "prompt",
            )
    whole = dict(blocks)
    stop = 0
    for i, span in enumerate(spans):
        if span.start < stop:
            continue  # counted with the block it lies in
        stop = whole.get(span.start, span.stop)
        sizes = {s.key: s.stop - s.start for s in spans[i:] if s.start < stop}
        if sum(sizes.values()) > limits.encoder_tokens:
            raise InvalidRequest(
                f"The {span.kind} at position {span.start} has {sum(sizes.values())} soft tokens, which are "
                f"encoded at one go; the encoder cache holds {limits.encoder_tokens}.",
                "prompt",
            )
