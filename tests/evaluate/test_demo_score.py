"""The demo's accuracy is one number, whoever reports it: its training, its record, or `gemcut eval demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "cli"))  # for cli_rig
from cli_rig import call

from gemcut.demo import CHECKPOINT, fonts
from gemcut.demo.evaluate import SEED
from gemcut.demo.train import exact_answers
from gemcut.evaluate.baselines import baselines

ROOT = Path(__file__).parents[2]
ITEMS = 100  # the first wrong answers of the record are among them


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((ROOT / "bench/records/demo-accuracy.json").read_text())["transformers"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `gemcut eval demo` kept."""
    assert fonts.faces(True), "pip install gemcut[demo]"
    folder = tmp_path_factory.mktemp("eval")
    words = ("--items", str(ITEMS), "--device", "cpu", "--kv-bytes", "64MiB", "--out", str(folder))
    assert call("eval", "demo", *words).code == 0
    return [json.loads(line) for line in (folder / "demo-demo" / "answers.jsonl").read_text().splitlines()]


def test_right_and_wrong_as_in_the_record(answers: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Item by item as transformers answered, the wrong words as well."""
    wrong = {
        (each["outcome"]["question"], each["outcome"]["expected"]): each["outcome"]["got"]
        for each in record["wrong_or_differing"]
    }
    assert len(answers) == ITEMS
    found = {(a["question"], a["target"]["text"]): a["text"] for a in answers if a["points"] == 0}
    assert found
    assert found == {key: wrong[key] for key in found}
    assert not [a for a in answers if a["points"] and (a["question"], a["target"]["text"]) in wrong]


def test_the_training_reports_the_same(answers: list[dict[str, Any]], tmp_path: Path) -> None:
    first = [a for a in answers if int(a["id"].removeprefix(f"{SEED}-")) < 40]
    reported = exact_answers(CHECKPOINT, tmp_path / "answers", None, 40)
    assert reported.score.count == 40 == len(first)
    assert reported.score.mean == pytest.approx(sum(a["points"] for a in first) / 40)
    # answers of an earlier training are not taken for this one's
    assert exact_answers(CHECKPOINT, tmp_path / "answers", None, 2).score.count == 2


def test_the_baseline_is_the_records(record: dict[str, Any]) -> None:
    (baseline,) = baselines("demo")
    right, asked = record["right_and_asked"]["all"]
    assert baseline.score == right / asked
    for paper in ("README.md", "gemcut/demo/README.md"):
        assert f"{right:,}" in (ROOT / paper).read_text()
