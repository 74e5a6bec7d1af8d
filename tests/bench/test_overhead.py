"""What the front end costs, measured with as few answers as will do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemcut.bench import overhead
from gemcut.bench.contender import Setup
from gemcut.bench.overhead import OverHttp, Row
from gemcut.bench.records import Record
from gemcut.bench.serve import Workload
from gemcut.bench.serve_client import ServerFailed
from gemcut.config import EngineConfig
from gemcut.errors import GemcutError

SMALL = EngineConfig(device="cpu", kv_bytes=16 << 20, max_num_seqs=2, max_model_len=256)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the server; two engines and a test run share the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_pair_is_compared_with_itself() -> None:
    """A round that was slow on both sides tells as much as the others."""
    row = Row.of("x", 1, [(100.0, 90.0), (10.0, 9.0), (100.0, 80.0)])
    assert row.pairs == 3
    assert row.ratio.median == pytest.approx(0.9)
    assert row.added.median == pytest.approx(-10.0)
    assert (row.in_process.median, row.http.median) == (100.0, 80.0)


def test_both_sides_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "FIRST_TOKENS", 2)
    told: list[str] = []
    sizes = {"streams": 2, "words": 4, "new": 4, "rounds": 1}
    record, (table,) = overhead.run(
        Setup(config=SMALL), **sizes, command="gemcut bench overhead", records=tmp_path, tell=told.append
    )
    assert Record.read(tmp_path / "cpu" / "overhead.json") == record
    rate, first = record.results
    assert (rate["figure"], rate["streams"], rate["pairs"]) == ("new tokens/s", 2, 1)
    assert (first["figure"], first["streams"], first["pairs"]) == ("first token ms", 1, 2)
    assert [line[:2] for line in table.rows] == [("new tokens/s", "2"), ("first token ms", "1")]
    assert [line.partition(":")[0] for line in told[:2]] == ["round 0", "round 1"]


@pytest.mark.slow
def test_a_server_that_cannot_answer_is_no_measurement() -> None:
    with OverHttp(SMALL) as there, pytest.raises(ServerFailed, match="400: "):
        there.first_token_ms(Workload(input_words=500).body("bench", 0))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path), device="cpu")
    with pytest.raises(GemcutError, match=r"did not start: .*config\.json"), OverHttp(config):
        pass


def test_two_engines_on_one_gpu_need_to_know_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        type = "cuda"

    monkeypatch.setattr(overhead, "choose_device", lambda name: (Gpu(), None))
    with pytest.raises(GemcutError, match="kv_bytes is needed"):
        overhead.run(
            Setup(config=EngineConfig()),
            streams=1,
            words=1,
            new=1,
            rounds=1,
            command="",
            records=None,
            tell=print,
        )
