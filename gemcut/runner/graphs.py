"""Which sizes of step have a graph, which graph a step takes, and whether a graph may be trusted.

Enters: what the runner runs, a way to capture it, and a budget of memory. Leaves: replays by size, every one
of them compared with the eager run on random steps first. What is given up on the way is logged and counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from typing import Literal, Protocol

import torch

from gemcut.data import ForwardCounts, Row
from gemcut.errors import ConfigError
from gemcut.kernels import paged_attention
from gemcut.models.gemma4.text import Attend
from gemcut.runner.batch import Size
from gemcut.runner.capture import Capture, Replay, Run
from gemcut.runner.encode import MOST_CAPTURED, PICTURES

log = logging.getLogger(__name__)

Kind = Literal["full", "piecewise"]
# The largest top_k that a head's graph draws with; 0: the likeliest token only. Each is one way through
# `kernels.sample`.
HEADS = (0, 64)
FINE_FROM = 256  # tokens from which padding costs time: below, a step waits for the weights
EIGHTHS = 8  # sizes between a power of two and the next

Check = Callable[[Replay], list[torch.Tensor]]


class Checks(Protocol):
    """Runs things on random inputs, from the same state each time, and returns the tensors that count."""

    def forward(self, size: Size, run: Replay) -> list[torch.Tensor]: ...

    def encode(self, count: int, run: Replay) -> list[torch.Tensor]: ...

    def head(self, count: int, max_top_k: int, run: Replay) -> list[torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class Graph:
    """A forward of one size as a replay."""

    kind: Kind
    size: Size
    replay: Replay


@dataclass(slots=True)
class Graphs:
    """The graphs of one runner, and how many forwards took which way.

    decodes, others: for steps of single tokens and for all steps, by rising size. heads: (rows, max_top_k) ->
    replay. encoders: patches -> replay. dropped: what was not captured or does not agree, and why.
    """

    counts: ForwardCounts = field(default_factory=ForwardCounts)
    decodes: list[Graph] = field(default_factory=list)
    others: list[Graph] = field(default_factory=list)
    heads: dict[tuple[int, int], Replay] = field(default_factory=dict)
    encoders: dict[int, Replay] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    num_bytes: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.decodes) + len(self.others) + len(self.heads) + len(self.encoders)

    @property
    def kinds(self) -> str:
        """What forwards run as, for people: `full`, `piecewise`, `full, piecewise`, `off`."""
        return ", ".join(sorted({graph.kind for graph in [*self.decodes, *self.others]})) or "off"

    def find(self, rows: Sequence[Row]) -> Graph | None:
        """The smallest graph that a step fits into."""
        tokens = sum(row.count for row in rows)
        if tokens == len(rows) and not any(row.spans for row in rows):
            for graph in self.decodes:
                if graph.size.rows >= len(rows):
                    return graph
        for graph in self.others:
            if graph.size.tokens >= tokens:
                return graph
        return None

    def find_head(self, rows: int, max_top_k: int) -> Replay | None:
        """The smallest graph that draws for so many rows."""
        fits = [key for key in self.heads if key[0] >= rows and key[1] >= max_top_k]
        return self.heads[min(fits)] if fits else None

    def find_encoder(self, pictures: int, patches: int) -> Replay | None:
        """The smallest graph of the tower that so many pictures fit into; counted either way."""
        if not self.encoders:
            return None
        fits = [count for count in self.encoders if count >= patches and pictures <= PICTURES]
        if not fits:
            self.counts.eager["encoder: no graph of this size"] += 1
            return None
        self.counts.replays["encoder"] += 1
        return self.encoders[min(fits)]


def decode_sizes(max_num_seqs: int, pages: int) -> list[Size]:
    """Sizes of steps with one token a row: 1, 2, 4, 8, by eights up to 64, by eighths of a power of two from
    there on, and the largest."""
    counts = [1, 2, 4, *range(8, 65, 8)]
    while counts[-1] < max_num_seqs:
        counts.append(counts[-1] + _eighth(counts[-1]))
    counts = [count for count in counts if count < max_num_seqs] + [max_num_seqs]
    return [Size(count, count, pages, False) for count in counts]


def other_sizes(max_num_tokens: int, max_num_seqs: int, pages: int, *, media: bool) -> list[Size]:
    """Sizes of all other steps: by eighths of a power of two from `FINE_FROM` on, coarser below."""
    counts = [16, 32, 48, 64, *range(96, FINE_FROM + 1, 32)]
    while counts[-1] < max_num_tokens:
        counts.append(counts[-1] + _eighth(counts[-1]))
    counts = [count for count in counts if count < max_num_tokens] + [max_num_tokens]
    # attention takes as many tokens as rows for a step of single tokens
    return [Size(count, max_num_seqs + (count == max_num_seqs), pages, media) for count in counts]


def encoder_sizes() -> list[int]:
    """Patches of the tower's graphs: eighths of the most, and of its half, a picture of 280 tokens."""
    half = MOST_CAPTURED // 2
    eighth = half // EIGHTHS
    return [*range(eighth, half + 1, eighth), *range(half + 2 * eighth, MOST_CAPTURED + 1, 2 * eighth)]


