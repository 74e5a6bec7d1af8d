"""An answer while it is written: text to stdout, thoughts and figures beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemcut.cli import terminal
from gemcut.errors import GemcutError, InvalidRequest
from gemcut.outputs import CompletionOutput, Delta, RequestOutput, Stats

if TYPE_CHECKING:
    from gemcut.engine.model_files import ChatPrompt, ModelFiles
    from gemcut.llm import LLM
    from gemcut.runner.start import Used
    from gemcut.sampling import SamplingParams


def open_files(settings: Mapping[str, Any]) -> ModelFiles:
    """What the checkpoint says of itself. Weights are loaded later, with `start`, and torch as well."""
    from gemcut.demo import CHECKPOINT
    from gemcut.engine.model_files import ModelFiles
    from gemcut.hub import read_json, resolve
    from gemcut.models.gemma4.built import refuse_unbuilt
    from gemcut.plan import parse_config

    model, revision = settings["model"] or str(CHECKPOINT), settings["revision"]
    allow_unknown = settings["allow_unknown_config"]
    # a model that cannot be run is refused before its weights are downloaded
    folder = resolve(model, revision=revision, weights=False)
    refuse_unbuilt(parse_config(read_json(folder, "config.json"), allow_unknown=allow_unknown))
    return ModelFiles.open(model, revision=revision, allow_unknown_config=allow_unknown)


def start(settings: Mapping[str, Any], files: ModelFiles) -> LLM:
    """Load the weights."""
    with terminal.waiting(f"Loading {settings['model'] or 'the demo checkpoint'}"):
        from gemcut.llm import LLM

        return LLM(files=files, **settings)


@contextmanager
def naming_pictures(parts: Mapping[str, str]) -> Iterator[None]:
    """Put the file's name into complaints about a picture. parts: path of a message part -> file."""
    try:
        yield
    except InvalidRequest as error:
        name = parts.get(error.param or "")
        if name is None or name in str(error):
            raise
        raise InvalidRequest(f"{name}: {error}", error.param) from error


def stream(llm: LLM, prompt: ChatPrompt, params: SamplingParams, *, shown: bool = True) -> RequestOutput:
    """Have a prompt answered, and show the answer as it comes. Raises GemcutError if the model failed."""
    writer = _Writer()
    output = None
    for news in llm.stream(prompt, params):
        if isinstance(news, RequestOutput):
            output = news
        elif shown:
            writer.push(news)
    assert output is not None, "a stream ends with its output"
    answer = output.outputs[0]
    if shown:
        writer.finish(answer)
    if answer.error is not None:
        raise GemcutError(f"The answer broke off: {answer.error}")
    return output


def closing_line(output: RequestOutput, used: Used, *, asked_tokens: int | None) -> None:
    """Tokens, pace and device, dimmed, where a person reads; and a word if the answer was cut off."""
    answer, usage, timings = output.outputs[0], output.usage, output.timings
    cut = answer.finish_reason == "length" and len(answer.token_ids) != asked_tokens
    if cut:
        terminal.complain("The answer was cut off: the context is full (--max-model-len, --kv-bytes).")
    if not (terminal.is_terminal(sys.stdout) and terminal.is_terminal(sys.stderr)):
        return
    facts = [f"{usage.prompt_tokens} tokens in"]
    if usage.cached_tokens:
        facts[0] += f" ({usage.cached_tokens} cached)"
    facts.append(f"{usage.completion_tokens} out")
    if answer.finish_reason == "length" and not cut:
        facts[-1] += " (--max-tokens)"
    if timings.tokens_per_s:
        facts.append(f"{timings.tokens_per_s:.0f} tokens/s")
    facts += [f"first after {timings.first_token_s:.2f} s", used.device, used.dtype]
    terminal.write_dim(" · ".join(facts) + "\n")


def as_json(output: RequestOutput, used: Used, stats: Stats) -> dict[str, Any]:
    """Everything about an answer, as `--json` prints it, and which way its forwards took."""
    answer = output.outputs[0]
    facts = asdict(used)
    facts["switched_off"] = [{"what": what, "why": why} for what, why in used.switched_off]
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "tool_calls": [asdict(call) for call in answer.tool_calls],
        "prompt_token_ids": list(output.prompt_token_ids),
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "usage": asdict(output.usage),
        "timings": asdict(output.timings),
        "used": facts,
        "forwards": {
            "graph_replays": stats.graph_replays,
            "eager": stats.eager_forwards,
            "dropped_graphs": stats.dropped_graphs,
        },
    }


class _Writer:
    """Text to stdout, thoughts to stderr; each ends its line before the other begins."""

    def __init__(self) -> None:
        self._thinking = False
        self._last = ""

    def push(self, delta: Delta) -> None:
        if delta.reasoning:
            terminal.write_dim(delta.reasoning)
            self._thinking = True
        if delta.text:
            self._end_thought()
            terminal.write(delta.text)
            self._last = delta.text

    def finish(self, answer: CompletionOutput) -> None:
        self._end_thought()
        if not self._last.endswith("\n"):
            terminal.write("\n")
        for call in answer.tool_calls:
            terminal.complain(f"The model calls {call.name}({json.dumps(call.arguments)}).")
        for raw in answer.malformed_calls:
            terminal.complain(f"The model calls a function in a way that cannot be read: {raw!r}.")

    def _end_thought(self) -> None:
        if self._thinking:
            terminal.write_dim("\n")
            self._thinking = False
