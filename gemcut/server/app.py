"""The application: routes, and what happens around each of them. One coroutine a request, no framework.

Around a route: host name, key, room, then the body, then the route itself, raced against the client's going
away; an error becomes a body by `errors.TABLE`; in the end one line in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import gemcut
from gemcut.errors import GemcutError, InvalidRequest, NotFound
from gemcut.outputs import RequestOutput
from gemcut.sampling import SamplingParams
from gemcut.server import anthropic, chat, completions, metrics, openapi, pages, protocol, responses
from gemcut.server.answerer import Answerer
from gemcut.server.door import Door, Keys, check_host, cors_headers
from gemcut.server.errors import (
    NoRoute,
    NotReady,
    WrongMethod,
    anthropic_error,
    headers_of,
    openai_error,
    status_of,
)
from gemcut.server.exchange import ClientGone, Exchange, Receive, Scope, Send
from gemcut.server.response_writer import ResponseWriter
from gemcut.server.stream import event, named_event
from gemcut.server.traces import Traces

log = logging.getLogger("gemcut.server")

CLIENT_CLOSED = 499  # as nginx logs a client that went away
FRESH_S = 30.0  # a forward pass this recent shows that the engine works
PROBE_S = 5.0

Handler = Callable[[Exchange, bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """public: no key is needed. needs_engine: it generates, so it waits at the door."""

    method: str
    handler: Handler
    public: bool = False
    needs_engine: bool = False


class App:
    """The ASGI application of one server."""

    def __init__(self, answerer: Answerer, door: Door, traces: Traces | None = None) -> None:
        self.answerer, self.door, self.traces = answerer, door, traces
        self.config, self.client = answerer.config, answerer.client
        self.keys = Keys(self.config.api_keys)
        self._pages = pages.pages()
        self._probe: asyncio.Task[None] | None = None
        self._created = int(time.time())
        self._chat = protocol.Reader(protocol.ChatRequest)
        self._completion = protocol.Reader(protocol.CompletionRequest)
        self._responses = protocol.Reader(responses.ResponsesRequest)
        self._messages = protocol.Reader(anthropic.MessagesRequest)
        self._count = protocol.Reader(anthropic.CountRequest)
        self._tokenize = protocol.Reader(protocol.TokenizeRequest)
        self._detokenize = protocol.Reader(protocol.DetokenizeRequest)
        self.routes: dict[str, Route] = {
            "/live": Route("GET", self.live, public=True),
            "/ready": Route("GET", self.ready, public=True),
            "/health": Route("GET", self.ready, public=True),
            "/version": Route("GET", self.version),
            "/metrics": Route("GET", self.metrics),
            "/openapi.json": Route("GET", self.openapi),
            "/v1/models": Route("GET", self.models),
            "/v1/chat/completions": Route("POST", self.chat, needs_engine=True),
            "/v1/completions": Route("POST", self.completions, needs_engine=True),
            "/v1/responses": Route("POST", self.responses, needs_engine=True),
            "/v1/messages": Route("POST", self.messages, needs_engine=True),
            "/v1/messages/count_tokens": Route("POST", self.count_tokens),
            "/tokenize": Route("POST", self.tokenize),
            "/detokenize": Route("POST", self.detokenize),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "uvicorn is told to do nothing else"
        exchange = Exchange(scope, receive, send, self.config)
        record = exchange.record
        try:
            await self._serve(exchange)
        except ClientGone:
            record.status = CLIENT_CLOSED
        except GemcutError as error:
            if type(error) is GemcutError:
                log.exception("request failed", extra={"fields": {"request_id": record.request_id}})
            await self._refuse(exchange, error)
        except Exception as error:
            log.exception("request failed", extra={"fields": {"request_id": record.request_id}})
            await self._refuse(exchange, error)
        finally:
            self._note(exchange)

    async def _serve(self, exchange: Exchange) -> None:
        path, record = exchange.record.path, exchange.record
        check_host(exchange.headers, self.config)
        exchange.extra_headers = cors_headers(exchange.headers, self.config)
        if record.method == "OPTIONS" and exchange.extra_headers:  # a preflight bears no key
            await exchange.bytes(b"", b"text/plain", 204)
            return
        route = self.routes.get(path)
        page = self._pages.get(path) if route is None else None
        if not (page or (route and route.public)):
            record.key = self.keys.check(exchange.headers)
        if page is not None:
            self._check_method(record.method, "GET")
            await self._page(exchange, page)
        elif route is None and path.startswith("/v1/models/"):
            self._check_method(record.method, "GET")
            await exchange.json(self._model(path.removeprefix("/v1/models/")))
        elif route is None:
            raise NoRoute(f"There is nothing at this path. {self._listed()}")
        else:
            self._check_method(record.method, route.method)
            await self._handle(exchange, route)

    async def _handle(self, exchange: Exchange, route: Route) -> None:
        if route.method == "GET":
            await route.handler(exchange, b"")
            return
        with self.door.enter(exchange.record.key):
            if route.needs_engine and self.client.state != "ready":
                raise NotReady("The engine is being restarted.", 5.0)
            body = await exchange.body()
            await race(exchange, route.handler(exchange, body))

    async def _page(self, exchange: Exchange, page: pages.Page) -> None:
        content = page.read()
        headers = [*pages.HEADERS, (b"etag", tag := pages.tag(content))]
        if tag in exchange.headers.get(b"if-none-match", b""):
            await exchange.not_modified(headers)
        else:
            await exchange.bytes(content, page.kind, headers=headers)

    def _check_method(self, method: str, wanted: str) -> None:
        if method != wanted and not (method == "HEAD" and wanted == "GET"):
            raise WrongMethod(f"This path takes {wanted}.")

    def _listed(self) -> str:
        return f"There are {', '.join(self.routes)}."

    async def _refuse(self, exchange: Exchange, error: Exception) -> None:
        is_anthropic = exchange.record.path.startswith("/v1/messages")
        payload = anthropic_error(error) if is_anthropic else openai_error(error)
        exchange.record.fields["error"] = type(error).__name__
        with contextlib.suppress(ClientGone):
            if exchange.has_begun:
                # within a stream: an event, and no [DONE]
                broken = exchange.broken(error) if exchange.broken else event(payload)
                await exchange.events(broken)
                await exchange.end_events()
                exchange.record.fields["broken_off"] = True
                return
            await exchange.json(payload, status_of(error).status, headers_of(error))

    def _note(self, exchange: Exchange) -> None:
        record = exchange.record
        known = record.path if record.path in self.routes or record.path in self._pages else "other"
        self.answerer.metrics.count_answer(known, record.status)
        route = self.routes.get(record.path)
        if self.traces is not None and route is not None and route.needs_engine:
            self.traces.record(exchange)
        if record.path in ("/live", "/ready", "/health", "/metrics") and record.status == 200:
            return  # probes would drown the rest
        fields = {
            "request_id": record.request_id,
            "method": record.method,
            "path": known,
            "status": record.status,
            "client": record.client,
            "key": record.key,
            "seconds": round(time.monotonic() - record.began_s, 4),
            **record.fields,
        }
        log.info("request", extra={"fields": fields})

    # ---- health and facts

    async def live(self, exchange: Exchange, _: bytes) -> None:
        """This process serves."""
        await exchange.json({"status": "live"})

    async def ready(self, exchange: Exchange, _: bytes) -> None:
        """The engine computes: it has lately, or does now."""
        why = None
        if self.door.is_draining:
            why = "draining"
        elif not self.client.is_ready:
            why = self.client.state if self.client.state != "ready" else "silent"
        elif time.monotonic() - self.client.step_count_s > FRESH_S and not await self._forward():
            why = "stuck"
        if why is None:
            await exchange.json({"status": "ready"})
        else:
            await exchange.json({"status": why}, 503, [(b"retry-after", b"5")])

    async def _forward(self) -> bool:
        """A forward pass on demand; those who ask at the same time share one."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._probe_engine())
        try:
            async with asyncio.timeout(PROBE_S):
                await asyncio.shield(self._probe)
        except (TimeoutError, GemcutError):
            return False
        return True

    async def _probe_engine(self) -> None:
        prompt = await self.answerer.raw_prompt("")
        params = SamplingParams(max_tokens=1, temperature=0.0)
        stream = self.client.submit(self.answerer.job(prompt, params, chat=False), streamed=False)
        try:
            await stream.next()
            self.client.step_count_s = time.monotonic()
        finally:
            self.client.leave(stream)

    async def version(self, exchange: Exchange, _: bytes) -> None:
        """gemcut's version."""
        await exchange.json({"version": gemcut.__version__})

    async def metrics(self, exchange: Exchange, _: bytes) -> None:
        """Prometheus' text."""
        await exchange.bytes(self.answerer.metrics.text(), metrics.CONTENT_TYPE)

    async def openapi(self, exchange: Exchange, _: bytes) -> None:
        """The interface as an OpenAPI document."""
        await exchange.json(openapi.document(self.routes))

    async def models(self, exchange: Exchange, _: bytes) -> None:
        """The one model, under each of its names."""
        names = self.config.served_model_names
        await exchange.json({"object": "list", "data": [self._model(name) for name in names]})

    def _model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "gemcut",
            "max_model_len": self.answerer.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.config.served_model_names:
            known = ", ".join(self.config.served_model_names)
            raise NotFound(f"There is no model {name[:200]!r} here; there is {known}.")

    # ---- answers

    async def chat(self, exchange: Exchange, body: bytes) -> None:
        """OpenAI's chat completions."""
        request: protocol.ChatRequest = self._chat.read(body)
        self._check_model(request.model)
        try:
            await self._chat_answer(exchange, request)
        except InvalidRequest as error:
            if (error.param or "").startswith("structured_outputs") and request.structured_outputs is None:
                # by the name that the client knows
                error.param = "tools" if request.response_format is None else "response_format"
            raise

    async def _chat_answer(self, exchange: Exchange, request: protocol.ChatRequest) -> None:
        salt = self.keys.salt(exchange.record.key, request.cache_salt)
        job = await chat.chat_job(self.answerer, request, salt)
        writer = chat.ChatWriter(self.answerer, request, job)
        if request.stream:
            exchange.record.fields |= {"streamed": True, "jobs": 1}
            await send_events(exchange, self.answerer.stream(job), writer.events)
        else:
            output = await self.answerer.whole(job)
            note_output(exchange, output)
            await exchange.bytes(writer.whole(output), b"application/json")

    async def completions(self, exchange: Exchange, body: bytes) -> None:
        """OpenAI's plain completions."""
        request: protocol.CompletionRequest = self._completion.read(body)
        self._check_model(request.model)
        salt = self.keys.salt(exchange.record.key, request.cache_salt)
        jobs = await completions.completion_jobs(self.answerer, request, salt)
        writer = completions.CompletionWriter(self.answerer, request, jobs)
        if request.stream:
            exchange.record.fields |= {"streamed": True, "jobs": len(jobs)}
            await send_events(exchange, completions.all_streams(self.answerer, jobs), writer.events)
        else:
            outputs = await completions.all_whole(self.answerer, jobs)
            for output in outputs:
                note_output(exchange, output)
            await exchange.bytes(writer.whole(outputs), b"application/json")

    async def responses(self, exchange: Exchange, body: bytes) -> None:
        """OpenAI's responses."""
        request: responses.ResponsesRequest = self._responses.read(body)
        self._check_model(request.model)
        salt = self.keys.salt(exchange.record.key, request.cache_salt)
        try:
            await self._respond(exchange, request, salt)
        except InvalidRequest as error:
            if (error.param or "").startswith("structured_outputs") and request.structured_outputs is None:
                # by the name that the client knows
                error.param = (
                    "tools" if request.text is None or request.text.format is None else "text.format"
                )
            raise

    async def _respond(self, exchange: Exchange, request: responses.ResponsesRequest, salt: bytes) -> None:
        job = await responses.responses_job(self.answerer, request, salt)
        writer = ResponseWriter(self.answerer, request, job)
        if request.stream:
            exchange.broken = writer.failed
            exchange.record.fields |= {"streamed": True, "jobs": 1}
            await send_events(exchange, self.answerer.stream(job), writer.events)
        else:
            output = await self.answerer.whole(job)
            note_output(exchange, output)
            await exchange.bytes(writer.whole(output), b"application/json")

    async def messages(self, exchange: Exchange, body: bytes) -> None:
        """Anthropic's messages."""
        request: anthropic.MessagesRequest = self._messages.read(body)
        self._check_model(request.model)
        salt = self.keys.salt(exchange.record.key, None)
        job = await anthropic.messages_job(self.answerer, request, salt)
        writer = anthropic.MessageWriter(self.answerer, request, job)
        if request.stream:
            exchange.broken = lambda error: named_event("error", anthropic_error(error))
            exchange.record.fields |= {"streamed": True, "jobs": 1}
            await send_events(exchange, self.answerer.stream(job), writer.events)
        else:
            output = await self.answerer.whole(job)
            note_output(exchange, output)
            await exchange.bytes(writer.whole(output), b"application/json")

    async def count_tokens(self, exchange: Exchange, body: bytes) -> None:
        """Tokens of a message that is not sent."""
        request: anthropic.CountRequest = self._count.read(body)
        self._check_model(request.model)
        prompt = await anthropic.prompt_of(self.answerer, request)
        await exchange.json({"input_tokens": len(prompt.prompt)})

    # ---- tokens

    async def tokenize(self, exchange: Exchange, body: bytes) -> None:
        """Ids of a text, or of a rendered conversation."""
        request: protocol.TokenizeRequest = self._tokenize.read(body)
        self._check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("Send either prompt or messages.", "prompt")
        of_chats = ("tools", "add_generation_prompt", "chat_template_kwargs", "mm_processor_kwargs")
        for name in ("add_special_tokens",) if request.prompt is None else of_chats:
            if getattr(request, name) is not None:
                other = "prompt" if request.prompt is None else "messages"
                raise InvalidRequest(f"{name} goes with {other}.", name)
        answerer = self.answerer
        if request.prompt is None:
            thinks = protocol.thinks(None, request.chat_template_kwargs)
            ids = (await answerer.chat_prompt(chat.conversation(request, thinks=thinks))).prompt.token_ids
        else:
            prompt = await answerer.raw_prompt(request.prompt)
            ids = prompt.prompt.token_ids[1 if request.add_special_tokens is False else 0 :]
        payload: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": answerer.max_model_len,
            "tokens": ids,
        }
        if request.return_token_strs:
            payload["token_strs"] = [chat.token_text(answerer.files, token)[0] for token in ids]
        await exchange.json(payload)

    async def detokenize(self, exchange: Exchange, body: bytes) -> None:
        """The text of ids, controls spelled."""
        request: protocol.DetokenizeRequest = self._detokenize.read(body)
        self._check_model(request.model)
        vocab = self.answerer.files.tokenizer.vocab_size
        for i, token in enumerate(request.tokens):
            if not 0 <= token < vocab:
                raise InvalidRequest(f"tokens[{i}] is {token}; ids are 0 to {vocab - 1}.", f"tokens[{i}]")
        await exchange.json({"prompt": self.answerer.files.tokenizer.decode(request.tokens)})


