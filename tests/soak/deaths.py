"""Figure 7: the engine is killed under load; every open stream is told within 1 s, and it comes back."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time

from server_rig import Server

from soak.soak_rig import Answer, Client, Figure, missed, run_client

STREAMS = 8
TOLD_S, NOT_READY_S, BACK_S = 1.0, 1.0, 10.0


def run(count: int, seed: int = 0) -> Figure:
    """`count` deaths of the demo's engine."""
    with Server.scripted(module="gemcut.server.engine_main", watch={"most_deaths": 10**6}) as server:
        return run_client(_run(server, count, random.Random(seed)))


async def _run(server: Server, count: int, rng: random.Random) -> Figure:
    told, not_ready, back = [], [], []
    lies = 0
    for _ in range(count):
        clients = [Client(server.port) for _ in range(STREAMS)]
        asked = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "max_tokens": 3000}
        streams = [asyncio.create_task(client.chat(**asked, stream=True)) for client in clients]
        await asyncio.sleep(0.2 + rng.random() * 0.5)
        os.kill(server.engine_pid, signal.SIGKILL)
        killed = time.monotonic()
        probing = asyncio.create_task(_until_status(server.port, 503))
        answers = await asyncio.gather(*streams)
        told.append(time.monotonic() - killed)
        not_ready.append(await probing - killed)
        lies += sum(not _tells(answer) for answer in answers)
        back.append(await _until_status(server.port, 200) - killed)
        for client in clients:
            client.close()
    return Figure(
        7,
        f"{count} deaths under {STREAMS} streams: all told within {max(told):.2f} s, /ready 503 within "
        f"{max(not_ready):.2f} s, back within {max(back):.2f} s; {lies} streams ended without an error",
        missed(
            told_within_1_s=max(told) <= TOLD_S,
            not_ready_within_1_s=max(not_ready) <= NOT_READY_S,
            back_within_10_s=max(back) <= BACK_S,
            no_stream_pretends_to_be_whole=lies == 0,
        ),
    )


async def _until_status(port: int, status: int) -> float:
    """When /ready first said so."""
    client = Client(port)
    while (await client.ask("/ready")).status != status:
        await asyncio.sleep(0.02)
    client.close()
    return time.monotonic()


def _tells(answer: Answer) -> bool:
    """Whether an answer says that it was broken off: an error event at its end, or a 503."""
    if answer.status == 503:
        return json.loads(answer.body)["error"]["code"] in ("engine_died", "not_ready")
    lines = [line for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    return bool(lines) and not answer.is_whole and '"engine_died"' in lines[-1]
