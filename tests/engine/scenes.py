"""Small engines and requests for the tests of this folder."""

from __future__ import annotations

from gemcut.data import ImagePatches, MediaKind, Prompt, Span
from gemcut.engine.limits import Limits
from gemcut.engine.sequence import Request
from gemcut.testing.workload import PLACEHOLDER, picture


def limits(**changes) -> Limits:
    """Roomy for a handful of short requests."""
    sizes = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 128,
        "page_size": 4,
        "window": 8,
        "num_sliding_pages": 64,
        "num_full_pages": 128,
        "largest_block": 32,
        "encoder_tokens": 64,
        "encode_tokens": 64,
    }
    return Limits(**(sizes | changes))


def request(name: str, *parts: int | tuple[MediaKind, ImagePatches], **changes) -> Request:
    """A prompt of `parts`: a number of text tokens, or a medium. No stop ids unless given."""
    ids: list[int] = []
    spans: list[Span] = []
    media: list[ImagePatches] = []
    for part in parts:
        if isinstance(part, int):
            ids += [3 + i % 7 for i in range(len(ids), len(ids) + part)]
        else:
            kind, medium = part
            spans.append(Span(kind, len(media), len(ids), len(ids) + medium.soft_tokens))
            ids += [PLACEHOLDER] * medium.soft_tokens
            media.append(medium)
    values = {"max_tokens": 4} | changes
    return Request(request_id=name, prompt=Prompt(tuple(ids), tuple(spans)), media=tuple(media), **values)


def image(soft_tokens: int, name: str = "cat") -> tuple[MediaKind, ImagePatches]:
    return "image", picture(soft_tokens, name)


def audio(soft_tokens: int, name: str = "song") -> tuple[MediaKind, ImagePatches]:
    return "audio", picture(soft_tokens, name)
