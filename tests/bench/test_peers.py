"""vLLM and SGLang as the other side, against stand-ins that take the real packages' names and no others."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_ins
import torch
from bench_rig import setup, write_config
from transformers import AutoTokenizer
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from gemcut.bench import against, decode
from gemcut.bench.against import Peer, PeerName, check_peer, divide, start_peer
from gemcut.bench.contender import Gemcut, picture_prompt, random_picture, text_prompt
from gemcut.bench.peer_files import peer_prompt, write_folder
from gemcut.bench.report import read_all
from gemcut.cli import main
from gemcut.errors import ConfigError, GemcutError

PEERS: tuple[PeerName, ...] = ("vllm", "sglang")
PACKAGES = {
    "vllm": {
        "__init__.py": "from stand_ins import LLM, SamplingParams\nfrom vllm import sampling_params\n",
        "sampling_params.py": "from stand_ins import RequestOutputKind\n",
    },
    "sglang": {"__init__.py": "from stand_ins import Engine\n"},
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python finds both packages in, with the files that tell of Gemma 4."""
    folder = tmp_path / "site"
    for name, modules in PACKAGES.items():
        marks = dict.fromkeys(against.KINDS[name].marks, "")  # type: ignore[index]
        for file, text in {**modules, **marks}.items():
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    stand_ins.LLM.made, stand_ins.Engine.made = [], []
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


def started(name: PeerName, config: Path, *, pictures: bool = False) -> Peer:
    given = setup(config, max_model_len=256)
    return start_peer(name, given, torch.device("cpu"), torch.float32, share=None, pictures=pictures)


def engine(name: PeerName) -> Any:
    (made,) = {"vllm": stand_ins.LLM.made, "sglang": stand_ins.Engine.made}[name]
    return made


@pytest.mark.parametrize("name", PEERS)
def test_a_batch_of_ids(name: PeerName, packages: Path, moe: Gemcut, moe_config: Path) -> None:
    peer = started(name, moe_config)
    prompts = [text_prompt(moe.plan, 20, seed=i) for i in range(11)]
    trace = peer.generate(prompts, 5)
    wanted = [[stand_ins.token(p.prompt.token_ids, i) for i in range(5)] for p in prompts]
    assert trace.answers == wanted
    assert trace.most_running == stand_ins.MOST
    assert trace.wall_s > 0
    assert trace.step_s == []  # never did all 11 get a token
    peer.close()


def test_the_steps_of_vllm_are_seen(packages: Path, moe: Gemcut, moe_config: Path) -> None:
    trace = started("vllm", moe_config).generate([text_prompt(moe.plan, 20, seed=i) for i in range(3)], 5)
    assert len(trace.step_s) == 4
    # six calls of a millisecond come after the first token's, two of them with nothing to tell
    assert 6e-3 <= sum(trace.step_s) <= trace.wall_s - trace.first_token_s[0]
    assert all(0 < first < trace.wall_s for first in trace.first_token_s)


@pytest.mark.parametrize("name", PEERS)
def test_a_prompt_with_pictures(name: PeerName, packages: Path, moe: Gemcut, moe_config: Path) -> None:
    """The other engine's own expansion of the prompt gives our prompt."""
    peer = started(name, moe_config, pictures=True)
    prompt = picture_prompt(moe.plan, [random_picture(12, seed) for seed in (0, 1)], 8, seed=0)
    (answer,) = peer.generate([prompt], 3).answers
    assert answer == [stand_ins.token(prompt.prompt.token_ids, i) for i in range(3)]
    peer.close()


def test_what_is_asked_of_vllm(packages: Path, moe_config: Path) -> None:
    started("vllm", moe_config)
    given = engine("vllm").given
    assert (given["load_format"], given["dtype"], given["max_model_len"]) == ("dummy", "float32", 256)
    assert given["enable_prefix_caching"] is False
    assert given["limit_mm_per_prompt"] == {"image": 0, "video": 0}
    assert not Path(given["model"]).exists()  # it was read


def test_what_is_asked_of_sglang(packages: Path, moe_config: Path) -> None:
    peer = started("sglang", moe_config)
    given = engine("sglang").given
    assert (given["load_format"], given["dtype"], given["context_length"]) == ("dummy", "float32", 256)
    assert given["disable_radix_cache"]
    assert given["language_model_only"]
    assert Path(given["model_path"]).exists()  # its processes may read it later
    peer.close()
    assert not Path(given["model_path"]).exists()
    assert not engine("sglang").open


def test_a_stand_in_refuses_what_the_real_one_does_not_know() -> None:
    """Otherwise the tests above would show nothing."""
    with pytest.raises(TypeError, match="load_formats"):
        stand_ins.LLM("folder", load_formats="dummy")
    with pytest.raises(TypeError, match="max_token"):
        stand_ins.SamplingParams(max_token=3)
    with pytest.raises(TypeError, match="disable_radix"):
        stand_ins.Engine(model_path="folder", disable_radix=True)


@pytest.mark.parametrize("name", PEERS)
def test_what_is_missing_is_said_before_anything_starts(
    name: PeerName, packages: Path, moe_config: Path
) -> None:
    given = setup(moe_config)
    assert check_peer(name, given, ["prefill", "memory"]) == ["prefill"]
    with pytest.raises(ConfigError, match="not by memory"):
        check_peer(name, given, ["memory"])
    with pytest.raises(ConfigError, match="--random-weights"):
        check_peer(name, replace(given, random_weights=None), ["prefill"])
    (packages / name / against.KINDS[name].marks[0]).unlink()
    with pytest.raises(ConfigError, match=f"does not know Gemma 4: pip install --upgrade {name}"):
        check_peer(name, given, ["prefill"])


