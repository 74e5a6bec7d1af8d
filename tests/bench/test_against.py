"""transformers with the same random values says the same: both sides of a comparison are one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_rig import setup, write_config

from gemcut.bench import transformers_peer
from gemcut.bench.against import check_peer
from gemcut.bench.contender import Gemcut, Setup, picture_prompt, random_picture, text_prompt
from gemcut.bench.report import read_all
from gemcut.bench.transformers_peer import Transformers
from gemcut.cli import main
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
    assert theirs.first_token_s[0] > 0
    assert theirs.first_token_s[0] + sum(theirs.step_s) <= theirs.wall_s


def test_answers_about_pictures_are_ours(moe: Gemcut, transformers: Transformers) -> None:
    """The same words about different pictures, one batch; then two pictures of different sizes."""
    prompts = [picture_prompt(moe.plan, [random_picture(12, seed)], 8, seed=0) for seed in (0, 10)]
    theirs = transformers.generate(prompts, 8).answers
    assert theirs == moe.generate(prompts, 8).answers
    assert theirs[0] != theirs[1]
    both = [picture_prompt(moe.plan, [random_picture(12, 0), random_picture(6, 1)], 8, seed=0)]
    assert transformers.generate(both, 8).answers == moe.generate(both, 8).answers


def test_batches_run_one_after_another(
    moe: Gemcut, transformers: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_peer, "LARGEST_BATCH", 2)
    prompts = [text_prompt(moe.plan, 24, seed=i) for i in (1, 2, 3)]
    trace = transformers.generate(prompts, 4)
    assert trace.answers == moe.generate(prompts, 4).answers
    assert (trace.most_running, trace.step_s) == (2, [])
    first, second, third = trace.first_token_s
    assert 0 < first == second < third < trace.wall_s


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


# ---- in a benchmark


def test_both_in_one_run(moe_config: Path, tmp_path: Path) -> None:
    words = ("--random-weights", str(moe_config), "--allow-unknown-config", "--device", "cpu")
    sizes = ("--kv-bytes", "16MiB", "--max-num-seqs", "4", "--max-model-len", "512")
    common = (*words, *sizes, "--against", "transformers", "--records", str(tmp_path))
    assert main(["bench", "batch", "--requests", "33", "--cached", "8", "--new", "2", *common]) == 0
    assert main(["bench", "vision", "--pictures", "2", "--rounds", "1", *common]) == 0
    records = {record.subject: record for record in read_all(tmp_path)}
    batch, vision = records["batch"], records["vision"]
    assert [(row["engine"], row["at_once"]) for row in batch.results] == [("gemcut", 4), ("transformers", 32)]
    assert batch.notes[-1] == (
        "transformers by turns with gemcut, on one device; "
        "its batches, of at most 32 prompts, run one after another"
    )
    assert [(row["what"], row["pictures"], row["engine"]) for row in vision.results] == [
        ("encode", 2, "gemcut"),
        ("encode", 2, "transformers"),
        ("first token", 1, "gemcut"),
        ("first token", 1, "transformers"),
    ]
    assert vision.notes[-1].endswith("pictures come prepared to both, and lie on the device for transformers")
