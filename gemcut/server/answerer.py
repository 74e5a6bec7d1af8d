"""From what a request asks to the engine's answer: prompts made, jobs submitted, news awaited.

Enters: messages or raw prompts, `SamplingParams`. Leaves: `RequestOutput`s or streams of deltas. It must not
know HTTP or whose interface it was that asked.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from gemcut.data import SOFT_TOKEN_BUDGETS, ImagePatches
from gemcut.engine.loop import Job
from gemcut.engine.model_files import ChatPrompt, ModelFiles, raw_prompt
from gemcut.errors import InvalidRequest
from gemcut.media.fetch import Fetcher, Url, part_url
from gemcut.media.image import Source, request_part_source
from gemcut.media.workers import MediaWorkers
from gemcut.outputs import Delta, RequestOutput
from gemcut.prompt.template import media_parts
from gemcut.prompt.writer import MediaPart
from gemcut.sampling import SamplingParams
from gemcut.server.engine_client import EngineClient
from gemcut.server.errors import ModelFailed, TookTooLong
from gemcut.server.metrics import Metrics
from gemcut.server.settings import ServerConfig

T = TypeVar("T")
LOW_DETAIL = 70  # soft tokens; OpenAI's own low detail costs 85


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat to be rendered.

    image_tokens: budget of each picture that names no detail of its own. places: what the request calls the
    messages, for errors; None if they are its `messages`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    enable_thinking: bool = False
    preserve_thinking: bool = False
    add_generation_prompt: bool = True
    image_tokens: int | None = None
    places: Sequence[str] | None = None


class Answerer:
    """The engine as routes see it."""

    def __init__(
        self, files: ModelFiles, client: EngineClient, config: ServerConfig, metrics: Metrics
    ) -> None:
        self.files, self.client, self.config, self.metrics = files, client, config, metrics
        self.workers = MediaWorkers(config.media_workers, max_pixels=config.max_pixels)
        self.fetcher = Fetcher(config.image_domains) if config.image_domains else None
        # rendering and tokenising of long prompts; the loop goes on serving streams meanwhile
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="gemcut-prompts")
        self._numbers = itertools.count()

    def close(self) -> None:
        """End the media workers."""
        self.workers.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have."""
        assert self.client.started is not None, "requests come after the engine"
        return self.client.started.max_model_len

    async def chat_prompt(self, chat: Conversation) -> ChatPrompt:
        """Render a conversation and load its pictures. Raises InvalidRequest naming the message part."""
        try:
            return await self._chat_prompt(chat)
        except InvalidRequest as error:
            if chat.places is None:
                raise
            param = None if error.param is None else _renamed(error.param, chat.places)
            raise InvalidRequest(_renamed(str(error), chat.places), param) from error

    async def raw_prompt(self, prompt: str | Sequence[int]) -> ChatPrompt:
        """A prompt without a template."""
        return ChatPrompt(await self.in_thread(lambda: raw_prompt(self.files, prompt)), (), False)

    def job(
        self,
        prompt: ChatPrompt,
        params: SamplingParams,
        *,
        chat: bool,
        priority: int = 0,
        salt: bytes = b"",
    ) -> Job:
        """A job for the engine. Raises InvalidRequest if it asks for more tokens than a request may."""
        params.check_ids(self.files.plan.text.vocab)
        if params.max_tokens is not None and params.n * params.max_tokens > self.config.max_answer_tokens:
            raise InvalidRequest(
                f"n x max_tokens is {params.n * params.max_tokens}; at most "
                f"{self.config.max_answer_tokens} tokens may be asked for.",
                "max_tokens",
            )
        return Job(
            request_id=f"j{next(self._numbers)}-{secrets.token_hex(4)}",
            prompt=prompt,
            params=params,
            chat=chat,
            priority=priority,
            deadline_s=self.config.request_s,
            salt=salt,
        )

    async def whole(self, job: Job) -> RequestOutput:
        """The whole output. Raises TookTooLong or ModelFailed if one of its answers is not complete."""
        stream = self.client.submit(job, streamed=False)
        try:
            _, output = await stream.next()
        finally:
            self.client.leave(stream)
        assert output is not None, "a stream without deltas ends in its output"
        self.metrics.count(output)
        check_complete(output)
        return output

    async def stream(self, job: Job) -> AsyncGenerator[tuple[list[Delta], RequestOutput | None], None]:
        """Deltas as they come, the output with the last. Empty news: nothing came for a while."""
        stream = self.client.submit(job, streamed=True)
        clock = self.metrics.clock()
        try:
            output = None
            while output is None:
                deltas, output = await stream.next(self.config.ping_s)
                if deltas:
                    clock.tick(len(deltas), job.params.n)
                if output is not None:
                    self.metrics.count(output)
                yield deltas, output
        finally:
            self.client.leave(stream)

    def budget(self, detail: str | None, default: int | None) -> int:
        """Soft tokens for a picture of OpenAI's `detail`."""
        if detail == "low":
            return LOW_DETAIL
        if detail == "high":
            vision = self.files.plan.vision
            # the largest whose square grid of patches the position table holds
            fits = [b for b in SOFT_TOKEN_BUDGETS if vision is None or 3 * math.isqrt(b) <= vision.positions]
            return max(fits, default=LOW_DETAIL)
        return self.files.image_tokens if default is None else default

    async def _chat_prompt(self, chat: Conversation) -> ChatPrompt:
        check_tool_messages(chat.messages)
        parts = await self.in_thread(lambda: media_parts(chat.messages))
        if len(parts) > self.config.max_images:
            raise InvalidRequest(
                f"The request has {len(parts)} pictures; at most {self.config.max_images} are taken.",
                parts[self.config.max_images].param,
            )
        pictures = await self._pictures(parts, chat.image_tokens)
        return await self.in_thread(
            lambda: self.files.chat_prompt(
                chat.messages,
                tools=chat.tools or None,
                enable_thinking=chat.enable_thinking,
                preserve_thinking=chat.preserve_thinking,
                add_generation_prompt=chat.add_generation_prompt,
                image_tokens=chat.image_tokens,
                load_media=lambda _parts, _budget: pictures,
            )
        )

    async def _pictures(self, parts: Sequence[MediaPart], image_tokens: int | None) -> list[ImagePatches]:
        if not parts:
            return []
        sources = await self.in_thread(lambda: [self._source(part, image_tokens) for part in parts])
        tasks = [
            asyncio.create_task(self._patches(part, *source))
            for part, source in zip(parts, sources, strict=True)
        ]
        try:
            return [await task for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _patches(self, part: MediaPart, source: Source | Url, budget: int) -> ImagePatches:
        try:
            if isinstance(source, Url):
                assert self.fetcher is not None, "without one, no part is a URL"
                source = await self.fetcher.get(source)
            return await asyncio.wrap_future(self.workers.patches(source, budget))
        except InvalidRequest as error:
            error.param = part.param
            raise

    def _source(self, part: MediaPart, image_tokens: int | None) -> tuple[Source | Url, int]:
        """The bytes of a picture or where they are, and its budget."""
        if part.kind != "image":
            raise InvalidRequest(f"gemcut takes no {part.kind} yet; it takes text and pictures.", part.param)
        given, detail = part.part, None
        address = given.get("image_url")
        if isinstance(address, Mapping):
            detail = address.get("detail")
            given = {**given, "image_url": {"url": address.get("url")}}
        try:
            url = None if self.fetcher is None else part_url(given)
            return url or request_part_source(given), self.budget(detail, image_tokens)
        except InvalidRequest as error:
            error.param = f"{part.param}.{error.param}" if error.param else part.param
            raise

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do what may take long beside the loop, which goes on serving streams."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def check_tool_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InvalidRequest for a tool's message that answers no call: the template would drop it."""
    called: dict[Any, str] = {}  # id -> name, of the calls that may be answered here
    for i, message in enumerate(messages):
        if message["role"] != "tool":
            called = {call.get("id"): call["function"]["name"] for call in message.get("tool_calls") or ()}
            continue
        at = f"messages[{i}]"
        if message.get("tool_call_id") not in called:
            raise InvalidRequest(
                f"{at} answers no call of the message before it: its tool_call_id is "
                f"{message.get('tool_call_id')!r}, and there {_listed(list(called))}.",
                f"{at}.tool_call_id",
            )
        name = called[message.get("tool_call_id")]
        if message.get("name") not in (None, name):
            raise InvalidRequest(f"{at}.name must be {name!r}, as the call's.", f"{at}.name")


def _listed(ids: Sequence[Any]) -> str:
    return f"are {', '.join(map(repr, ids))[:200]}" if ids else "are no calls"


def _renamed(text: str, places: Sequence[str]) -> str:
    def place(found: re.Match[str]) -> str:
        at = int(found[1])
        return places[at] if at < len(places) else found[0]

    return re.sub(r"messages\[(\d+)\]", place, text)


def check_complete(output: RequestOutput) -> None:
    """Raise TookTooLong or ModelFailed if an answer was cut off by neither the model nor its length."""
    for answer in output.outputs:
        if answer.finish_reason == "timeout":
            raise TookTooLong("The answer was not complete within the time that a request may take.")
        if answer.finish_reason not in ("stop", "length", "tool_calls"):
            raise ModelFailed(f"The model failed on this request: {answer.error or answer.finish_reason}.")


def reasoning_tokens(token_ids: Sequence[int], opening: int, closing: int, in_thought: bool) -> int:
    """How many of an answer's tokens belong to its thoughts, the tokens around them included."""
    count = 0
    for token in token_ids:
        in_thought = in_thought or token == opening
        count += in_thought
        in_thought = in_thought and token != closing
    return count
