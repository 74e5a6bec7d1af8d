"""What the front end costs: the same questions answered by `LLM` in this process and by a server over HTTP.

`python -m gemcut.bench.overhead` is the server's process. Both sides have an engine with the same settings
and take turns on one machine; each round asks what none before it did. The clients run in this process, so
what they cost counts against HTTP; how much that is, the record says.

Answers may not end before their length is reached: every token has text, and is an event.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gemcut.bench.contender import Setup
from gemcut.bench.records import Record, Table, ms, percent
from gemcut.bench.serve import Workload
from gemcut.bench.serve_client import Endpoint, ServerFailed, Trace, ask
from gemcut.bench.throughput import machine
from gemcut.bench.timing import Times
from gemcut.config import EngineConfig
from gemcut.errors import ConfigError, GemcutError
from gemcut.llm import LLM, open_files
from gemcut.outputs import Delta
from gemcut.runner.start import choose_device
from gemcut.sampling import SamplingParams
from gemcut.server.main import loop_factory

MODEL = "bench"  # what the server calls it
ANSWER_S = 600.0
POLL_S = 0.05
FIRST_TOKENS = 20  # answers of one stream in each round
FIRST_NEW = 4  # tokens of such an answer
RATE, FIRST = "new tokens/s", "first token ms"
Pair = tuple[float, float]  # in this process, through HTTP


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure on both sides. streams: answers at a time. ratio and added: HTTP's over and less this
    process's, pair by pair, as what slows the machine slows both."""

    figure: str
    streams: int
    pairs: int
    in_process: Times
    http: Times
    ratio: Times
    added: Times

    @classmethod
    def of(cls, figure: str, streams: int, pairs: Sequence[Pair]) -> Row:
        return cls(
            figure=figure,
            streams=streams,
            pairs=len(pairs),
            in_process=Times.of([ours for ours, _ in pairs]),
            http=Times.of([theirs for _, theirs in pairs]),
            ratio=Times.of([theirs / ours for ours, theirs in pairs]),
            added=Times.of([theirs - ours for ours, theirs in pairs]),
        )


class InProcess:
    """`LLM`, from conversations to texts."""

    def __init__(self, config: EngineConfig) -> None:
        self._llm = LLM(**asdict(config))

    def tokens_per_s(self, bodies: Sequence[bytes], new: int) -> float:
        conversations = [json.loads(body)["messages"] for body in bodies]
        began = time.perf_counter()
        outputs = self._llm.chat(conversations, _params(new), use_tqdm=False)
        seconds = time.perf_counter() - began
        return _expect(sum(output.usage.completion_tokens for output in outputs), len(bodies) * new) / seconds

    def first_token_ms(self, body: bytes) -> float:
        """From the conversation to the first text of its answer, which then goes on to its end."""
        messages = json.loads(body)["messages"]
        began, first = time.perf_counter(), None
        for news in self._llm.stream(self._llm.files.chat_prompt(messages), _params(FIRST_NEW)):
            if first is None and isinstance(news, Delta) and (news.text or news.reasoning):
                first = time.perf_counter() - began
        if first is None:
            raise GemcutError("An answer has no text, so there is no first token to wait for.")
        return 1e3 * first


class OverHttp:
    """A server in a process of its own, until the `with` ends. Raises GemcutError if it does not start."""

    def __init__(self, config: EngineConfig) -> None:
        # a file: a pipe that nobody reads would fill
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gemcut.bench.overhead", json.dumps(asdict(config))],
            stdin=subprocess.DEVNULL,
            stderr=self._log,
        )
        self._clients = asyncio.Runner(loop_factory=loop_factory())
        self._clients_s = 0.0  # of CPU time
        self._num_tokens = 0

    def __enter__(self) -> Self:
        try:
            self._endpoint = Endpoint.of(f"http://127.0.0.1:{self._port()}/v1")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def tokens_per_s(self, bodies: Sequence[bytes], new: int) -> float:
        began = time.process_time()
        traces = self._clients.run(self._ask(bodies))
        self._clients_s += time.process_time() - began
        self._num_tokens += len(bodies) * new
        seconds = max(trace.end_s for trace in traces) - min(trace.sent_s for trace in traces)
        return _expect(sum(trace.completion_tokens for trace in traces), len(bodies) * new) / seconds

    @property
    def client_us(self) -> float:
        """CPU time that the clients took for a token, reading the answers included."""
        return 1e6 * self._clients_s / self._num_tokens

    def first_token_ms(self, body: bytes) -> float:
        """From before the connection to the first event with text."""
        (trace,) = self._clients.run(self._ask([body]))
        return 1e3 * trace.first_s

    async def _ask(self, bodies: Sequence[bytes]) -> list[Trace]:
        traces = [Trace(time.monotonic()) for _ in bodies]
        pairs = zip(bodies, traces, strict=True)
        await asyncio.gather(*(ask(self._endpoint, body, trace, ANSWER_S) for body, trace in pairs))
        for trace in traces:
            if trace.error is not None:
                raise ServerFailed(f"The server does not answer as it should: {trace.error}")
        return traces

    def _port(self) -> int:
        """The port, once the server listens."""
        while True:
            ended = self._process.poll() is not None  # before the log is read, which then is whole
            lines = Path(self._log.name).read_text().splitlines()
            for line in lines:
                if '"listening"' in line:
                    return json.loads(line)["port"]
            if ended:
                raise GemcutError(f"The server did not start: {lines[-1] if lines else 'it said nothing'}")
            time.sleep(POLL_S)

    def _close(self) -> None:
        self._clients.close()
        self._process.terminate()
        self._process.wait()
        self._log.close()


