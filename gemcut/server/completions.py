"""`/v1/completions`: raw prompts, one or several, continued."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from gemcut.data import TokenLogprobs
from gemcut.engine.loop import Job
from gemcut.errors import InvalidRequest
from gemcut.outputs import Delta, RequestOutput
from gemcut.server import protocol
from gemcut.server.answerer import Answerer, check_complete
from gemcut.server.chat import finite, merged, prompt_logprobs, token_text, usage
from gemcut.server.exchange import encode
from gemcut.server.protocol import CompletionRequest
from gemcut.server.stream import DONE, PING, Chunks

MAX_ANSWERS = 256  # n x prompts

News = tuple[int, list[Delta], RequestOutput | None]


async def completion_jobs(answerer: Answerer, request: CompletionRequest, salt: bytes) -> list[Job]:
    """A job for each prompt. Raises InvalidRequest."""
    prompts = protocol.prompts_of(request.prompt)
    form = protocol.structure(request)
    params = protocol.sampling(
        request, logprobs=request.logprobs, max_tokens=request.max_tokens, structured_outputs=form
    )
    if request.best_of not in (None, params.n):
        raise InvalidRequest("best_of must equal n: no answer is thrown away here.", "best_of")
    if params.n * len(prompts) > MAX_ANSWERS:
        raise InvalidRequest(
            f"n x prompts is {params.n * len(prompts)}; at most {MAX_ANSWERS} answers are given.", "n"
        )
    asked = params.n * len(prompts) * (params.max_tokens or 0)
    if asked > answerer.config.max_answer_tokens:
        raise InvalidRequest(
            f"n x prompts x max_tokens is {asked}; at most {answerer.config.max_answer_tokens} tokens may be "
            "asked for.",
            "max_tokens",
        )
    priority = protocol.check_priority(request.priority)
    encoded = [await answerer.raw_prompt(prompt) for prompt in prompts]
    return [answerer.job(prompt, params, chat=False, priority=priority, salt=salt) for prompt in encoded]


async def all_whole(answerer: Answerer, jobs: Sequence[Job]) -> list[RequestOutput]:
    """The outputs of several jobs. The first error ends them all."""
    tasks = [asyncio.create_task(answerer.whole(job)) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def all_streams(answerer: Answerer, jobs: Sequence[Job]) -> AsyncGenerator[News, None]:
    """News of several jobs as they come, with the number of the job."""
    news: asyncio.Queue[News | Exception] = asyncio.Queue()

    async def follow(number: int, job: Job) -> None:
        try:
            async with aclosing(answerer.stream(job)) as stream:
                async for deltas, output in stream:
                    news.put_nowait((number, deltas, output))
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.create_task(follow(number, job)) for number, job in enumerate(jobs)]
    try:
        unfinished = len(jobs)
        while unfinished:
            latest = await news.get()
            if isinstance(latest, Exception):
                raise latest
            unfinished -= latest[2] is not None
            yield latest
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class CompletionWriter:
    """Writes the answers to one completion request, whole or in chunks."""

    def __init__(self, answerer: Answerer, request: CompletionRequest, jobs: Sequence[Job]) -> None:
        self._files, self._request, self._jobs = answerer.files, request, jobs
        options = request.stream_options
        self._wants_usage = bool(options and options.include_usage)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model or answerer.config.served_model_names[0],
        }
        self._chunks = Chunks(self._head, usage_null=self._wants_usage)
        self._outputs: list[RequestOutput] = []  # of the jobs of a stream that have ended
        self._offsets: dict[int, int] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The body of an answer that is not streamed."""
        choices = []
        for number, output in enumerate(outputs):
            for answer in output.outputs:
                choice = self._choice(
                    number, answer.index, answer.text, answer.token_ids, answer.logprobs or ()
                )
                choice["finish_reason"] = answer.finish_reason
                if self._request.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(self._files, output)
                choices.append(choice)
        return encode(self._head | {"choices": choices, "usage": self._usage(outputs)})

    def events(self, number: int, deltas: Sequence[Delta], output: RequestOutput | None) -> bytes:
        """Events of an answer that is: of the latest news of one job. Nothing for tokens without text. Raises
        what cut the answer off."""
        if output is not None:
            check_complete(output)
            self._outputs.append(output)
        elif not deltas:
            return PING
        pieces = [
            self._chunks.choice(
                self._choice(number, delta.index, delta.text, delta.token_ids, delta.logprobs)
                | {"finish_reason": delta.finish_reason}
            )
            for delta in merged(deltas)
            if delta.text or delta.finish_reason or delta.logprobs or self._request.return_token_ids
        ]
        if len(self._outputs) == len(self._jobs):
            if self._wants_usage:
                pieces.append(self._chunks.usage(self._usage(self._outputs)))
            pieces.append(DONE)
        return b"".join(pieces)

    def _choice(
        self,
        number: int,
        index: int,
        text: str,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs],
    ) -> dict[str, Any]:
        index += number * self._jobs[0].params.n
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": self._logprobs(index, entries)}
        if self._request.return_token_ids:
            choice["token_ids"] = token_ids
        return choice

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._request.logprobs is None or not entries:
            return None
        texts = [token_text(self._files, entry.token_id)[0] for entry in entries]
        offset, offsets = self._offsets.get(index, 0), []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                {token_text(self._files, t)[0]: finite(logprob) for t, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return usage(self._files, self._jobs[0], *outputs)
