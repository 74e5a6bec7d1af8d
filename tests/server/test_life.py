"""The server's life: what happens when the engine dies, hangs or is asked to stop."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_rig import DATA_URI, ROOT, Server, read_all, until

from gemcut.config import EngineConfig
from gemcut.demo import CHECKPOINT
from gemcut.engine.loop import Job
from gemcut.engine.model_files import ModelFiles
from gemcut.sampling import SamplingParams
from gemcut.server.engine_client import EngineClient, EngineDied, Watch
from gemcut.server.errors import TABLE


def events(raw: bytes) -> list[str]:
    return [line[6:] for line in raw.decode().split("\n") if line.startswith("data: ")]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_engine_ends_streams_with_an_error_and_comes_back(demo: Server) -> None:
    """Figure 7 of the reliability rules, once, with the demo model under load."""
    streams = [demo.open_stream("x", ignore_eos=True, max_tokens=3000) for _ in range(8)]
    for stream in streams:
        assert stream.recv(64, 0x02)  # MSG_PEEK: it has begun
    os.kill(demo.engine_pid, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: demo.get("/ready").status == 503, 1.0)
    raws = [read_all(stream) for stream in streams]
    assert time.monotonic() - killed < 1.0
    for raw in raws:
        last = json.loads(events(raw)[-1])
        assert last["error"]["code"] == "engine_died"
        assert "[DONE]" not in events(raw)
    refused = demo.chat("x")
    assert refused.status == 503
    assert refused.error["code"] == "not_ready"
    assert int(refused.headers["retry-after"]) >= 1
    assert demo.get("/live").status == 200
    until(lambda: demo.get("/ready").status == 200, 30.0, demo.log)
    assert demo.chat("x", max_tokens=2).status == 200
    assert b"gemcut:engine_restarts_total" in demo.get("/metrics").body


def test_an_engine_that_crashes_takes_no_request_twice() -> None:
    watch = {"most_deaths": 3}
    with Server.scripted(watch=watch) as server:
        pids = {server.engine_pid}
        for _ in range(2):
            reply = server.chat("crash")
            assert reply.status == 503
            assert reply.error["code"] == "engine_died"
            assert int(reply.headers["retry-after"]) >= 1
            until(lambda: server.get("/ready").status == 200, 20.0)
            pids.add(server.engine_pid)
        assert len(pids) == 3
        assert server.chat("hello").status == 200
        assert {line["reason"] for line in server.lines("the engine died")} == {
            "crash: RuntimeError: the device is gone"
        }
        # the third death within the time is one too many
        server.chat("crash")
        assert server.process.wait(10) == 1


def kills(server: Server) -> dict[str, float]:
    """Processes that were killed, by cause."""
    families = text_string_to_metric_families(server.get("/metrics").body.decode())
    (found,) = (family for family in families if family.name == "gemcut:engine_kills")
    return {sample.labels["cause"]: sample.value for sample in found.samples}


def test_a_step_that_does_not_end_is_noticed() -> None:
    with Server.scripted(watch={"step_s": 0.5, "ping_s": 0.1}, step_s=0.02) as server:
        assert kills(server) == {"step": 0, "silence": 0}
        beside = server.open_stream("long")
        assert beside.recv(64, 0x02)  # MSG_PEEK: it has begun
        began = time.monotonic()
        hung = server.open_stream("hang")
        until(lambda: server.get("/ready").status == 503, 2.0)
        said = events(read_all(beside))
        assert json.loads(said[-1])["error"]["code"] == "engine_died"
        assert "[DONE]" not in said
        head, _, body = read_all(hung).partition(b"\r\n\r\n")  # no event of it had been sent
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body)["error"]["code"] == "engine_died"
        assert 0.5 < time.monotonic() - began < 1.5  # the limit, and a second
        until(lambda: server.get("/ready").status == 200, 20.0)
        assert server.chat("hello").status == 200
        assert kills(server) == {"step": 1, "silence": 0}
        (line,) = server.lines("the engine died")
        assert line["exit_status"] == -signal.SIGKILL
        assert "a step has been going on for" in line["reason"]


def test_an_engine_that_is_idle_or_slow_is_left_alone() -> None:
    watch = {"step_s": 0.6, "silence_s": 0.6, "ping_s": 0.1}
    with Server.scripted(watch=watch, step_s=0.25) as server:
        time.sleep(0.8)
        assert server.chat("long", max_tokens=4).status == 200  # 1 s, no step of which takes 0.6
        assert kills(server) == {"step": 0, "silence": 0}
        assert len(server.lines("the engine is ready")) == 1


def test_without_a_limit_a_step_may_take_its_time() -> None:
    with Server.scripted(watch={"step_s": 0, "ping_s": 0.1}) as server:
        stream = server.open_stream("hang")
        time.sleep(0.5)
        assert server.get("/ready").status == 200
        assert kills(server) == {"step": 0, "silence": 0}
        os.kill(server.engine_pid, signal.SIGKILL)  # nothing else ends it
        read_all(stream)


def test_those_who_wait_do_not_wait_for_a_process_that_cannot_be_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A driver may hold a process for as long as its GPU hangs."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(Path(__file__).parent))))
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", lambda process: None)
    prompt = ModelFiles.open(CHECKPOINT).chat_prompt([{"role": "user", "content": "script:hang"}])
    job = Job(request_id="hung", prompt=prompt, params=SamplingParams())
    watch = Watch(step_s=0.3, ping_s=0.05, end_s=0.1)

    async def hang() -> None:
        config = EngineConfig(model=str(CHECKPOINT))
        client = EngineClient(config, max_waiting=4, watch=watch, module="scripted_engine")
        await client.start()
        held = client.pid
        assert held is not None
        began = time.monotonic()
        with pytest.raises(EngineDied):
            await client.submit(job, streamed=True).next()
        assert time.monotonic() - began < 0.3 + 1.0
        async with asyncio.timeout(20):
            while not client.is_ready:
                await asyncio.sleep(0.02)
        assert client.pid != held
        assert is_running(held)
        os.kill(held, signal.SIGKILL)
        await client.close()

    asyncio.run(hang())


def test_a_stopped_process_is_noticed() -> None:
    with Server.scripted(watch={"silence_s": 0.5, "ping_s": 0.1}) as server:
        os.kill(server.engine_pid, signal.SIGSTOP)
        until(lambda: server.get("/ready").status == 503, 2.0)
        until(lambda: server.get("/ready").status == 200, 20.0)
        assert kills(server) == {"step": 0, "silence": 1}


def test_sigterm_lets_those_in_flight_finish() -> None:
    with Server.scripted(step_s=0.01, config={"drain_s": 20.0}) as server:
        streams = [server.open_stream("long", max_tokens=150) for _ in range(4)]
        for stream in streams:
            assert stream.recv(64, 0x02)
        server.signal()
        until(lambda: server.lines("draining"), 1.0)
        refused = server.chat("hello")
        assert refused.status == 503
        assert "shutting down" in refused.error["message"]
        assert server.get("/ready").json == {"status": "draining"}
        raws = [read_all(stream) for stream in streams]
        assert all(events(raw)[-1] == "[DONE]" for raw in raws)
        assert all('"finish_reason":"length"' in events(raw)[-2] for raw in raws)
        engine = server.engine_pid
        assert server.process.wait(5) == 0
        assert not is_running(engine)


def test_what_is_not_done_in_time_ends_in_an_error() -> None:
    with Server.scripted(step_s=0.01, config={"drain_s": 0.3}) as server:
        stream = server.open_stream("long", max_tokens=4000)
        assert stream.recv(64, 0x02)
        server.signal()
        raw = read_all(stream)
        assert json.loads(events(raw)[-1])["error"]["code"] == "engine_died"
        assert server.process.wait(5) == 0


def test_a_second_sigterm_ends_it_at_once_and_leaves_nothing() -> None:
    with Server.scripted(step_s=0.01) as server:
        stream = server.open_stream("long", max_tokens=4000)
        assert stream.recv(64, 0x02)
        engine = server.engine_pid
        server.signal()
        until(lambda: server.lines("draining"), 1.0)
        assert server.process.poll() is None
        server.signal()
        assert json.loads(events(read_all(stream))[-1])["error"]["code"] == "engine_died"
        assert server.process.wait(3) == 0
        assert not is_running(engine)


def test_the_engine_ends_with_a_front_end_that_is_killed() -> None:
    with Server.scripted() as server:
        engine = server.engine_pid
        server.signal(signal.SIGKILL)
        server.process.wait(5)
        until(lambda: not is_running(engine), 5.0)


def test_what_fails_for_one_request_ends_that_one(scripted: Server) -> None:
    engine = scripted.engine_pid
    beside = scripted.open_stream("long", max_tokens=300)
    for script, told in (
        ("failing", "the logits are not finite"),
        ("poison", "its answer could not be read"),
    ):
        reply = scripted.chat(script, n=2)
        assert reply.status == 500
        assert reply.error["code"] == "model_failed"
        assert told in reply.error["message"]
        last = scripted.chat(script, stream=True).events()[-1]
        assert told in last["error"]["message"]
    assert events(read_all(beside))[-1] == "[DONE]"
    assert scripted.engine_pid == engine


def test_a_client_that_goes_away_ends_its_request(scripted: Server) -> None:
    def running() -> float:
        (line,) = [
            line
            for line in scripted.get("/metrics").body.decode().splitlines()
            if line.startswith("gemcut:num_requests_running{")
        ]
        return float(line.split()[-1])

    streams = [scripted.open_stream("long") for _ in range(5)]
    until(lambda: running() == 5, 5.0)
    for stream in streams:
        stream.close()
    took = until(lambda: running() == 0, 5.0)
    assert took < 2.0


def test_a_storm_of_clients_that_go_away_leaves_nothing(scripted: Server) -> None:
    """Figure 3, small: 400 aborts at random phases; pages, slots and descriptors are back within 2 s."""

    def held() -> list[float]:
        lines = scripted.get("/metrics").body.decode().splitlines()
        names = ("num_requests_running{", "num_requests_waiting{", "kv_cache_usage_perc{")
        return [
            float(line.split()[-1]) for line in lines if line.startswith(tuple(f"gemcut:{n}" for n in names))
        ]

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (scripted.process.pid, scripted.engine_pid)]

    picture = {"type": "image_url", "image_url": {"url": DATA_URI}}
    content = [picture, picture, {"type": "text", "text": "script:long"}]  # two: both media workers have one
    with_picture = [{"role": "user", "content": content}]
    for _ in range(3):  # the media workers are there
        body = {"messages": with_picture, "max_tokens": 1}
        assert scripted.post("/v1/chat/completions", body).status == 200
    until(lambda: held() == [0, 0, 0], 5.0)
    before = descriptors()
    rng = random.Random(0)
    for _ in range(400):
        more = {"messages": with_picture} if rng.random() < 0.2 else {}
        stream = scripted.open_stream(rng.choice(["long", "hello", "call"]), **more)
        time.sleep(rng.choice([0, 0, 0.001, 0.005, 0.01]))
        stream.close()
    until(lambda: held() == [0, 0, 0], 2.0)
    until(lambda: all(now <= then for now, then in zip(descriptors(), before, strict=True)), 2.0)
    assert scripted.chat("hello").status == 200


def test_the_command_says_why_it_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, code, said in (
            (["--port", str(taken.getsockname()[1])], 1, "Cannot listen on 127.0.0.1 port"),
            (["--api-key", "short"], 2, "8 or more"),
            (["--api-key-file", str(tmp_path / "none")], 2, "cannot be read"),
            (["--api-key-file", str(tmp_path / "empty")], 2, "holds no key"),
            (["--max-num-seqs", "0"], 2, "--max-num-seqs"),
            (["--step-seconds", "-1"], 2, "--step-seconds must be 0"),
            ([str(tmp_path)], 1, "config.json"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "gemcut.cli", "serve", *flags],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert (done.returncode, said in done.stderr) == (code, True), (flags, done)
            assert "Traceback" not in done.stderr


def test_an_answer_that_takes_too_long_is_an_error() -> None:
    with Server.scripted(step_s=0.01, config={"request_s": 0.5}) as server:
        whole = server.chat("long")
        assert whole.status == 504
        assert whole.error["code"] == "timeout"
        streamed = server.chat("long", stream=True).events()
        assert streamed[-1]["error"]["code"] == "timeout"
        assert len(streamed) > 10


def test_every_error_class_has_its_row() -> None:
    from gemcut import errors as shared
    from gemcut.server import errors

    def below(kind: type) -> list[type]:
        return [kind, *(k for child in kind.__subclasses__() for k in below(child))]

    ours = [k for k in below(shared.GemcutError) if k.__module__ in (errors.__name__, shared.__name__)]
    missing = [k for k in ours if k not in TABLE and k not in (shared.ConfigError, shared.CheckpointError)]
    assert missing == []
