"""Random engine sizes and random requests, made to collide: shared beginnings, twin pictures,
several tenants, pools far too small. Everything follows from the `Random` passed in."""

from __future__ import annotations

from random import Random

import numpy as np

from gemcut.data import ImagePatches, MediaKind, Prompt, Span
from gemcut.engine.limits import Limits
from gemcut.engine.sequence import Request
from gemcut.testing.fake_runner import VOCABULARY

PLACEHOLDER = 1  # the id of every soft token's position: only the digest tells pictures apart
FIRST_TEXT_ID = 3

_NO_PIXELS = np.zeros((0, 768), dtype=np.uint8)


def picture(soft_tokens: int, name: str) -> ImagePatches:
    """A picture of which only the size and the identity matter."""
    return ImagePatches(_NO_PIXELS, rows=3, columns=3 * soft_tokens, digest=name.encode().ljust(32, b"."))


def draw_limits(random: Random) -> Limits:
    """An engine, as a rule too small for its load."""
    size = random.choice((1, 2, 3, 4, 8))
    kinds = random.choice(("both", "both", "both", "both", "sliding", "full"))
    max_num_seqs = random.choice((1, 2, 3, 4, 6, 8, 12, 16))
    length = random.randint(48, 140)
    window = random.choice((1, 2, 5, 8, 13, 16, 24, 64))
    # From too few for one to enough for all.
    scales = (0.8, 1.0, 1.3, *(share * max_num_seqs for share in (0.25, 0.4, 0.4, 0.6, 0.8, 1.2)))
    num_full = 1 + int(random.choice(scales) * length / size)
    num_sliding = 2 + int(random.choice(scales) * min(length, window + 14) / size)
    return Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + random.choice((0, 1, 4, 8, 16, 32)),
        max_model_len=length,
        page_size=size,
        window=window,
        num_sliding_pages=num_sliding if kinds != "full" else 0,
        num_full_pages=num_full if kinds != "sliding" else 0,
        bidirectional_vision=random.random() < 0.6,
        largest_block=random.choice((0, 8, 16)),
        encoder_tokens=random.choice((8, 14, 16, 24, 60)),
        encode_tokens=random.choice((1, 6, 12, 40)),
        prefix_caching=random.random() < 0.75,
        max_waiting=random.choice((1, 4, 10, 40)),
    )


class Workload:
    """Draws requests that share beginnings, pictures and tenants."""

    def __init__(self, random: Random, limits: Limits) -> None:
        self._random = random
        self._limits = limits
        self._count = 0
        # Twins: of each size two pictures, whose placeholders look the same.
        sizes = [random.randint(1, 14) for _ in range(3)]
        self._pictures = [picture(size, f"{i}{twin}") for i, size in enumerate(sizes) for twin in "ab"]
        self._heads = [self._parts(random.randint(1, 4)) for _ in range(4)]

    def _parts(self, count: int) -> list[list[int] | tuple[MediaKind, ImagePatches]]:
        random = self._random
        parts: list[list[int] | tuple[MediaKind, ImagePatches]] = []
        for _ in range(count):
            if random.random() < 0.35:
                kind: MediaKind = random.choice(("image", "image", "image", "video", "audio"))
                parts.append((kind, random.choice(self._pictures)))
                if random.random() < 0.1:
                    continue  # the next one may touch it
            parts.append(
                [random.randint(FIRST_TEXT_ID, FIRST_TEXT_ID + 3) for _ in range(random.randint(1, 9))]
            )
        return parts

    def draw(self, now_s: float) -> Request:
        """The next request."""
        random = self._random
        self._count += 1
        parts = random.choice(self._heads) if random.random() < 0.7 else []
        parts = parts + self._parts(random.randint(0 if parts else 1, 4))
        ids: list[int] = []
        spans: list[Span] = []
        media: list[ImagePatches] = []
        for part in parts:
            if isinstance(part, list):
                ids += part
                continue
            kind, medium = part
            spans.append(Span(kind, len(media), len(ids), len(ids) + medium.soft_tokens))
            ids += [PLACEHOLDER] * medium.soft_tokens
            media.append(medium)
        return Request(
            request_id=f"r{self._count}",
            prompt=Prompt(tuple(ids), tuple(spans)),
            media=tuple(media),
            max_tokens=None if random.random() < 0.1 else random.choice((1, 5, 12, 30, 60)),
            min_tokens=random.choice((0, 0, 3)),
            stop_ids=frozenset(random.sample(range(VOCABULARY), random.choice((0, 0, 1, 2)))),
            priority=random.choice((0, 0, 0, 1, -1)),
            deadline_s=now_s + random.expovariate(1 / 30) if random.random() < 0.1 else None,
            salt=random.choice((b"", b"", b"a", b"b")),
            waits_for_token=random.random() < 0.15,
            reads_prefix=random.random() < 0.95,
        )
