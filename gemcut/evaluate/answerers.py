"""Who answers: an engine of this process, or a server that speaks OpenAI's interface.

Either is called from as many threads as there are questions under way.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gemcut.errors import ConfigError, GemcutError
from gemcut.evaluate.task import Item, Reply
from gemcut.llm import AsyncLLM
from gemcut.outputs import CompletionOutput
from gemcut.sampling import SamplingParams

Answerer = Callable[[Item], Reply]
TRIES = 4
PAUSE_S = 1.0  # before the second try; twice as long before each further one


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How answers are drawn. temperature: 0 takes the likeliest token; top_k and top_p are the model's own
    suggestions. thinking: whether the model may think first, in tasks that leave it open."""

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    thinking: bool = False


def reply_of(answer: CompletionOutput) -> Reply:
    """An answer of an engine of ours, or as much of it as there is."""
    return Reply(text=answer.text, reasoning=answer.reasoning, complete=answer.finish_reason == "stop")


@dataclass(frozen=True, slots=True)
class EngineAnswerer:
    """An engine in this process."""

    llm: AsyncLLM
    wish: Wish

    def __call__(self, item: Item) -> Reply:
        params = SamplingParams(
            max_tokens=self.wish.max_tokens, temperature=self.wish.temperature, seed=self.wish.seed
        )
        thinking = {"enable_thinking": item.thinking or self.wish.thinking}
        output = asyncio.run(self.llm.generate(item.messages, params, chat_template_kwargs=thinking))
        answer = output.outputs[0]
        if answer.error is not None:
            raise GemcutError(f"The engine gave up a request: {answer.error}.")
        return reply_of(answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAnswerer:
    """A server. base_url: as OpenAI's clients take it, such as http://127.0.0.1:8000/v1.

    A request that meets a busy or failing server is sent again, a few times and with growing pauses.
    """

    base_url: str
    model: str
    wish: Wish
    key: str | None = None
    timeout_s: float = 600.0

    def __call__(self, item: Item) -> Reply:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [_over_the_wire(message) for message in item.messages],
            "max_tokens": self.wish.max_tokens,
            "temperature": self.wish.temperature,
        }
        if self.wish.seed is not None:
            body["seed"] = self.wish.seed
        if item.thinking or self.wish.thinking:  # other servers need not know the word
            body["chat_template_kwargs"] = {"enable_thinking": True}
        answer = call(self.base_url, "/chat/completions", body, key=self.key, timeout_s=self.timeout_s)
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
            return Reply(
                text=message.get("content") or "",
                reasoning=reasoning,
                complete=choice["finish_reason"] == "stop",
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise GemcutError(f"{self.base_url} did not answer in OpenAI's form.") from error


def first_model(base_url: str, key: str | None) -> str:
    """The first model that a server names. Raises GemcutError."""
    try:
        return call(base_url, "/models", None, key=key, timeout_s=30.0)["data"][0]["id"]
    except (KeyError, IndexError, TypeError) as error:
        raise GemcutError(f"{base_url} names no model. Give one with --model.") from error


def call(base_url: str, path: str, body: Any, *, key: str | None, timeout_s: float) -> Any:
    """The JSON that a server answers; a POST if there is a body. Raises GemcutError after the last try."""
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"A base URL begins with http:// or https://, not {base_url!r}.")
    request = urllib.request.Request(
        base_url.rstrip("/") + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )
    failure = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            failure = f"answered {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code == 404 and not base_url.rstrip("/").endswith("/v1"):
                failure += " (the base URL of most servers ends in /v1)"
            if error.code != 429 and error.code < 500:
                break  # it would say the same again
        except (OSError, ValueError) as error:
            failure = f"does not answer: {error}"
    raise GemcutError(f"{base_url} {failure}")


def _over_the_wire(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": [_part(part) for part in content]}


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A picture as a data URI. Encoded ones travel as they are, others as PNG, which loses nothing."""
    if part["type"] != "image":
        return part
    data = part["image"]
    if isinstance(data, Image.Image):
        packed = io.BytesIO()
        data.save(packed, "PNG")
        data = packed.getvalue()
    try:
        with Image.open(io.BytesIO(data)) as picture:
            kind = (picture.format or "png").lower()
    except OSError as error:
        raise GemcutError(f"A picture of {len(data):,} bytes is of no known format.") from error
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}
