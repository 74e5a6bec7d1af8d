"""transformers with the same random values says the same: both sides of a comparison are one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_rig import setup, write_config

from gemcut.bench.against import check_peer
from gemcut.bench.contender import Gemcut, Setup, text_prompt
from gemcut.bench.transformers_peer import Transformers
from gemcut.config import EngineConfig
from gemcut.errors import ConfigError


@pytest.fixture(scope="module")
def transformers(moe_config: Path) -> Transformers:
    return Transformers(setup(moe_config), torch.device("cpu"), torch.float32)


def test_answers_are_ours(moe: Gemcut, transformers: Transformers) -> None:
    # none of these answers holds a media placeholder, which transformers embeds as padding
    prompts = [text_prompt(moe.plan, 24, seed=i) for i in (1, 2, 3)]
    ours, theirs = moe.generate(prompts, 12), transformers.generate(prompts, 12)
    assert theirs.answers == ours.answers
    assert len(theirs.step_s) == 11
    assert 0 < theirs.first_token_s[0] < theirs.wall_s


def test_a_dense_model(tmp_path: Path) -> None:
    config = write_config(tmp_path, "dense")
    (ours,) = setup(config).start()
    theirs = Transformers(setup(config), torch.device("cpu"), torch.float32)
    prompts = [text_prompt(ours.plan, 24, seed=0)]
    assert theirs.generate(prompts, 12).answers == ours.generate(prompts, 12).answers
    assert theirs.facts()["experts"] is None


def test_a_checkpoint_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="--random-weights"):
        check_peer("transformers", Setup(config=EngineConfig()), ["prefill"])
