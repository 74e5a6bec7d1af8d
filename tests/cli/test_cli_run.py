"""`gemcut run` with the demo checkpoint: answers, JSON, pipes and terminals, and every user's mistake."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from cli_rig import LIMIT_S, QUESTION, SAID, SIGN, call, command, environment, on_terminal, refused, spawn
from PIL import Image

from gemcut import demo
from gemcut.cli import answer, run
from gemcut.errors import GemcutError

KEYS = (
    "text", "reasoning", "tool_calls", "prompt_token_ids", "token_ids", "finish_reason", "usage", "timings",
)  # fmt: skip


def test_answer_in_a_pipe() -> None:
    result = call("run", SIGN, QUESTION)
    assert (result.code, result.out, result.err) == (0, SAID, "")


def test_flags_may_come_anywhere() -> None:
    assert call("run", "--temperature", "0", SIGN, "--max-tokens", "20", QUESTION).out == SAID


def test_two_pictures_keep_their_order(tmp_path: Path) -> None:
    blue = tmp_path / "blue.png"
    Image.new("RGB", (96, 96), "blue").save(blue)
    ids = [call("run", *pair, QUESTION, "--json", "--max-tokens", "1").json["prompt_token_ids"]
           for pair in ((SIGN,), (str(blue), SIGN), (SIGN, str(blue)))]  # fmt: skip
    assert len(ids[0]) < len(ids[1]) == len(ids[2])
    assert ids[1] != ids[2]  # the pictures have different numbers of tokens
    assert ids[1][-10:] == ids[0][-10:]


def test_json() -> None:
    result = call("run", SIGN, QUESTION, "--json")
    assert result.code == 0
    assert result.out.count("\n") == 1
    found = result.json
    assert list(found) == [*KEYS, "used", "forwards"]
    assert (found["text"], found["reasoning"], found["tool_calls"]) == (SAID.strip(), "", [])
    assert found["finish_reason"] == "stop"
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(found["prompt_token_ids"])
    assert usage["completion_tokens"] == len(found["token_ids"]) >= 2  # the stop token included
    assert 0 < usage["image_tokens"] <= 70
    assert usage["cached_tokens"] == 0
    assert 0 < found["timings"]["first_token_s"] <= found["timings"]["total_s"]
    used = found["used"]
    assert {"device", "dtype", "kernels", "graphs", "switched_off"} <= set(used)
    assert all(set(entry) == {"what", "why"} for entry in used["switched_off"])
    forwards = found["forwards"]
    assert set(forwards) == {"graph_replays", "eager", "dropped_graphs"}
    assert (
        sum(forwards["eager"].values()) + forwards["graph_replays"].get("full", 0)
        >= usage["completion_tokens"]
    )


def test_device_and_dtype_are_taken() -> None:
    used = call("run", "hi", "--json", "--device", "cpu", "--dtype", "bfloat16", "--max-tokens", "1").json[
        "used"
    ]
    assert (used["device"], used["dtype"], used["switched_off"]) == ("cpu", "bfloat16", [])


def test_length_is_told() -> None:
    found = call("run", SIGN, QUESTION, "--json", "--max-tokens", "1").json
    assert (found["finish_reason"], len(found["token_ids"])) == ("length", 1)


def test_a_full_context_is_told() -> None:
    prompt = len(call("run", SIGN, QUESTION, "--json", "--max-tokens", "1").json["prompt_token_ids"])
    result = call("run", SIGN, QUESTION, "--max-model-len", str(prompt + 1))
    assert result.code == 0
    assert "context is full" in result.err


def test_seed_and_temperature() -> None:
    def ids(seed: str) -> list[int]:
        flags = ("--temperature", "5", "--top-k", "0", "--top-p", "1", "--max-tokens", "12", "--seed", seed)
        return call("run", "Repeat: stone", "--json", *flags).json["token_ids"]

    assert ids("1") == ids("1")
    assert len({tuple(ids(str(seed))) for seed in range(4)}) > 1


def test_system_think_and_image_tokens_reach_the_prompt() -> None:
    def ids(*flags: str) -> list[int]:
        return call("run", SIGN, "hi", "--json", "--max-tokens", "1", *flags).json["prompt_token_ids"]

    plain = ids()
    assert len(ids("--system", "Be brief.")) > len(plain)
    assert ids("--think") != plain
    assert len(ids("--image-tokens", "140")) > len(plain) + 40


def test_thoughts_go_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    from gemcut.outputs import CompletionOutput, Delta

    writer = answer._Writer()
    for delta in (
        Delta(index=0, reasoning="A red"),
        Delta(index=0, reasoning=" thing."),
        Delta(index=0, text="r"),
        Delta(index=0, text="ed"),
    ):
        writer.push(delta)
    writer.finish(CompletionOutput(index=0, text="red", reasoning="", token_ids=(), finish_reason="stop"))
    out, err = capfd.readouterr()
    assert (out, err) == ("red\n", "A red thing.\n")


def test_a_think_run_answers() -> None:
    result = call("run", SIGN, QUESTION, "--think", "--max-tokens", "200")
    assert result.code == 0
    assert "<|channel>" not in result.out + result.err


def test_environment_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMCUT_JSON", "1")
    monkeypatch.setenv("GEMCUT_MAX_TOKENS", "1")
    monkeypatch.setenv("GEMCUT_DTYPE", "bfloat16")
    found = call("run", SIGN, QUESTION).json
    assert (found["finish_reason"], found["used"]["dtype"]) == ("length", "bfloat16")
    assert call("run", SIGN, QUESTION, "--dtype", "float32").json["used"]["dtype"] == "float32"
    monkeypatch.setenv("GEMCUT_MODEL", "nowhere")
    refused(1, "run", "hi", says="There is no folder nowhere")
    monkeypatch.setenv("GEMCUT_MAX_TOKENS", "many")
    refused(2, "run", "hi", says="GEMCUT_MAX_TOKENS")


def test_verbose_tells_what_fits() -> None:
    assert "KV cache" in call("run", "hi", "--max-tokens", "1", "-v").err
    assert call("run", "hi", "--max-tokens", "1").err == ""  # and it does not stay on


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "There is no question"),
        (("",), "The question is empty"),
        ((SIGN, " \n"), "The question is empty"),
        ((SIGN,), "the question comes after it"),
        (("nowhere.png", "hi"), "There is no picture file 'nowhere.png'"),
        (("/", "hi"), "/ is a directory"),
        (("", "hi"), "name is empty"),
        (("x" * 5000, "hi"), "too long"),
        (("https://example.com/a.png", "hi"), "web address"),
        ((SIGN, "What", "is", "this?"), "put it in quotes"),
        (("--modle", "x", "hi"), "Did you mean --model"),
        (("--what is it?",), "goes after --"),
        (("hi", "--dtype", "fp8"), "'fp8' is not one of 'auto', 'bfloat16'"),
        (("hi", "--kernels", "cutlass"), "'cutlass'"),
        (("hi", "--device", "tpu"), "Choose auto, cpu, cuda or cuda:N"),
        (("hi", "--image-tokens", "71"), "'1120'"),
        (("hi", "--max-tokens", "0"), "--max-tokens must be at least 1, got 0"),
        (("hi", "--max-tokens", "many"), "'many'"),
        (("hi", "--temperature", "-1"), "--temperature must be"),
        (("hi", "--temperature", "nan"), "--temperature must be a number"),
        (("hi", "--top-p", "0"), "--top-p must be above 0"),
        (("hi", "--min-p", "2"), "--min-p must be"),
        (("hi", "--top-k", "-1"), "--top-k must be at least 0"),
        (("hi", "--kv-bytes", "lots"), "no amount of memory"),
        (("hi", "--kv-bytes", "0"), "no memory at all"),
        (("hi", "--max-model-len", "0"), "--max-model-len must be"),
        (("hi", "--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization must lie"),
        (("hi", "--seed"), "requires an argument"),
    ],
)
def test_usage_mistakes(words: tuple[str, ...], says: str) -> None:
    refused(2, "run", *words, says=says)


def test_no_such_command() -> None:
    refused(2, "rum", says="Did you mean 'run'?")
    refused(2, "--bogus", says="There is no option --bogus")


def test_pictures_that_are_none(tmp_path: Path) -> None:
    whole = Path(SIGN).read_bytes()
    side = 40_000
    bomb = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(bytes(1000))),
            (b"IEND", b""),
        )
    )
    for name, data, says in (
        ("notes.txt", b"not a picture", "are no picture; the formats read are PNG"),
        ("empty.png", b"", "empty (0 bytes)"),
        ("cut.png", whole[: len(whole) // 2], "truncated or damaged"),
        ("bomb.png", whole[:8] + bomb, "1,600,000,000 pixels"),
        ("film.mp4", b"\0\0\0\x18ftypmp42" + bytes(100), "MP4"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(1, "run", SIGN, str(tmp_path / name), "hi", says=says)
        refused(1, "run", str(tmp_path / name), "hi", says=name)


def test_models_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(1, "run", "hi", "--model", str(tmp_path / "nowhere"), says="There is no folder")
    refused(1, "run", "hi", "--model", str(tmp_path), says="config.json is missing")
    refused(1, "run", "hi", "--model", SIGN, says="is a file")
    refused(1, "run", "hi", "--revision", "main", "--model", str(tmp_path), says="revision")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(1, "run", "hi", "--model", "acme/none", says="acme/none")


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo.CHECKPOINT, folder)
    os.truncate(folder / "model.safetensors", 100_000)
    refused(1, "run", "hi", "--model", str(folder), says="model.safetensors")


def test_a_model_that_is_not_built_is_refused_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    shutil.copy(Path(run.__file__).parents[1] / "plan" / "sizes" / "12B.json", tmp_path / "config.json")
    refused(1, "run", "hi", "--model", str(tmp_path), says="does not run this model yet")


def test_too_long_a_prompt() -> None:
    refused(1, "run", "word " * 5000, says="the model's context of 4096 must also hold the answer")
    refused(1, "run", "hi", "--max-tokens", "5000", says="Ask for at most")
    refused(1, "run", "hi", "--kv-bytes", "10", says="hold no page")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(1, "run", "hi", "--device", "cuda:3", says="torch sees 0 GPUs")


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(answer, "open_files", broken)
    result = call("run", "hi")
    assert result.code == 1
    assert "ZeroDivisionError: oh" in result.err
    assert "This is a bug in gemcut" in result.err


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(answer, "start", full)
    refused(1, "run", "hi", says="Out of memory: CUDA out of memory. Tried to allocate 2 GiB.")


def test_a_failed_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise GemcutError("The answer broke off: NaN")

    monkeypatch.setattr(answer, "stream", broken)
    refused(1, "run", "hi", says="The answer broke off: NaN")


# ---- processes and terminals


def test_in_a_pipe_there_is_no_escape_code() -> None:
    found = spawn("run", SIGN, QUESTION)
    assert (found.returncode, found.stdout, found.stderr) == (0, SAID.encode(), b"")


def test_on_a_terminal() -> None:
    code, shown = on_terminal(["run", SIGN, QUESTION])
    assert code == 0
    assert SAID in shown
    assert "\x1b[2m" in shown  # the closing line is dim
    assert "tokens in" in shown
    assert "cpu" in shown or "cuda" in shown


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        command("run", SIGN, QUESTION), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(LIMIT_S) == 141


def test_ctrl_c() -> None:
    flags = ("--temperature", "100", "--top-k", "0", "--top-p", "1")
    process = subprocess.Popen(
        command("run", "Repeat: stone", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it is writing
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode in (130, 0), err  # 0: the answer was done already
    assert b"Traceback" not in err


def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "wb") as full:
        found = subprocess.run(
            command("run", SIGN, QUESTION),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            env=environment(),
        )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr == b"gemcut: The output cannot be written: No space left on device.\n"
