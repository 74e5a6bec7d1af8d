"""`gemcut bench` from the command line, on a tiny config and in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from cli_rig import call, refused

SMALL = ("--device", "cpu", "--kv-bytes", "8MiB", "--max-num-seqs", "4", "--max-model-len", "128")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("moe") / "config.json"
    path.write_text(json.dumps(tiny.make_config("moe").to_dict(), default=str))
    return str(path)


def random_weights(config: str) -> tuple[str, ...]:
    return ("--random-weights", config, "--allow-unknown-config", *SMALL)


def test_a_table_a_record_and_its_json_agree(config: str, tmp_path: Path) -> None:
    words = ("bench", "prefill", *random_weights(config), "--tokens", "8,16", "--rounds", "1")
    result = call(*words, "--records", str(tmp_path), "--json")
    assert result.code == 0, result.err
    assert result.json == json.loads((tmp_path / "cpu" / "prefill.json").read_text())
    assert [row["tokens"] for row in result.json["results"]] == [8, 16]
    assert result.json["facts"]["weights"] == "random"
    assert result.json["ceilings"]["copy_bytes"] > 0
    assert "written to" in result.err
    shown = call(*words)
    assert "Prefill of one prompt" in shown.out
    assert "of the roofline" in shown.out


def test_several_subjects_run_on_one_set_of_weights(config: str, tmp_path: Path) -> None:
    result = call(
        *("bench", "all", "--only", "memory,prefill,decode", *random_weights(config)),
        *("--tokens", "8", "--batches", "2", "--cached", "8", "--new", "3", "--records", str(tmp_path)),
    )
    assert result.code == 0, result.err
    assert result.err.count("started in") == 1
    assert {path.name for path in (tmp_path / "cpu").iterdir()} == {
        "memory.json",
        "prefill.json",
        "decode.json",
    }


def test_settings_are_set_against_one_another(config: str) -> None:
    result = call(
        *("bench", "prefill", *random_weights(config), "--tokens", "8", "--rounds", "2", "--json"),
        *("--compare", "kernels=torch,graphs=off", "--compare", "graphs=auto"),
    )
    assert result.code == 0, result.err
    assert [row["engine"] for row in result.json["results"]] == ["kernels=torch graphs=off", "graphs=auto"]
    assert set(result.json["facts"]["engines"]) == {"kernels=torch graphs=off", "graphs=auto"}


def test_a_subject_that_fails_leaves_the_others(config: str) -> None:
    result = call("bench", "all", "--only", "prefill,memory", *random_weights(config), "--tokens", "200")
    assert result.code == 1
    assert "prefill failed: The prompt has 200 tokens" in result.err
    assert "Memory, GB" in result.out


def test_what_the_default_leaves_out_is_said(config: str) -> None:
    result = call("bench", "prefill", *random_weights(config), "--rounds", "1", "--json")
    assert result.code == 0, result.err
    assert [row["tokens"] for row in result.json["results"]] == [16, 64]
    assert result.json["notes"] == [
        "left out: 128, 256, 512, 1,024, 2,048, 4,096, 8,192 tokens; the engine holds 127"
    ]


def test_profile_takes_steps_by_name(config: str) -> None:
    result = call("bench", "profile", "prefill", "8", "16", "decode", "2", *random_weights(config), "--json")
    assert result.code == 0, result.err
    steps = [(row["kind"], row["size"]) for row in result.json["results"]]
    assert steps == [("prefill", 8), ("prefill", 16), ("decode", 2)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("all", "--only", "prefill,speed"), "There is no speed. Choose from prefill"),
        (("prefill", "--compare", "kernels=torch"), "--compare wants two settings or more"),
        (("prefill", "--compare", "speed=high"), "compare by kernels, numerics, graphs"),
        (("prefill", "--tokens", "16,many"), "is no list of whole numbers"),
        (("prefill", "--tokens", "0"), "holds a number below 1"),
        (("prefill", "--model", "a", "--random-weights", "31B"), "give one of them"),
        (("prefill", "--max-num-seqs", "0"), "must be a whole number of at least 1"),
        (("profile", "decode"), "How many? Name steps as in decode 64."),
        (("profile", "16"), "name steps as in prefill 256"),
        (("startup", "--compare", "graphs=off", "--compare", "graphs=auto"), "startup measures one engine"),
        (("overhead", "--random-weights", "31B"), "--compare and --random-weights do not apply"),
    ],
)
def test_mistakes_on_the_command_line(words: tuple[str, ...], says: str) -> None:
    refused(2, "bench", *words, says=says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("memory", "--random-weights", "no-such-folder", "--device", "cpu"), "E4B, 12B, 26B-A4B, 31B"),
        (("prefill", "--random-weights", "31B", "--against", "vllm"), "vllm is not installed"),
        (("prefill", "--against", "transformers"), "give --random-weights"),
        (
            ("all", "--only", "memory", "--random-weights", "31B", "--against", "transformers"),
            "not by memory",
        ),
        (("memory", "--random-weights", "E2B", "--device", "cpu"), "clipped linears"),
    ],
)
def test_models_that_cannot_be_measured(words: tuple[str, ...], says: str) -> None:
    result = call("bench", *words)
    assert result.code == 1
    assert says in result.err
    assert "Traceback" not in result.err
