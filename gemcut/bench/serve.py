"""`gemcut bench serve`: any server that speaks OpenAI's interface under load, as its clients see it.

A load is a rate, at which requests are sent whether or not earlier ones were answered, or a number of clients
that each send when they were answered. Times are from the sending of a request; how late the sender itself
was is told beside them.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemcut.bench.serve_client import Endpoint, ServerFailed, Trace, ask, get
from gemcut.errors import ConfigError

SHARES = (50, 90, 99)
LATENCIES = {"ttft": "first token", "tpot": "a token", "itl": "between news", "e2e": "whole answer"}
SLO_NAMES = ("ttft", "tpot", "e2e")  # of one request; gaps between news have no single value
# each is a token for most vocabularies
WORDS = (
    *("time", "year", "people", "way", "day", "thing", "life", "child", "world", "school", "state", "family"),
    *("group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program"),
    *("question", "work", "number", "night", "point", "home", "water", "room", "area", "money", "story"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """rate: requests a second, None for no bound. clients: requests at a time, None for no bound."""

    rate: float | None = None
    clients: int | None = None

    @property
    def name(self) -> str:
        """For tables."""
        rate = "" if self.rate is None else f"{self.rate:g}/s"
        clients = "" if self.clients is None else f"{self.clients} clients"
        return ", ".join(filter(None, (rate, clients))) or "all at once"

    def starts(self, count: int, dice: random.Random) -> Iterator[float]:
        """Seconds from the beginning at which requests are due: at random, as those of strangers."""
        at = 0.0
        for _ in range(count):
            yield at
            if self.rate is not None:
                at += dice.expovariate(self.rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked.

    input_words, output_tokens: of each request. pictures: new ones in each request, of `picture_size` pixels
    (width, height). prompts: asked in turn instead, each a list of OpenAI's content parts. exact: answers go
    on to `output_tokens` whatever the model says, which not all servers can do.
    """

    input_words: int = 512
    output_tokens: int = 128
    pictures: int = 0
    picture_size: tuple[int, int] = (640, 480)
    prompts: Sequence[Sequence[Mapping[str, Any]]] = ()
    exact: bool = True
    seed: int = 0

    def body(self, model: str, number: int) -> bytes:
        """The body of request `number`; the same for the same seed."""
        dice = random.Random(f"{self.seed}/{number}")
        if self.prompts:
            parts = list(self.prompts[number % len(self.prompts)])
        else:
            text = " ".join(dice.choices(WORDS, k=self.input_words))
            parts = [_noise(dice, self.picture_size) for _ in range(self.pictures)]
            parts.append({"type": "text", "text": f"{number}. {text}"})
        request = {
            "model": model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(request | ({"ignore_eos": True} if self.exact else {})).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One load's figures. Latencies are milliseconds: name -> percentile -> value.

    seconds: from the first sending to the last answer. late_ms: the longest that the sender was behind its
    schedule. goodput: answers a second that kept every limit of the SLO, `good_share` of all requests.
    """

    load: str
    requests: int
    failed: int
    seconds: float
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    latencies_ms: dict[str, dict[str, float]]
    late_ms: float
    goodput: float | None = None
    good_share: float | None = None
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything that was measured. server: what was asked, and as which model."""

    server: str
    model: str
    command: str
    workload: dict[str, Any]
    slo_ms: dict[str, float]
    rows: list[Row]


async def run(
    endpoint: Endpoint,
    loads: Sequence[Load],
    workload: Workload,
    *,
    requests: int,
    model: str | None = None,
    slo_ms: Mapping[str, float] | None = None,
    warm_up: int = 1,
    timeout_s: float = 600.0,
    command: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Result, list[list[Trace]]]:
    """Put a server under each load in turn. Raises ServerFailed if it does not even answer the warm-up.

    requests: of each load. slo_ms: limits for a request to count as good, by the names of SLO_NAMES. Returns
    the figures and, for each load, the requests behind them.
    """
    name = model or await _first_model(endpoint)
    numbers = iter(range(1 << 62))  # no prompt is sent twice, or a prefix cache would answer
    for _ in range(warm_up):
        trace = Trace(time.monotonic())
        await ask(endpoint, workload.body(name, next(numbers)), trace, timeout_s)
        if trace.error is not None:
            raise ServerFailed(f"The server does not answer as it should: {trace.error}")
    rows, all_traces = [], []
    for load in loads:
        tell(f"{load.name}: {requests} requests")
        bodies = [workload.body(name, next(numbers)) for _ in range(requests)]
        traces = await _put_under(endpoint, load, bodies, random.Random(workload.seed), timeout_s)
        rows.append(row_of(load, traces, slo_ms or {}))
        all_traces.append(traces)
    return (
        Result(
            server=f"{endpoint.host}:{endpoint.port}{endpoint.path}",
            model=name,
            command=command,
            workload={**asdict(workload), "prompts": len(workload.prompts)},
            slo_ms=dict(slo_ms or {}),
            rows=rows,
        ),
        all_traces,
    )


async def _first_model(endpoint: Endpoint) -> str:
    listed = await get(endpoint, "/models")
    try:
        return listed["data"][0]["id"]
    except (KeyError, IndexError, TypeError) as error:
        raise ServerFailed(f"{endpoint.path}/models names no model; send --model.") from error


async def _put_under(
    endpoint: Endpoint, load: Load, bodies: Sequence[bytes], dice: random.Random, timeout_s: float
) -> list[Trace]:
    seats = asyncio.Semaphore(load.clients or len(bodies))
    began = time.monotonic()

    async def one(trace: Trace, body: bytes) -> None:
        async with seats:
            if load.clients is not None:
                trace.due_s = time.monotonic()  # when a client is free
            await ask(endpoint, body, trace, timeout_s)

    traces, tasks = [], []
    for start, body in zip(load.starts(len(bodies), dice), bodies, strict=True):
        await asyncio.sleep(max(0.0, began + start - time.monotonic()))
        traces.append(Trace(began + start))
        tasks.append(asyncio.create_task(one(traces[-1], body)))
    await asyncio.gather(*tasks)
    return traces


def _noise(dice: random.Random, size: tuple[int, int]) -> dict[str, Any]:
    """A picture like no other: coarse noise, enlarged, so that it compresses like a photo."""
    from PIL import Image

    width, height = size
    small = (max(1, width // 16), max(1, height // 16))
    pixels = Image.frombytes("RGB", small, dice.randbytes(3 * small[0] * small[1]))
    file = io.BytesIO()
    pixels.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def read_prompts(path: Path) -> list[list[dict[str, Any]]]:
    """Prompts of a file: JSON lines of {"prompt": text, "images": [paths beside the file]}.

    Raises ConfigError naming the line.
    """
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            pictures = [_file_part(path.parent / name) for name in entry.get("images", ())]
            prompts.append([*pictures, {"type": "text", "text": str(entry["prompt"])}])
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ConfigError(
                f'{path}, line {number}: {error!r}. A line is like {{"prompt": "...", "images": ["a.png"]}}.'
            ) from error
    if not prompts:
        raise ConfigError(f"{path} holds no prompts.")
    return prompts


def _file_part(path: Path) -> dict[str, Any]:
    kind = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}.get(path.suffix.lower(), "png")
    url = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


# ---- figures


def row_of(load: Load, traces: Sequence[Trace], slo_ms: Mapping[str, float]) -> Row:
    """The figures of one load."""
    done = [trace for trace in traces if trace.error is None]
    errors: dict[str, int] = {}
    for trace in traces:
        if trace.error is not None:
            errors[trace.error] = errors.get(trace.error, 0) + 1
    seconds = max(trace.end_s for trace in traces) - min(trace.sent_s for trace in traces)
    good = sum(_is_good(trace, slo_ms) for trace in done)
    return Row(
        load=load.name,
        requests=len(traces),
        failed=len(traces) - len(done),
        seconds=seconds,
        requests_per_s=len(done) / seconds,
        input_tokens_per_s=sum(trace.prompt_tokens for trace in done) / seconds,
        output_tokens_per_s=sum(trace.completion_tokens for trace in done) / seconds,
        latencies_ms={name: percentiles(values) for name, values in latencies_ms(done).items()},
        late_ms=1e3 * max(trace.sent_s - trace.due_s for trace in traces),
        goodput=good / seconds if slo_ms else None,
        good_share=good / len(traces) if slo_ms else None,
        errors=errors,
    )


def latencies_ms(traces: Sequence[Trace]) -> dict[str, list[float]]:
    """Milliseconds by the names of LATENCIES, of the requests that were answered."""
    found = {
        "ttft": [trace.first_s for trace in traces],
        "tpot": [pace for trace in traces if (pace := trace.per_token_s) is not None],
        "itl": [gap for trace in traces for gap in trace.between_s],
        "e2e": [trace.total_s for trace in traces],
    }
    return {name: [1e3 * value for value in values] for name, values in found.items()}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the mean; nothing for no values. A percentile is a value that occurred."""
    if not values:
        return {}
    ranked = sorted(values)
    found = {f"p{share}": ranked[max(0, -(-share * len(ranked) // 100) - 1)] for share in SHARES}
    return {"mean": sum(ranked) / len(ranked), **found}


def _is_good(trace: Trace, slo_ms: Mapping[str, float]) -> bool:
    values = {"ttft": trace.first_s, "tpot": trace.per_token_s or 0.0, "e2e": trace.total_s}
    return all(1e3 * values[name] <= limit for name, limit in slo_ms.items())


def table(result: Result) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, header and rows for a terminal: a column for each load."""

    def line(name: str, cell: Callable[[Row], str]) -> tuple[str, ...]:
        return (name, *(cell(row) for row in result.rows))

    def latency(name: str, share: int) -> tuple[str, ...]:
        at = f"p{share}"
        found = [row.latencies_ms[name].get(at) for row in result.rows]
        return (f"{name} {at} ms", *("-" if value is None else f"{value:.1f}" for value in found))

    lines = [
        line("answered", lambda row: f"{row.requests - row.failed} of {row.requests}"),
        line("requests/s", lambda row: f"{row.requests_per_s:.2f}"),
        line("tokens/s in", lambda row: f"{row.input_tokens_per_s:.0f}"),
        line("tokens/s out", lambda row: f"{row.output_tokens_per_s:.0f}"),
        *(latency(name, share) for name in LATENCIES for share in SHARES),
    ]
    if result.slo_ms:
        lines.append(line("goodput, requests/s", lambda row: f"{row.goodput:.2f}"))
        lines.append(line("within the limits", lambda row: f"{row.good_share:.0%}"))
    header = ("", *(row.load for row in result.rows))
    return f"{result.model} at {result.server}", header, lines


def plot(result: Result, traces: Sequence[Sequence[Trace]], path: Path) -> None:
    """How the latencies are spread: a panel for each of them, a line for each load. Raises ConfigError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("The plot needs matplotlib: pip install 'gemcut[bench]'.") from None
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = figure.subplots(1, len(LATENCIES), sharey=True)
    for panel, (name, meaning) in zip(panels, LATENCIES.items(), strict=True):
        for row, of_load in zip(result.rows, traces, strict=True):
            values = sorted(latencies_ms([trace for trace in of_load if trace.error is None])[name])
            shares = [(i + 1) / len(values) for i in range(len(values))]
            panel.step(values, shares, where="post", label=row.load)
        if name in result.slo_ms:
            panel.axvline(result.slo_ms[name], color="0.5", linestyle=":", label="limit")
        panel.set(title=f"{name}: {meaning}", xlabel="ms", xlim=(0, None), ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of requests")
    panels[-1].legend(loc="lower right", fontsize="small")
    figure.suptitle(f"{result.model} at {result.server}", fontsize="medium")
    figure.savefig(path)
