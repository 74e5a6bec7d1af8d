"""What comes back to a caller: the shapes that vLLM's users know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gemcut.data import TokenLogprobs

FinishReason = Literal["stop", "length", "tool_calls", "abort", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called. `arguments` are plain JSON values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request. cached_tokens: prompt tokens whose KV was found. image_tokens: soft tokens."""

    prompt_tokens: int
    cached_tokens: int
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds. queue_s (until a step took the request up), first_token_s and total_s count from arrival;
    tokens_per_s is the pace after the first token."""

    queue_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer. token_ids: as sampled, the one that ended it included. error: why, if it failed."""

    index: int
    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()
    malformed_calls: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """All answers to one prompt. prompt_logprobs[i] belongs to prompt token i; the first has none."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    timings: Timings
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one answer while it is written.

    text and reasoning: what joined since the last one. token_ids: the new tokens. call_started: names of
    calls that began; tool_calls: calls that are complete. finish_reason: set on the last one.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    call_started: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = field(default=())
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """An engine's counters since its start, and what it holds now. Pages are given as (free, cached, used).

    prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and those found.
    encoder_tokens: soft tokens held by sequences, and cached in all. encoder_hits, encoder_misses: media
    that were there encoded, and those that had to be. graph_replays, by kind, and eager_forwards, by reason:
    how steps were launched. dropped_graphs: what the runner goes without, by reason.
    """

    running: int
    waiting: int
    steps: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    full_pages: tuple[int, int, int]
    sliding_pages: tuple[int, int, int]
    encoder_tokens: tuple[int, int]
    encoder_hits: int
    encoder_misses: int
    graph_replays: Mapping[str, int] = field(default_factory=dict)
    eager_forwards: Mapping[str, int] = field(default_factory=dict)
    dropped_graphs: Mapping[str, int] = field(default_factory=dict)
