"""A folder of save_pretrained's, model and tokenizer alone, answers as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_rig import call
from tiny import SPECIAL_IDS, image_inputs, make_model, make_tokenizer, picture

PROMPT = "<bos><|turn>user\n{}What is it?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
TOKENS = 24


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("saved")
    model = make_model("moe")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    assert not list(folder.glob("*processor*"))
    return model, folder


def greedy(model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
    out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def ours(folder: Path, *words: str) -> Any:
    flags = (
        "--model",
        str(folder),
        "--max-tokens",
        str(TOKENS),
        "--json",
        "--temperature",
        "0",
        "--device",
        "cpu",
    )
    result = call("run", *words, "What is it?", *flags)
    assert result.code == 0, result.err
    return result.json


def test_text(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    ids = make_tokenizer()(PROMPT.format(""), add_special_tokens=False, return_tensors="pt")["input_ids"]
    found = ours(folder)
    assert found["prompt_token_ids"] == ids[0].tolist()
    expected = greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert found["token_ids"] == expected
    assert len(expected) > 4


def test_picture(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    image = picture()
    image.save(tmp_path / "noise.png")
    inputs = image_inputs("moe", image, PROMPT.format("<|image|>"))
    found = ours(folder, str(tmp_path / "noise.png"), "--image-tokens", "70")
    assert found["prompt_token_ids"] == inputs["input_ids"][0].tolist()
    assert found["usage"]["image_tokens"] == found["prompt_token_ids"].count(SPECIAL_IDS["<|image|>"]) == 60
    assert found["token_ids"] == greedy(model, inputs)


def test_a_model_without_eyes_refuses_a_picture(tmp_path: Path) -> None:
    make_model("dense", text_only=True).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    picture().save(tmp_path / "noise.png")
    words = ("run", str(tmp_path / "noise.png"), "What is it?", "--model", str(tmp_path))
    result = call(*words)
    assert (result.code, result.out) == (1, "")
    assert "This model takes no image input" in result.err
    assert call("run", "hi", "--model", str(tmp_path), "--max-tokens", "2", "--temperature", "0").code == 0
