"""The door: refused if, and only if, the request could not run alone."""

from __future__ import annotations

from random import Random

import pytest
from scenes import audio, image, limits, request

import gemcut.engine.scheduler
from gemcut.data import Prompt, Span
from gemcut.engine.limits import Limits, admit
from gemcut.engine.sequence import Request
from gemcut.errors import ConfigError, InvalidRequest
from gemcut.testing.fake_engine import FakeEngine
from gemcut.testing.workload import picture


def refusal(made: Request, size: Limits) -> str:
    with pytest.raises(InvalidRequest) as caught:
        admit(made, size, size.longest)
    return str(caught.value)


def test_a_refusal_says_what_was_asked_and_what_there_is():
    assert "prompt is empty" in refusal(request("r"), limits())
    assert "at least 1, got 0" in refusal(request("r", 4, max_tokens=0), limits())
    assert "128 tokens; the model's context of 128" in refusal(request("r", 128), limits())
    assert "at most 28" in refusal(request("r", 100, max_tokens=29), limits())
    text = refusal(request("r", 30, max_tokens=12), limits(num_full_pages=10))
    assert (
        "30 prompt tokens and 12 to generate need 11 full-attention pages of 4 tokens; there are 10" in text
    )
    text = refusal(request("r", 30), limits(num_sliding_pages=2))
    assert "need 3 sliding pages of 4 tokens at a time; there are 2" in text
    text = refusal(request("r", 4, image(40), 2), limits())
    assert "block at position 4 has 40 tokens, which are computed at one go; a step holds 32" in text
    text = refusal(request("r", 10, image(20), 2), limits(num_sliding_pages=6))
    assert "block [10, 30) and the window before it need 8 sliding pages; there are 6" in text
    text = refusal(request("r", 4, audio(40), 2), limits(encoder_tokens=32))
    assert "has 40 soft tokens, which are encoded at one go; the encoder cache holds 32" in text


def test_placeholders_and_soft_tokens_must_agree():
    # 702 embeddings for 703 placeholders.
    made = Request(
        request_id="r", prompt=Prompt((1,) * 10, (Span("image", 0, 2, 9),)), media=(picture(6, "cat"),)
    )
    assert "6 soft tokens for 7 placeholders" in refusal(made, limits())
    made = Request(request_id="r", prompt=Prompt((1,) * 10, (Span("image", 0, 2, 9),)))
    assert "1 media spans for 0 media" in refusal(made, limits())
    spans = (Span("image", 0, 2, 6), Span("image", 1, 5, 9))
    made = Request(
        request_id="r", prompt=Prompt((1,) * 10, spans), media=(picture(4, "cat"), picture(4, "dog"))
    )
    assert "overlaps another" in refusal(made, limits())


def test_max_tokens_defaults_to_what_the_context_or_the_pools_leave():
    made = request("r", 20, max_tokens=None)
    assert admit(made, limits(), limits().longest) == 108
    small = limits(num_full_pages=10)  # 40 tokens with KV, and one more that needs none
    assert small.longest == 41
    assert admit(made, small, small.longest) == 21
    tight = limits(num_sliding_pages=2, window=8)  # 8 positions never fit in 2 pages at every alignment
    assert tight.longest == 9
    assert admit(request("r", 5, max_tokens=None), tight, tight.longest) == 4


def test_sizes_that_cannot_work_are_config_errors():
    for changes, text in (
        ({"max_num_seqs": 17}, "max_num_seqs 17 exceeds max_num_batched_tokens 16"),
        ({"page_size": 0}, "page_size must be at least 1, got 0"),
        ({"num_full_pages": 0, "num_sliding_pages": 0}, "nowhere to keep KV"),
        ({"window": 0}, "window of at least 1, got 0"),
        ({"num_full_pages": -1}, "must not be negative, got -1"),
    ):
        with pytest.raises(ConfigError, match=text):
            limits(**changes)


def draw(random: Random) -> tuple[Limits, Request]:
    size = random.choice((1, 2, 3, 4))
    kinds = random.choice(("both", "sliding", "full"))
    seqs = random.randint(1, 2)
    small = limits(
        max_num_seqs=seqs,
        max_num_batched_tokens=random.randint(seqs, 6),
        max_model_len=60,
        page_size=size,
        window=random.randint(1, 10),
        num_sliding_pages=random.randint(1, 24 // size) if kinds != "full" else 0,
        num_full_pages=random.randint(1, 60 // size) if kinds != "sliding" else 0,
        bidirectional_vision=random.random() < 0.7,
        largest_block=random.randint(0, 10),
        encoder_tokens=random.randint(4, 12),
        encode_tokens=random.randint(1, 12),
    )
    parts: list = []
    for _ in range(random.randint(1, 4)):
        count, kind = random.randint(1, 10), random.choice((None, image, audio))
        parts.append(kind(count, f"{count}") if kind else min(count, 6))
    return small, request("r", *parts, max_tokens=random.choice((1, 2, 8, None)))


@pytest.mark.parametrize("ahead", [True, False])
def test_the_door_is_exact(ahead: bool, monkeypatch: pytest.MonkeyPatch):
    """Whoever is admitted comes to an end alone; whoever is refused would not, were the door open."""
    random = Random(7)
    outcomes = {"admitted": 0, "refused": 0}
    for _ in range(700):
        size, made = draw(random)
        if made.max_tokens is not None and len(made.prompt) + made.max_tokens > size.max_model_len:
            continue
        try:
            max_tokens = admit(made, size, size.longest)
        except InvalidRequest:
            outcomes["refused"] += 1
            with monkeypatch.context() as patch:
                patch.setattr(gemcut.engine.scheduler, "admit", lambda made, *_: made.max_tokens or 1)
                # Stuck, or over what the runner can hold.
                with pytest.raises(
                    (RuntimeError, AssertionError), match=r"scheduled nothing|overflow the runner"
                ):
                    FakeEngine(size, ahead).run(made)
        else:
            outcomes["admitted"] += 1
            engine = FakeEngine(size, ahead)
            engine.run(made)
            assert engine.right("r")
            assert len(engine.outputs["r"]) == max_tokens
            assert engine.scheduler.num_preemptions == 0
    assert min(outcomes.values()) > 140


def test_a_default_max_tokens_is_the_most_that_would_be_admitted():
    random = Random(8)
    for _ in range(500):
        size, made = draw(random)
        try:
            default = admit(request("r", len(made.prompt), max_tokens=None), size, size.longest)
        except InvalidRequest:
            continue
        if len(made.prompt) + default < size.max_model_len:
            refusal(request("r", len(made.prompt), max_tokens=default + 1), size)