def padding_waste(sizes: Sequence[Size]) -> float:
    """The largest share of padding in a step of more than `FINE_FROM` tokens."""
    tokens = [FINE_FROM, *(size.tokens for size in sizes if size.tokens > FINE_FROM)]
    return max((1 - (less + 1) / more for less, more in pairwise(tokens)), default=0.0)


def _eighth(count: int) -> int:
    """An eighth of the largest power of two that is not above `count`."""
    return (1 << count.bit_length() - 1) // EIGHTHS


def build(
    kinds: Sequence[Kind],
    decodes: Sequence[Size],
    others: Sequence[Size],
    encoders: Sequence[int],
    *,
    forward: Callable[[Size, Attend], object],
    head: Callable[[int, int], object],
    encode: Callable[[int], object],
    capture: Capture,
    checks: Checks,
    most_bytes: int,
) -> Graphs:
    """Capture all sizes, the largest first, each as the first of `kinds` that works and agrees.

    A size that cannot be had as any of them goes without, as do all smaller ones when graphs take
    `most_bytes`. "full" alone is an order: then ConfigError is raised instead.
    """
    began = time.perf_counter()
    graphs = Graphs()

    def go_without(what: str, reason: str, details: str) -> None:
        if tuple(kinds) == ("full",):
            raise ConfigError(f"graphs cannot be full: {what}: {details}. Use --graphs auto.")
        log.warning("no graph for %s: %s", what, details)
        graphs.dropped.append((what, details))
        graphs.counts.dropped[reason] += 1

    def no_room(what: str) -> bool:
        used = capture.used_bytes()
        if used >= most_bytes:
            sizes = f"{used / 1e9:.2f} GB of {most_bytes / 1e9:.2f} GB kept for graphs are used"
            go_without(f"{what}, and all that are smaller", "memory", sizes)
        return used >= most_bytes

    def take(what: str, make: Callable[[Run], Replay], run: Run, check: Check) -> Replay | None:
        """A replay of `run` that does what it does."""
        want = check(partial(run, paged_attention))
        try:
            replay = make(run)
            got = check(replay)
        except RuntimeError as error:
            go_without(what, "capture", f"it cannot be captured: {error}")
            return None
        difference = compare(want, got)
        if difference:
            go_without(what, "check", difference)
            return None
        return replay

    makers = {"full": capture.full, "piecewise": capture.piecewise}

    def take_forwards(sizes: Sequence[Size], found: list[Graph]) -> None:
        for size in sorted(sizes, key=lambda size: size.tokens, reverse=True):
            what = f"{size.tokens} tokens of {size.rows} rows"
            if no_room(what):
                break
            for kind in kinds:
                replay = take(
                    f"{what}, {kind}",
                    makers[kind],
                    partial(forward, size),
                    partial(checks.forward, size),
                )
                if replay is not None:
                    found.insert(0, Graph(kind, size, replay))
                    break

    # decode steps are the most frequent, and small: they come before memory runs out
    take_forwards(decodes, graphs.decodes)
    for count, max_top_k in product(sorted({size.rows for size in decodes}, reverse=True), HEADS):
        what = f"the tokens of {count} rows, top_k up to {max_top_k}"
        if no_room(what):
            break
        replay = take(
            what,
            capture.full,
            lambda _, count=count, max_top_k=max_top_k: head(count, max_top_k),
            partial(checks.head, count, max_top_k),
        )
        if replay is not None:
            graphs.heads[count, max_top_k] = replay
    for count in sorted(encoders, reverse=True):
        what = f"pictures of {count} patches"
        if no_room(what):
            break
        replay = take(
            what,
            capture.full,
            lambda _, count=count: encode(count),
            partial(checks.encode, count),
        )
        if replay is not None:
            graphs.encoders[count] = replay
    take_forwards(others, graphs.others)
    graphs.num_bytes, graphs.seconds = capture.used_bytes(), time.perf_counter() - began
    return graphs


def compare(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> str:
    """Why a replay is not the eager run, bit by bit; empty if it is.

    The kernels and their shapes are the same, so nothing may differ; nor may anything that counts come from
    padding, which is NaN.
    """
    for index, (eager, replayed) in enumerate(zip(want, got, strict=True)):
        lost = int((~eager.isfinite()).sum())
        if lost:
            return f"in output {index} of the eager run {lost} of {eager.numel()} values are no numbers"
        differing = int((eager != replayed).sum())
        if differing:
            worst = (eager.double() - replayed.double()).abs().nan_to_num(float("inf")).max().item()
            return (
                f"output {index} is not the eager run's in {differing} of {eager.numel()} values, by up to "
                f"{worst:.3g}"
            )
    return ""