def run(
    setup: Setup,
    *,
    streams: int,
    words: int,
    new: int,
    rounds: int,
    command: str,
    records: Path | None,
    tell: Callable[[str], None],
) -> tuple[Record, list[Table]]:
    """Measure both sides by turns; write the record, return it with its table.

    streams: answers at a time. words, new: of each prompt; tokens of its answer. Raises GemcutError if a side
    does not start or does not answer.
    """
    device, _ = choose_device(setup.config.device)
    if device.type == "cuda" and setup.config.kv_bytes is None:
        raise ConfigError(
            "kv_bytes is needed: two engines share this GPU, and one would take all its memory."
        )
    facts = {
        **setup.facts(),
        "words": words,
        "new_tokens": new,
        "rounds": rounds,
        "machine": machine(),  # with its load before the engines start
    }
    results, client_us = measure(
        setup.config, streams=streams, words=words, new=new, rounds=rounds, tell=tell
    )
    note = f"the clients run on the same cores and count against HTTP: {client_us:.0f} us of CPU a token"
    record = Record.of("overhead", device, None, results, command=command, facts=facts, notes=[note])
    if records is not None:
        tell(f"written to {record.write(records)}")
    return record, [table(record.results)]


def measure(
    config: EngineConfig, *, streams: int, words: int, new: int, rounds: int, tell: Callable[[str], None]
) -> tuple[list[Row], float]:
    """Rounds of `streams` answers at a time and of FIRST_TOKENS one by one, by both sides, another one first
    each time. The round before the first warms up. Also returns the clients' CPU time a token in us."""
    many = Workload(input_words=words, output_tokens=new, exact=False)
    single = Workload(input_words=words, output_tokens=FIRST_NEW, exact=False, seed=1)
    rates: list[Pair] = []
    firsts: list[Pair] = []
    here = InProcess(config)
    with OverHttp(config) as there:
        for number in range(rounds + 1):
            bodies = [_body(many, number * streams + index) for index in range(streams)]
            rates.append(
                _pair(
                    number,
                    lambda bodies=bodies: here.tokens_per_s(bodies, new),
                    lambda bodies=bodies: there.tokens_per_s(bodies, new),
                )
            )
            for index in range(number * FIRST_TOKENS, (number + 1) * FIRST_TOKENS):
                body = _body(single, index)
                firsts.append(
                    _pair(
                        index,
                        lambda body=body: here.first_token_ms(body),
                        lambda body=body: there.first_token_ms(body),
                    )
                )
            tell(
                f"round {number}: {rates[-1][0]:,.0f} tokens/s in this process, {rates[-1][1]:,.0f} over HTTP"
            )
        client_us = there.client_us
    return [Row.of(RATE, streams, rates[1:]), Row.of(FIRST, 1, firsts[FIRST_TOKENS:])], client_us


def _pair(number: int, here: Callable[[], float], there: Callable[[], float]) -> Pair:
    gc.collect()
    if number % 2:
        theirs = there()
        return here(), theirs
    return here(), there()


def _body(workload: Workload, number: int) -> bytes:
    """A request whose answer may not end early. Where the end is merely ignored, the demo says it again and
    again: a token without text, for which nothing is sent."""
    request = json.loads(workload.body(MODEL, number))
    return json.dumps(request | {"min_tokens": workload.output_tokens}).encode()


def _params(new: int) -> SamplingParams:
    """What `_body` asks of a server."""
    return SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new)


def _expect(got: int, wanted: int) -> int:
    if got != wanted:
        raise GemcutError(f"{got} tokens came where {wanted} were asked for.")
    return got


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    header = ("figure", "streams", "in process", "over HTTP", "ratio", "p20", "p80", "added", "pairs")

    def cells(r: Mapping[str, Any]) -> tuple[str, ...]:
        number: Callable[[float], str] = ms if r["figure"] == FIRST else "{:,.0f}".format
        return (
            *(r["figure"], str(r["streams"]), number(r["in_process"]["median"]), number(r["http"]["median"])),
            *(percent(r["ratio"][name]) for name in ("median", "p20", "p80")),
            *(number(r["added"]["median"]), str(r["pairs"])),
        )

    return Table("The front end beside LLM in one process", header, [cells(r) for r in results])


def main() -> int:
    """The server: argv holds its engine's settings. Returns the exit status."""
    from gemcut.server.main import serve
    from gemcut.server.settings import ServerConfig

    config = EngineConfig(**json.loads(sys.argv[1]))
    files = open_files(config)
    engine = replace(config, model=str(files.folder))
    return serve(engine, ServerConfig(port=0, served_model_names=(MODEL,)), files)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GemcutError as error:
        sys.exit(str(error))
