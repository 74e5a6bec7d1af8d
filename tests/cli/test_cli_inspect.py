"""`gemcut inspect`: the five sizes' numbers as the specification has them, and what it is given."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_rig import ROOT, SIGN, call, environment, refused

from gemcut import demo

TOTALS = {  # spec 8.2
    "E2B": 5_104_298_467,
    "E4B": 7_941_101_802,
    "12B": 11_959_730_224,
    "26B-A4B": 25_805_936_206,
    "31B": 31_273_088_876,
}
NOT_BUILT = {"E2B", "E4B", "12B"}


@pytest.mark.parametrize("size", TOTALS)
def test_sizes(size: str) -> None:
    facts = call("inspect", size, "--json").json
    parameters = facts["parameters"]
    assert parameters["total"] == TOTALS[size]
    parts = ("decoder", "token_embedding", "per_layer_embedding", "vision", "audio")
    assert sum(parameters[part] for part in parts) == parameters["total"]
    assert facts["weight_bytes"]["bfloat16"] == 2 * parameters["total"]
    assert sum(group["count"] for group in facts["layers"]) == len(
        [index for group in facts["layers"] for index in group["indices"]]
    )
    assert facts["fits"] is None or facts["fits"]["gpu"]
    text = call("inspect", size)
    assert text.code == 0
    assert f"{parameters['total']:,}" in text.out
    assert "\x1b" not in text.out


def test_the_experts_of_a_token() -> None:
    facts = call("inspect", "26b-a4b", "--json").json
    assert 3.7e9 < facts["parameters"]["active"] < 3.9e9
    assert [(group["count"], group["kind"]) for group in facts["layers"]] == [(25, "sliding"), (5, "full")]
    assert facts["layers"][0]["experts"] == {"count": 128, "active": 8, "width": 704}
    assert facts["layers"][1]["k_eq_v"]
    assert call("inspect", "31B", "--json").json["layers"][0]["experts"] is None


def test_kv_bytes() -> None:
    """Spec 2.7: E2B has 12 sliding layers of 1,024 bytes and 3 full ones of 2,048 a token."""
    facts = call("inspect", "E2B", "--json").json
    kv = facts["kv"]
    assert (kv["sliding_bytes_per_token"], kv["full_bytes_per_token"]) == (12 * 1024, 3 * 2048)
    assert kv["bytes_at_full_context"] == facts["context"] * 6144 + kv["window"] * 12 * 1024
    assert any(group["kv_of_layer"] is not None for group in facts["layers"])


def test_what_fits() -> None:
    fits = call("inspect", "26B-A4B", "--gpu-memory", "80GB", "--json").json["fits"]
    assert fits["bytes_beside_weights"] == int(80e9 * 0.9) - 2 * TOTALS["26B-A4B"]
    counts = list(fits["sequences_of"].values())
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    assert "sequences at once" in call("inspect", "26B-A4B", "--gpu-memory", "80GB").out
    small = call("inspect", "31B", "--gpu-memory", "24GB")
    assert "no: the bfloat16 weights take 62.5 GB, 90% of 24.0 GB is there" in small.out


def test_runs_now() -> None:
    for size in TOTALS:
        runs = call("inspect", size, "--json").json["runs"]
        if size not in NOT_BUILT:
            assert runs == {"now": True, "missing": []}
        assert runs["now"] != bool(runs["missing"])


def test_folders_files_and_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = call("inspect", "--json").json
    folder = call("inspect", str(demo.CHECKPOINT), "--json").json
    file = call("inspect", str(demo.CHECKPOINT / "config.json"), "--json").json
    assert default["layers"] == folder["layers"] == file["layers"]
    monkeypatch.setenv("GEMCUT_MODEL", "31B")
    assert call("inspect", "--json").json["parameters"]["total"] == TOTALS["31B"]
    monkeypatch.chdir(tmp_path)  # a folder goes before a size of that name
    shutil.copytree(demo.CHECKPOINT, tmp_path / "31B")
    assert call("inspect", "31B", "--json").json["layers"] == default["layers"]


def test_mistakes(tmp_path: Path) -> None:
    refused(1, "inspect", "nowhere", says="There is no folder nowhere")
    refused(1, "inspect", SIGN, says="is no config.json")
    refused(1, "inspect", str(tmp_path), says="config.json is missing")
    refused(2, "inspect", "31B", "--gpu-memory", "big", says="no amount of memory")
    refused(2, "inspect", "31B", "--gpu-memory-utilization", "0", says="must lie above 0")
    config = json.loads((demo.CHECKPOINT / "config.json").read_text()) | {"warp_drive": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(1, "inspect", str(tmp_path), says="warp_drive")
    found = call("inspect", str(tmp_path), "--allow-unknown-config", "--json")
    assert found.json["unknown_keys"] == ["warp_drive"]


def test_needs_no_torch() -> None:
    code = (
        "import sys, gemcut.cli.inspect as inspect; from gemcut.cli import main; "
        "inspect._this_gpu = lambda: None; assert main(['inspect', '31B']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment(), cwd=ROOT)