async def race(exchange: Exchange, work: Awaitable[None]) -> None:
    """Do the work unless the client goes first. Raises ClientGone then."""
    assert isinstance(work, Coroutine), "handlers are coroutines"
    task, gone = asyncio.create_task(work), asyncio.create_task(exchange.gone())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        await task
    finally:
        for running in (task, gone):
            running.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def send_events(
    exchange: Exchange, news: AsyncGenerator[Any, None], write: Callable[..., bytes]
) -> None:
    """Send a stream: what `write` makes of the news, whose last item is an output or None.

    The status is sent with the first events, so that a refusal has its own.
    """
    async with contextlib.aclosing(news):
        async for latest in news:
            if latest[-1] is not None:
                note_output(exchange, latest[-1])
            if data := write(*latest):
                await exchange.events(data)
    await exchange.end_events()


def note_output(exchange: Exchange, output: RequestOutput) -> None:
    """Figures of an answer for the log."""
    fields, usage = exchange.record.fields, output.usage
    for name in ("prompt_tokens", "cached_tokens", "image_tokens", "completion_tokens"):
        fields[name] = fields.get(name, 0) + getattr(usage, name)
    fields["finish_reasons"] = sorted({answer.finish_reason for answer in output.outputs})
    for name in ("queue_s", "first_token_s", "total_s"):
        fields[name] = round(getattr(output.timings, name), 4)
