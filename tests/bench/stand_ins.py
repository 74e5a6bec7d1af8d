"""vLLM and SGLang as far as the benchmarks use them: they accept what the real ones accept, and nothing else.

Names come from peer_signatures.json, which `read_signatures.py` reads out of the real packages. Behind the
names is no model: an answer's tokens are a function of its prompt, and a batch holds `MOST` sequences.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from transformers import AutoTokenizer

KNOWN = json.loads((Path(__file__).parent / "peer_signatures.json").read_text())
VLLM, SGLANG = KNOWN["vllm"], KNOWN["sglang"]
MOST = 8  # sequences at once


def bound(
    of: Mapping[str, Any], arguments: Sequence[Any], named: Mapping[str, Any], rest: Sequence[str] = ()
) -> dict[str, Any]:
    """A call's arguments by name, or TypeError as the real function raises it. rest: of what `**` goes to."""
    given = dict(zip(of["positional"], arguments, strict=False))
    assert len(given) == len(arguments), "too many positional arguments"
    for name, value in named.items():
        if name in given or name not in (*of["positional"], *of["keyword"], *(rest if of["more"] else ())):
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        given[name] = value
    return given


class Folder:
    """What an engine reads of a model's folder when its weights are to be random."""

    def __init__(self, path: str) -> None:
        self.config = json.loads((Path(path) / "config.json").read_text())
        self.text = self.config.get("text_config", self.config)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        assert self.config["architectures"] in (
            ["Gemma4ForConditionalGeneration"],
            ["Gemma4ForCausalLM"],
        )

    def expanded(self, ids: Sequence[int], pictures: Sequence[Image.Image]) -> list[int]:
        """A prompt with its soft tokens: an image token becomes brackets and one for each 48 x 48 pixels."""
        image = self.config["image_token_id"]
        assert list(ids).count(image) == len(pictures)
        left, out = iter(pictures), []
        for index in ids:
            if index != image:
                assert 0 <= index < self.text["vocab_size"]
                out.append(index)
                continue
            width, height = next(left).size
            assert width % 48 == height % 48 == 0
            soft = width * height // 48**2
            out += [self.config["boi_token_id"], *[image] * soft, self.config["eoi_token_id"]]
        return out


def token(prompt: Sequence[int], number: int) -> int:
    """The answer's token of a number."""
    return (sum(prompt) + 31 * len(prompt) + 7 * number) % 300


# ---- vLLM


class RequestOutputKind:
    CUMULATIVE, DELTA, FINAL_ONLY = VLLM["RequestOutputKind"]


class SamplingParams:
    def __init__(self, **given: Any) -> None:
        for name, value in given.items():
            if name not in VLLM["SamplingParams"]:
                raise TypeError(f"Unexpected keyword argument {name!r}")
            setattr(self, name, value)


class LLM:
    made: list[LLM]  # all of a test's

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.given = bound(VLLM["LLM"], arguments, named, VLLM["EngineArgs"])
        self.llm_engine = LLMEngine(Folder(self.given["model"]), self.given["max_model_len"])
        LLM.made.append(self)


class LLMEngine:
    def __init__(self, folder: Folder, longest: int) -> None:
        self.folder, self.longest = folder, longest
        self.requests: dict[str, Any] = {}
        self.calls = 0

    def add_request(self, *arguments: Any, **named: Any) -> str:
        given = bound(VLLM["LLMEngine"]["add_request"], arguments, named)
        prompt, params = given["prompt"], given["params"]
        assert not prompt.keys() - set(VLLM["TokensPrompt"])
        pictures = prompt.get("multi_modal_data", {}).get("image", [])
        ids = self.folder.expanded(prompt["prompt_token_ids"], pictures)
        assert len(ids) + params.max_tokens <= self.longest
        assert given["request_id"] not in self.requests
        self.requests[given["request_id"]] = SimpleNamespace(ids=ids, params=params, done=0)
        return f"{given['request_id']}-0a1b2c3d"  # the real one gives it a longer name inside

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        time.sleep(1e-3)
        self.calls += 1
        if self.calls % 3 == 1:
            return []  # it launches ahead, and has nothing to tell yet
        outputs = []
        for name, request in [*self.requests.items()][:MOST]:
            assert request.params.temperature == 0.0
            assert request.params.ignore_eos
            new = token(request.ids, request.done)
            request.done += 1
            first = 0 if request.params.output_kind == RequestOutputKind.CUMULATIVE else request.done - 1
            finished = request.done == request.params.max_tokens
            tokens = [token(request.ids, i) for i in range(first, request.done)]
            assert tokens[-1] == new
            completion = SimpleNamespace(**dict.fromkeys(VLLM["CompletionOutput"]) | {"token_ids": tokens})
            fields = {"request_id": name, "outputs": [completion], "finished": finished}
            outputs.append(SimpleNamespace(**dict.fromkeys(VLLM["RequestOutput"]) | fields))
            if finished:
                del self.requests[name]
        return outputs


# ---- SGLang


class Engine:
    made: list[Engine]

    def __init__(self, **given: Any) -> None:
        if unknown := given.keys() - set(SGLANG["ServerArgs"]):
            raise TypeError(f"Unexpected keyword argument {unknown}")
        self.given, self.folder, self.open = given, Folder(given["model_path"]), True
        Engine.made.append(self)

    def generate(self, *arguments: Any, **named: Any) -> list[dict[str, Any]]:
        given = bound(SGLANG["generate"], arguments, named)
        params = given["sampling_params"]
        assert not params.keys() - set(SGLANG["SamplingParams"])
        assert params["temperature"] == 0.0
        assert params["ignore_eos"]
        media = given["image_data"] or [[] for _ in given["input_ids"]]
        prompts = []
        for ids, pictures in zip(given["input_ids"], media, strict=True):
            if pictures:  # it turns ids into text there, and back
                text = self.folder.tokenizer.decode(ids)
                assert self.folder.tokenizer.encode(text, add_special_tokens=False) == ids
            prompts.append(self.folder.expanded(ids, pictures))
            assert len(prompts[-1]) + params["max_new_tokens"] <= self.given["context_length"]
        return [self._answer(i, ids, params["max_new_tokens"]) for i, ids in enumerate(prompts)]

    def shutdown(self) -> None:
        self.open = False

    def _answer(self, index: int, ids: Sequence[int], count: int) -> dict[str, Any]:
        turn = index // MOST  # a batch after the other
        told = {"num_retractions": 0, "forward_entry_time": turn + 0.1, "request_finished_ts": turn + 1.0}
        assert not told.keys() - set(SGLANG["meta_info"])
        assert self.given["enable_metrics"], "times are told only then"
        return {"output_ids": [token(ids, i) for i in range(count)], "meta_info": told}
