"""The Python API: `LLM` for batches, `AsyncLLM` for streams. Puts the rooms together.

llm = LLM()                                    # the demo checkpoint
llm.chat([{"role": "user", "content": [{"type": "image", "image": "photo.jpg"},
                                       {"type": "text", "text": "What is this?"}]}])
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from gemcut.config import EngineConfig
from gemcut.data import Prompt
from gemcut.engine.limits import Limits
from gemcut.engine.loop import Engine, Job, Update
from gemcut.engine.model_files import ChatPrompt, ModelFiles, RawPrompt, chat_options, raw_prompt
from gemcut.engine.service import Service
from gemcut.errors import GemcutError, InvalidRequest
from gemcut.media.workers import MediaWorkers
from gemcut.models.weight_sources import WeightSource
from gemcut.outputs import Delta, RequestOutput, Stats
from gemcut.prompt.template import media_parts
from gemcut.runner.start import Used, largest_block, start
from gemcut.sampling import SamplingParams

MANY_PICTURES = 16  # from here on it pays to start processes that decode them
DEMO = Path(__file__).parent / "demo" / "checkpoint"

Message = Mapping[str, Any]
Conversation = Sequence[Message]


def open_files(config: EngineConfig) -> ModelFiles:
    """The checkpoint that a config names, the demo if it names none."""
    files = ModelFiles.open(
        DEMO if config.model is None else config.model,
        revision=config.revision,
        allow_unknown_config=config.allow_unknown_config,
    )
    return files if config.image_tokens is None else replace(files, image_tokens=config.image_tokens)


def start_engine(
    config: EngineConfig,
    files: ModelFiles,
    *,
    weights: WeightSource | None = None,
    max_waiting: int = 1 << 20,
) -> tuple[Engine, Used]:
    """Load the weights, by default those of `files`, and put an engine on top. Torch comes in here."""
    started = start(config, files.plan, weights or files.folder, files.dtype)
    sizes, plan = started.sizes, files.plan
    limits = Limits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=started.max_model_len,
        page_size=sizes.page_size,
        window=plan.text.window or 0,
        num_sliding_pages=sizes.sliding_pages,
        num_full_pages=sizes.full_pages,
        bidirectional_vision=plan.text.bidirectional_vision,
        largest_block=largest_block(plan),
        prefix_caching=config.enable_prefix_caching,
        max_waiting=max_waiting,
    )
    ahead = started.runner.device.type == "cuda"
    return Engine(files, limits, started.runner, ahead=ahead, seed=config.seed), started.used


class LLM:
    """Answers many prompts at once, in this process.

    Settings are those of `EngineConfig`. `files`: of a checkpoint that is open already, for callers who make
    prompts before they load weights. Raises ConfigError, NotFound or CheckpointError if it cannot start.
    """

    def __init__(self, model: str | None = None, *, files: ModelFiles | None = None, **settings: Any) -> None:
        self.config = EngineConfig(model=model, **settings)
        self.files = open_files(self.config) if files is None else files
        self._engine, self.used = start_engine(self.config, self.files)
        self._numbers = itertools.count()

    def stats(self) -> Stats:
        """The engine's counters: steps, preemptions, prefix-cache hits, pages."""
        return self._engine.stats()

    def generate(
        self,
        prompts: RawPrompt | Sequence[RawPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue raw prompts: texts (one `<bos>` is put before), token ids, or {"prompt_token_ids": [...]}.

        One SamplingParams for all, or one each. Outputs come in the order of the prompts.
        """
        encoded = [ChatPrompt(self._raw(p), (), False) for p in _listed(prompts)]
        return self._run(encoded, sampling_params, chat=False, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation] | Sequence[ChatPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, or prompts that `ModelFiles.chat_prompt` has rendered.

        chat_template_kwargs: enable_thinking, preserve_thinking. mm_processor_kwargs: max_soft_tokens, the
        budget of each picture (70, 140, 280, 560 or 1120). Pictures in messages: `{"type": "image",
        "image": path, bytes, Pillow image or array}` or OpenAI's `image_url` with a data URI. They are
        decoded in this process if they are fewer than 16, otherwise in worker processes, side by side.
        """
        options = chat_options(chat_template_kwargs, mm_processor_kwargs)
        if _are_rendered(messages):
            if tools or options:
                raise InvalidRequest("The prompts are rendered: tools and options belong to `chat_prompt`.")
            return self._run(messages, sampling_params, chat=True, use_tqdm=use_tqdm)  # type: ignore[arg-type]
        conversations = [messages] if _is_conversation(messages) else messages
        prompts = self._prompts(conversations, tools=tools, **options)  # type: ignore[arg-type]
        return self._run(prompts, sampling_params, chat=True, use_tqdm=use_tqdm)

    def stream(
        self, prompt: ChatPrompt, params: SamplingParams | None = None, *, chat: bool = True
    ) -> Iterator[Delta | RequestOutput]:
        """Deltas of one request while it is written, the whole output last."""
        job = Job(request_id=self._name(), prompt=prompt, params=params or SamplingParams(), chat=chat)
        self._engine.add(job)
        try:
            while True:
                for update in self._engine.step():
                    if update.request_id == job.request_id:
                        yield update.delta
                        if update.output is not None:
                            yield update.output
                            return
        finally:
            self._engine.abort(job.request_id)
            while not self._engine.idle:
                self._engine.step()

    def _prompts(self, conversations: Sequence[Conversation], **options: Any) -> list[ChatPrompt]:
        if sum(len(media_parts(conversation)) for conversation in conversations) < MANY_PICTURES:
            return [self.files.chat_prompt(conversation, **options) for conversation in conversations]
        with MediaWorkers() as workers, ThreadPoolExecutor(8) as threads:
            render = partial(self.files.chat_prompt, load_media=workers.load, **options)
            return list(threads.map(render, conversations))

    def _raw(self, prompt: RawPrompt) -> Prompt:
        return raw_prompt(self.files, prompt)

    def _name(self) -> str:
        return f"r{next(self._numbers)}"

    def _run(
        self,
        prompts: Sequence[ChatPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        chat: bool,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        each = (
            [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        )
        if len(each) != len(prompts):
            raise InvalidRequest(f"There are {len(prompts)} prompts and {len(each)} SamplingParams.")
        names = [self._name() for _ in prompts]
        done: dict[str, RequestOutput] = {}
        with _progress(len(prompts), use_tqdm) as advance:
            try:
                for name, prompt, own in zip(names, prompts, each, strict=True):
                    self._engine.add(Job(request_id=name, prompt=prompt, params=own, chat=chat))
                while len(done) < len(names):
                    for update in self._engine.step():
                        if update.output is not None:
                            done[update.request_id] = update.output
                            advance(update.output)
            finally:
                for name in names:
                    if name not in done:
                        self._engine.abort(name)
                while not self._engine.idle:
                    self._engine.step()
        return [done[name] for name in names]


class AsyncLLM:
    """Answers streams from asyncio; the engine runs in a thread of its own.

    async with AsyncLLM() as llm:
        async for delta in llm.stream(messages): ...
    """

    def __init__(self, model: str | None = None, *, max_waiting: int = 1024, **settings: Any) -> None:
        self.config = EngineConfig(model=model, **settings)
        self.files = open_files(self.config)
        self._engine, self.used = start_engine(self.config, self.files, max_waiting=max_waiting)
        self._service = Service(self._engine, self._publish)
        self._media = MediaWorkers()  # starts nothing before the first picture
        self._listeners: dict[str, Callable[[Update | BaseException], None]] = {}
        self._numbers = itertools.count()
        self._failure: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name="gemcut-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Abort what runs; end the engine's thread and the worker processes."""
        self._media.close()
        self._service.stop()
        self._thread.join()
        self._engine.close()

    def stats(self) -> Stats:
        """The engine's counters, as of its last step."""
        return self._service.stats

    async def stream(
        self,
        messages: Conversation | ChatPrompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        salt: bytes = b"",
        chat: bool = True,
    ) -> AsyncIterator[Delta | RequestOutput]:
        """Deltas of one request, the whole output last. Leaving the loop early aborts the request."""
        if isinstance(messages, ChatPrompt):
            prompt = messages
        else:
            options = chat_options(chat_template_kwargs, mm_processor_kwargs)
            prompt = await asyncio.to_thread(
                self.files.chat_prompt, messages, tools=tools, load_media=self._media.load, **options
            )
        job = Job(
            request_id=request_id or f"r{next(self._numbers)}",
            prompt=prompt,
            params=sampling_params or SamplingParams(),
            chat=chat,
            priority=priority,
            deadline_s=deadline_s,
            salt=salt,
        )
        news: asyncio.Queue[Update | BaseException] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def tell(update: Update | BaseException) -> None:
            with suppress(RuntimeError):  # the caller's event loop has ended: nobody listens
                here.call_soon_threadsafe(news.put_nowait, update)

        if job.request_id in self._listeners:
            raise InvalidRequest(f"The request id {job.request_id!r} is in use.", "request_id")
        self._listeners[job.request_id] = tell
        try:
            # after we listen: an engine that ends from here on tells us
            self._check_alive()
            self._service.submit(job, tell)
            while True:
                update = await news.get()
                if isinstance(update, BaseException):
                    raise update
                yield update.delta
                if update.output is not None:
                    yield update.output
                    return
        finally:
            self._listeners.pop(job.request_id, None)
            self._service.abort(job.request_id)

    async def generate(
        self,
        messages: Conversation | ChatPrompt,
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> RequestOutput:
        """The whole output of one request; options as for `stream`."""
        async for news in self.stream(messages, sampling_params, **options):
            if isinstance(news, RequestOutput):
                return news
        raise AssertionError("a stream ended without its output")

    def _check_alive(self) -> None:
        if self._ended:
            raise GemcutError("The engine has ended.") from self._failure

    def _publish(self, updates: Sequence[Update]) -> None:
        for update in updates:
            tell = self._listeners.get(update.request_id)
            if tell is not None:
                tell(update)

    def _serve(self) -> None:
        try:
            self._service.run()
            self._ended = True
            self._abort_all()
        except BaseException as failure:
            self._failure, self._ended = failure, True
            for tell in list(self._listeners.values()):
                tell(GemcutError(f"The engine failed: {type(failure).__name__}: {failure}"))
            raise

    def _abort_all(self) -> None:
        for request_id, tell in list(self._listeners.items()):
            self._engine.abort(request_id)
            tell(GemcutError("The engine was closed."))
        while not self._engine.idle:
            self._engine.step()


def _listed(prompts: RawPrompt | Sequence[RawPrompt]) -> Iterable[RawPrompt]:
    """One prompt or several: a list of ids is one prompt."""
    if isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _are_rendered(messages: Any) -> bool:
    return len(messages) > 0 and isinstance(messages[0], ChatPrompt)


def _is_conversation(messages: Any) -> bool:
    return len(messages) > 0 and isinstance(messages[0], Mapping)


class _progress:
    """A progress bar over finished requests, where standard error is a terminal."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._shown, self._bar = total, shown, None

    def __enter__(self) -> Callable[[RequestOutput], None]:
        from tqdm import tqdm

        self._tokens = 0
        # disable=None: silent unless standard error is a terminal
        self._bar = tqdm(total=self._total, unit="request", disable=None if self._shown else True)
        return self._advance

    def _advance(self, output: RequestOutput) -> None:
        assert self._bar is not None, "the bar is open"
        self._tokens += output.usage.completion_tokens
        self._bar.set_postfix_str(f"{self._tokens} tokens", refresh=False)
        self._bar.update()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
