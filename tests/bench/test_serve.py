"""The load on a server, measured on one whose times are known."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gemcut.bench import serve
from gemcut.bench.serve import Load, Workload
from gemcut.bench.serve_client import Endpoint, ServerFailed, Trace
from gemcut.demo import PICTURES
from gemcut.errors import ConfigError

FIRST_S, GAP_S, TOKENS = 0.03, 0.01, 4


class Clockwork:
    """A server that answers after FIRST_S, then a piece each GAP_S. bad: numbers of requests that fail."""

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.bad, self.bodies, self.most_inside, self.inside = bad, [], 0, 0
        self._numbers = itertools.count()

    async def __aenter__(self) -> Endpoint:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        return Endpoint.of(f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1/", "secret")

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Authorization: Bearer secret" in head
        if head.startswith(b"GET /v1/models "):
            body = json.dumps({"data": [{"id": "clockwork"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        else:
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            self.bodies.append(json.loads(await reader.readexactly(length)))
            self.inside += 1
            self.most_inside = max(self.inside, self.most_inside)
            await self._stream(writer, next(self._numbers))
            self.inside -= 1
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, number: int) -> None:
        if number in self.bad:
            body = b'{"error": {"message": "no room"}}'
            writer.write(b"HTTP/1.1 503 Full\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            return
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        self._chunk(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(TOKENS):
            await asyncio.sleep(GAP_S if i else FIRST_S)
            self._chunk(writer, {"choices": [{"delta": {"content": "naïve "}}]})
        usage = {"prompt_tokens": 7, "completion_tokens": TOKENS}
        self._chunk(writer, {"choices": [], "usage": usage})
        data = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))

    def _chunk(self, writer: asyncio.StreamWriter, payload: Any) -> None:
        """An event, cut where no line ends."""
        data = f"data: {json.dumps(payload, ensure_ascii=False)}\n\n".encode()
        for piece in (data[:9], data[9:]):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))


def measure(server: Clockwork, *loads: Load, **given: Any) -> tuple[serve.Result, list[list[Trace]]]:
    async def run() -> tuple[serve.Result, list[list[Trace]]]:
        async with server as endpoint:
            workload = given.pop("workload", Workload(input_words=5, output_tokens=4))
            return await serve.run(endpoint, loads, workload, **{"requests": 12, **given})

    return asyncio.run(run())


def test_the_figures_are_the_servers() -> None:
    server = Clockwork()
    result, _ = measure(server, Load(clients=3), slo_ms={"ttft": 1e4, "e2e": 1e4})
    (row,) = result.rows
    assert (result.model, row.load) == ("clockwork", "3 clients")
    assert (row.requests, row.failed, row.errors) == (12, 0, {})
    assert server.most_inside == 3
    found = row.latencies_ms
    # not below what the server slept; how far above is the machine's business
    assert 30 <= found["ttft"]["p50"] < 200
    assert 10 <= found["tpot"]["p50"] < 200
    assert 8 <= found["itl"]["p50"] < 200
    assert 60 <= found["e2e"]["p50"] < 500
    assert row.output_tokens_per_s == pytest.approx(12 * TOKENS / row.seconds)
    assert row.input_tokens_per_s == pytest.approx(12 * 7 / row.seconds)
    assert row.goodput == pytest.approx(row.requests_per_s)
    assert row.good_share == 1


def test_a_limit_that_no_answer_keeps() -> None:
    (row,) = measure(Clockwork(), Load(clients=2), slo_ms={"ttft": 20})[0].rows
    assert (row.goodput, row.good_share) == (0, 0)


def test_failures_are_counted_and_told() -> None:
    (row,) = measure(Clockwork(bad=[3, 5]), Load(clients=2), slo_ms={"e2e": 1e4})[0].rows
    assert row.failed == 2
    assert row.errors == {"503: no room": 2}
    assert row.good_share == pytest.approx(10 / 12)


def test_a_rate_is_kept_whether_answers_come_or_not() -> None:
    server = Clockwork()
    (row,) = measure(server, Load(rate=200.0), requests=30)[0].rows
    assert server.most_inside > 3
    starts = list(Load(rate=200.0).starts(2000, random.Random(0)))
    assert starts[-1] == pytest.approx(10, rel=0.1)
    assert starts == sorted(starts)
    assert row.late_ms < 500


def test_no_prompt_is_sent_twice_and_a_seed_repeats_them() -> None:
    workload = Workload(input_words=20, output_tokens=3, pictures=1, picture_size=(64, 48))
    server, again = Clockwork(), Clockwork()
    for one in (server, again):
        measure(one, Load(clients=1), Load(clients=4), workload=workload, requests=5)
    texts = [json.dumps(body) for body in server.bodies]
    assert len(set(texts)) == 11  # with the warm-up
    assert sorted(texts) == sorted(json.dumps(body) for body in again.bodies)
    picture, text = server.bodies[0]["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert len(text["text"].split()) == 21  # its number before it
    assert server.bodies[0]["ignore_eos"] is True
    assert "ignore_eos" not in json.loads(Workload(exact=False).body("m", 0))


def test_prompts_of_a_file(tmp_path: Path) -> None:
    picture = PICTURES / "sign.png"
    (tmp_path / "a.png").write_bytes(picture.read_bytes())
    lines = [{"prompt": "Read.", "images": ["a.png"]}, {"prompt": "Hi."}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    prompts = serve.read_prompts(file)
    assert [part["type"] for part in prompts[0]] == ["image_url", "text"]
    assert json.loads(Workload(prompts=prompts).body("m", 3))["messages"][0]["content"] == prompts[1]
    for wrong in ('{"prompt": 1', '{"images": []}', '{"prompt": "x", "images": ["none.png"]}', "[]"):
        file.write_text(f'{{"prompt": "x"}}\n{wrong}')
        with pytest.raises(ConfigError, match="line 2"):
            serve.read_prompts(file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no prompts"):
        serve.read_prompts(file)


def test_percentiles_are_values_that_occurred() -> None:
    assert serve.percentiles([]) == {}
    assert serve.percentiles([5.0]) == {"mean": 5, "p50": 5, "p90": 5, "p99": 5}
    found = serve.percentiles([float(i) for i in range(100, 0, -1)])
    assert found == {"mean": 50.5, "p50": 50, "p90": 90, "p99": 99}


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    result, traces = measure(Clockwork(), Load(clients=2), Load(rate=100), slo_ms={"ttft": 50})
    serve.plot(result, traces, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    title, header, rows = serve.table(result)
    assert "clockwork" in title
    assert header == ("", "2 clients", "100/s")
    assert rows[0] == ("answered", "12 of 12", "12 of 12")
    assert {"ttft p50 ms", "itl p99 ms", "within the limits"} <= {row[0] for row in rows}
    assert all(len(row) == len(header) for row in rows)


def test_servers_that_are_none() -> None:
    with pytest.raises(ServerFailed, match="does not answer"):
        asyncio.run(
            serve.run(Endpoint.of("http://127.0.0.1:9/v1"), [Load(clients=1)], Workload(), requests=1)
        )
    with pytest.raises(ServerFailed, match="503: no room"):
        measure(Clockwork(bad=[0]), Load(clients=1))
    for url in ("127.0.0.1:8000", "ftp://x/v1", "http://", "http://x:99999/v1"):
        with pytest.raises(ConfigError, match="base_url"):
            Endpoint.of(url)
    assert Endpoint.of("https://x.example/v1/").port == 443
