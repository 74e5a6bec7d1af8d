"""The line that an engine logs when it starts: as many sequences as it says run at once, and no more."""

from __future__ import annotations

import logging
import re

import pytest

from gemcut.llm import LLM
from gemcut.sampling import SamplingParams

ANSWER = 6


def fits(caplog: pytest.LogCaptureFixture, **settings: int) -> tuple[LLM, int, int]:
    """An engine, and what it says: so many sequences of so many tokens, the longest that it names."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gemcut.runner.start"):
        llm = LLM(device="cpu", enable_prefix_caching=False, **settings)
    found = re.findall(r"(\d+) of ([\d,]+) tokens", caplog.messages[-1].split("at once: ")[1])
    count, length = found[-1]
    return llm, int(count), int(length.replace(",", ""))


def fill(llm: LLM, count: int, length: int) -> tuple[int, int]:
    """Run `count` sequences of `length` tokens, prompt and answer; the most that ran at once, preemptions."""
    engine, most = llm._engine, 0
    step = engine.step

    def watched():
        nonlocal most
        updates = step()
        decoding = [seq for seq in engine.scheduler.running if not seq.in_prefill]
        most = max(most, len(decoding))
        return updates

    engine.step = watched
    before = llm.stats().preemptions
    prompts = [[5 + (i + j) % 400 for j in range(length - ANSWER)] for i in range(count)]
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    engine.step = step
    assert all(len(output.outputs[0].token_ids) == ANSWER for output in outputs)
    return most, llm.stats().preemptions - before


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_bytes": 3_000_000, "max_model_len": 160},  # the full pages are few
        {"kv_bytes": 3_000_000, "max_model_len": 161, "page_size": 4},
        {"kv_bytes": 8_000_000, "max_model_len": 65, "max_num_seqs": 5},  # the places are few
        {"kv_bytes": 2_000_000, "max_model_len": 64, "page_size": 64},
        {"kv_bytes": 1_500_000, "max_model_len": 1000},  # the longest is shorter than asked for
    ],
)
def test_what_the_line_says_is_what_runs(settings: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    llm, count, length = fits(caplog, **{"max_num_batched_tokens": 256, "max_num_seqs": 64} | settings)
    assert count >= 1
    assert length <= settings["max_model_len"]
    assert fill(llm, count, length) == (count, 0)
    # pages that admission kept free may let one more in; others wait, or take another's place
    most, preemptions = fill(llm, count + 2, length)
    assert most <= count + 1 or preemptions > 0
