"""An engine process without a model: the real process, loop, scheduler and answers over a runner that reads
out replies. `python -m scripted_engine SOCKET`, in place of `gemcut.server.engine_main`.

A prompt with `script:NAME` in its text gets the reply of that name. Torch is never imported, so it starts at
once.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping

import numpy as np

from gemcut.data import Control, ForwardCounts, Segment, Step, StepResult, Text, TokenLogprobs
from gemcut.engine import loop
from gemcut.engine.answer import Answer
from gemcut.engine.limits import Limits
from gemcut.engine.loop import Engine
from gemcut.engine.model_files import ModelFiles
from gemcut.outputs import Delta
from gemcut.prompt.tokenizer import Tokenizer
from gemcut.sampling import SlotSampling
from gemcut.server import engine_main, wire

QUOTE = Control('<|"|>')


def call(name: str, *members: Segment) -> list[Segment]:
    return [Control("<|tool_call>"), Text(f"call:{name}{{"), *members, Text("}"), Control("<tool_call|>")]


END = [Control("<turn|>")]
WEATHER = call("weather", Text("city:"), QUOTE, Text("Zürich"), QUOTE, Text(",days:3"))
THOUGHT = [Control("<|channel>"), Text("thought\nSo it is.\n"), Control("<channel|>")]
SCRIPTS: dict[str, list[Segment]] = {
    "hello": [Text("Hello there. "), Text("What a day."), *END],
    "thought": [*THOUGHT, Text("Yes."), *END],
    "call": [*THOUGHT, *WEATHER, Control("<|tool_response>")],
    "calls": [*WEATHER, *call("time"), Control("<|tool_response>")],
    "malformed": [
        Text("Wait."),
        Control("<|tool_call>"),
        Text("call:weather{city"),
        Control("<tool_call|>"),
        *END,
    ],
    "emoji": [Text("naïve 漢字 🙂"), *END],
    "failing": [Text("It breaks "), *END],  # see Runner
    "poison": [Text("It goes "), Control("<|think|>"), Text("on"), *END],  # see PoisonedAnswer
    "long": [Text("word " * 20_000)],
    "crash": [],
    "hang": [],
}


class PoisonedAnswer(Answer):
    """Stands for a bug in what reads answers: one token is too much for it."""

    poison = 0

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> tuple[Delta, bool]:
        if token_id == self.poison:
            raise ValueError("poison")
        return super().push(token_id, logprobs)


class AuditedEngine(Engine):
    """Counts its pages after each step: free, cached and used are all there are, or it crashes."""

    def step(self) -> list[loop.Update]:
        updates = super().step()
        self.scheduler.memory.audit(self.scheduler.running)
        return updates


class ScriptedRunner:
    """Reads scripts out. step_s: how long a step takes."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, step_s: float) -> None:
        self._tokenizer, self._vocab, self._step_s = tokenizer, vocab, step_s
        self._ids = {name: tokenizer.encode(script).token_ids for name, script in SCRIPTS.items()}
        self._seats: dict[int, tuple[str, int, SlotSampling]] = {}
        self._results: deque[StepResult] = deque()
        self.counts = ForwardCounts()

    def launch(self, step: Step, masks: Mapping[int, np.ndarray] | None = None) -> None:
        for seat in step.seats:
            text = self._tokenizer.decode(seat.token_ids[: seat.num_prompt])
            found = re.findall(r"script:(\w+)", text)
            name = found[-1] if found else "hello"
            assert isinstance(seat.sampling, SlotSampling)
            self._seats[seat.slot] = (name, seat.num_prompt, seat.sampling)
        # now, not in `collect`: by then the next step may have given the slot to another
        self._results.append(self._result(step))

    def collect(self) -> StepResult:
        result = self._results.popleft()
        time.sleep(self._step_s)
        return result

    def _result(self, step: Step) -> StepResult:
        tokens, errors, logprobs = {}, {}, {}
        for row in step.rows:
            name, num_prompt, sampling = self._seats[row.slot]
            if name == "crash":
                raise RuntimeError("the device is gone")
            if name == "hang":
                time.sleep(3600)
            at = row.start + row.count - num_prompt
            ids = self._ids[name] or (self._tokenizer.control_id("<turn|>"),)
            if name == "failing" and at > 1:
                errors[row.slot] = "the logits are not finite"
            elif row.samples:
                token = ids[min(at, len(ids) - 1)]
                tokens[row.slot] = token
                if sampling.params.logprobs is not None:
                    top = tuple((token + i, -0.5 - i) for i in range(sampling.params.logprobs))
                    logprobs[row.slot] = TokenLogprobs(token, -math.inf if at == 1 else -0.5, 1, top)
        return StepResult(step.number, tokens, errors, logprobs)


def start(message: wire.Start) -> tuple[Engine, wire.Started]:
    config = message.config
    assert config.model is not None
    files = ModelFiles.open(config.model)
    limits = Limits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len or 4096,
        page_size=16,
        window=files.plan.text.window or 0,
        num_sliding_pages=4096,
        num_full_pages=4096,
        max_waiting=message.max_waiting,
    )
    PoisonedAnswer.poison = files.tokenizer.control_id("<|think|>")
    loop.Answer = PoisonedAnswer  # type: ignore[misc]
    step_s = float(os.environ.get("SCRIPTED_STEP_S", "0.001"))
    runner = ScriptedRunner(files.tokenizer, files.plan.text.vocab, step_s)
    kind = AuditedEngine if os.environ.get("SCRIPTED_AUDIT") else Engine
    return kind(files, limits, runner, ahead=True), wire.Started(limits.max_model_len, {"device": "none"})


if __name__ == "__main__":
    status = engine_main.main(sys.argv[1], start)
    os._exit(status)