@pytest.mark.parametrize("name", PEERS)
def test_a_package_that_is_not_there(name: PeerName, moe_config: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not installed: pip install {name}"):
        check_peer(name, setup(moe_config), ["prefill"])


def test_an_engine_that_does_not_start(
    packages: Path, moe_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_ins, "VLLM", stand_ins.VLLM | {"EngineArgs": []})
    with pytest.raises(GemcutError, match=r"vllm .*did not start: TypeError.*0\.33\.0"):
        started("vllm", moe_config)


def test_a_text_model(packages: Path, tmp_path: Path) -> None:
    """Its config has neither architectures nor a tower."""
    config = write_config(tmp_path, "dense")
    text = json.loads(config.read_text())["text_config"]
    text.pop("architectures", None)
    config.write_text(json.dumps(text))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(setup(config), folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Gemma4ForCausalLM"]
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_nothing_is_lost_between_ids_and_text(tmp_path: Path) -> None:
    """At the real size, with the real tokenizer and image processor of transformers."""
    given = setup(Path("26B-A4B"))
    plan = given.files().plan
    write_folder(given, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ours = picture_prompt(plan, [random_picture(280, 0)], 64, seed=0)
    ids, (picture,) = peer_prompt(plan, ours)
    assert len(ids) == 1 + 64
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    soft = f"{tokenizer.boi_token}{tokenizer.image_token * 280}{tokenizer.eoi_token}"
    expanded = tokenizer.encode(text.replace(tokenizer.image_token, soft), add_special_tokens=False)
    assert expanded == list(ours.prompt.token_ids)
    found = Gemma4ImageProcessorPil.from_pretrained(tmp_path)([picture], return_tensors="np")
    assert found["num_soft_tokens_per_image"][0] == 280
    pixels = ours.media[0].pixels / 255  # it has resized nothing
    assert np.allclose(found["pixel_values"][0][: len(pixels)], pixels, atol=1e-6)


# ---- in a benchmark


def test_both_in_one_run(packages: Path, moe_config: Path, tmp_path: Path) -> None:
    words = ("--random-weights", str(moe_config), "--allow-unknown-config", "--device", "cpu")
    sizes = ("--kv-bytes", "16MiB", "--max-num-seqs", "4", "--max-model-len", "512")
    common = (*words, *sizes, "--against", "sglang", "--records", str(tmp_path))
    assert main(["bench", "prefill", "--tokens", "8,16", "--rounds", "2", *common]) == 0
    assert main(["bench", "decode", "--batches", "2", "--cached", "8", "--new", "4", *common]) == 0
    assert main(["bench", "batch", "--requests", "9", "--cached", "8", "--new", "2", *common]) == 0
    assert main(["bench", "vision", "--pictures", "1", "--rounds", "1", *common]) == 0
    records = {record.name: record for record in read_all(tmp_path)}
    assert records.keys() == {f"{each}-sglang-compare" for each in ("prefill", "decode", "batch", "vision")}
    for record in records.values():
        assert {row["engine"] for row in record.results} == {"gemcut", "sglang"}
        assert record.notes[-1].startswith(
            "sglang by turns with gemcut, on one device; random values of its own"
        )
        assert record.facts["engines"]["sglang"]["settings"]["disable_radix_cache"] is True
    other = next(row for row in records["decode-sglang-compare"].results if row["engine"] == "sglang")
    assert other["step"] is None
    assert other["share"] == pytest.approx(other["floor"] / other["slope"], rel=1e-3)
    assert decode.table([other]).rows[0][3] == "-"
    assert all(not made.open for made in stand_ins.Engine.made)


def test_one_after_the_other(
    packages: Path, moe_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that does not hold both."""
    monkeypatch.setattr("gemcut.bench.session.divide", lambda *_: None)
    words = ("--random-weights", str(moe_config), "--allow-unknown-config", "--device", "cpu")
    sizes = ("--kv-bytes", "16MiB", "--max-num-seqs", "4", "--max-model-len", "64", "--tokens", "8")
    assert main(["bench", "prefill", *words, *sizes, "--against", "vllm", "--records", str(tmp_path)]) == 0
    records = {record.name: record for record in read_all(tmp_path)}
    assert records.keys() == {"prefill", "prefill-vllm"}
    assert "vllm alone on the device" in records["prefill-vllm"].notes[-1]


GB = 10**9


@pytest.mark.parametrize(
    ("total", "kv_bytes", "fits"), [(80, None, False), (160, None, True), (160, 1 << 30, True)]
)
def test_two_engines_share_a_gpu_where_they_fit(
    total: int, kv_bytes: int | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """26B-A4B takes 52 GB in bf16."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total * GB, total * GB))
    given = setup(Path("26B-A4B"), kv_bytes=kv_bytes)
    share = divide(given, torch.device("cuda"), torch.bfloat16)
    assert (share is not None) == fits
    if share is not None:
        assert share.kv_bytes is not None
        assert 2 * share.all_bytes <= given.config.gpu_memory_utilization * total * GB
        assert share.kv_bytes <= (kv_bytes or share.all_bytes - 52 * GB)
        assert divide(replace(given, versus={"a": {}, "b": {}}), torch.device("cuda"), torch.bfloat16) is None
