"""`gemcut eval` as it is typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import pytest

sys.path.append(str(Path(__file__).parents[1] / "cli"))  # for cli_rig
from cli_rig import call, refused

from gemcut.cli.eval import TaskName, settings
from gemcut.errors import ConfigError
from gemcut.evaluate.benchmarks import BENCHMARKS

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = ("--device", "cpu", "--kv-bytes", "64MiB", "--no-signs")


def test_every_task_can_be_named() -> None:
    assert set(get_args(TaskName)) == {"demo", *(each.name for each in BENCHMARKS)}


def test_settings() -> None:
    assert settings("kernels=torch,graphs=off,deterministic=on,max-num-seqs=3,kv_bytes=1GiB") == {
        "kernels": "torch",
        "graphs": "off",
        "deterministic": True,
        "max_num_seqs": 3,
        "kv_bytes": 1 << 30,
    }
    for wrong in ("kernel=torch", "max_num_seqs=few", "deterministic=perhaps", "kernels", ""):
        with pytest.raises(ConfigError):
            settings(wrong) if wrong != "kernels" else settings("model=x")


def test_a_demo_run_is_told_and_kept(tmp_path: Path) -> None:
    words = ("eval", "demo", "--items", "6", "--out", str(tmp_path), *SMALL)
    result = call(*words)
    assert result.code == 0, result
    assert "transformers" in result.out
    assert str(tmp_path / "demo-demo") in result.err
    again = call(*words, "--json")
    assert again.json["score"]["count"] == 6
    assert len((tmp_path / "demo-demo" / "answers.jsonl").read_text().splitlines()) == 6


def test_a_comparison_is_told_and_kept(tmp_path: Path) -> None:
    words = ("eval", "demo", "--items", "4", "--out", str(tmp_path), *SMALL)
    result = call(*words, "--compare", "dtype=float32", "dtype=bfloat16", "--margin-dtype", "float32")
    assert result.code == 0, result
    assert "Same answers: 4 of 4." in result.out
    assert "reference and second" in result.out
    assert "Nothing beyond rounding" in result.out
    kept = json.loads((tmp_path / "demo-compare.json").read_text())
    assert [side["used"]["dtype"] for side in kept["sides"]] == ["float32", "bfloat16"]


def test_a_comparison_that_finds_something_ends_with_1() -> None:
    """No distance at all is allowed here."""
    words = ("eval", "demo", "--items", "3", *SMALL, "--compare", "dtype=float32", "dtype=bfloat16")
    result = call(*words, "--max-kl", "0")
    assert result.code == 1
    assert "the limit is 0" in result.err


def test_a_benchmark_from_a_folder(tmp_path: Path) -> None:
    words = ("eval", "mmmu", "--data", str(FIXTURES / "mmmu"), "--out", str(tmp_path), "--max-tokens", "8")
    result = call(*words, "--device", "cpu", "--kv-bytes", "64MiB")
    assert result.code == 0, result
    assert "Art_Theory" in result.out
    assert "SGLang" in result.out


def test_mistakes_are_named(tmp_path: Path) -> None:
    refused(2, "eval", "mmlu", says="mmlu_pro")
    refused(2, "eval", "demo", "--compare", "kernels=torch", "kernels=tarch", says="tarch")
    refused(2, "eval", "demo", "--compare", "kernls=torch", "kernels=torch", says="kernls")
    refused(2, "eval", "demo", "--data", str(tmp_path), says="--data")
    refused(2, "eval", "gsm8k", "--no-signs", says="--no-signs")
    refused(2, "eval", "demo", "--base-url", "http://x", "--compare", "a=b", "c=d", says="--base-url")
    refused(2, "eval", "demo", "--temperature", "-1", says="--temperature")
    # the data is looked at before a model is
    refused(1, "eval", "gsm8k", "--data", str(tmp_path), "--model", str(tmp_path), says="test.jsonl")
    refused(2, "eval", "mmmu", "--form", "direct", says="--form")
    refused(2, "eval", "mmmu_pro", "--form", "short", says="cot or direct")
    refused(2, "eval", "mmmu_pro", "--orders", "2", says="--orders")
