"""Figure 8: SIGTERM lets those in flight finish and turns others away; a second one leaves nothing."""

from __future__ import annotations

import asyncio
import random
import signal
import time

from server_rig import Server, until

from soak.soak_rig import Client, Figure, descendants, missed, run_client, said

STREAMS, TOKENS = 16, 60


def run(count: int, seed: int = 0) -> Figure:
    """`count` servers, every second one told twice."""
    rng = random.Random(seed)
    lost = late = leaked = 0
    refused_s = []
    for number in range(count):
        with Server.scripted(step_s=0.01, config={"drain_s": 20.0}) as server:
            family = descendants(server.process.pid)
            is_hurried = number % 2 == 1
            whole, refusal_s, is_refused = run_client(_round(server, rng.random() * 0.4, is_hurried))
            refused_s.append(refusal_s)
            lost += 0 if is_hurried else STREAMS - whole
            late += not is_refused
            until(lambda: server.process.poll() is not None, 10.0, server.log)
            leaked += server.process.returncode != 0
            until(lambda pids=family: not any(map(_is_there, pids)), 5.0)  # type: ignore[misc]
    return Figure(
        8,
        f"{count} drains: {lost} streams lost, new requests turned away within {max(refused_s) * 1e3:.0f} ms "
        "of the signal; no process left behind by a second signal",
        missed(
            none_lost=lost == 0,
            new_ones_refused_at_once=late == 0 and max(refused_s) < 1.0,
            all_ended_well=leaked == 0,
        ),
    )


async def _round(server: Server, wait_s: float, is_hurried: bool) -> tuple[int, float, bool]:
    """How many streams were whole, how long until a new request was refused, and whether with 503."""
    clients = [Client(server.port) for _ in range(STREAMS)]
    asked = said("long", max_tokens=TOKENS, stream=True)
    streams = [asyncio.create_task(client.chat(**asked)) for client in clients]
    # all are inside; then the signal comes at any phase of their answers
    await asyncio.sleep(0.15 + wait_s)
    newcomer = Client(server.port)
    signalled = time.monotonic()
    server.signal(signal.SIGTERM)
    while True:
        answer = await newcomer.chat(**said("hello", max_tokens=1))
        if answer.status != 200 or time.monotonic() - signalled > 5:
            break
    refusal_s = time.monotonic() - signalled
    if is_hurried:
        server.signal(signal.SIGTERM)
    answers = await asyncio.gather(*streams)
    for client in (*clients, newcomer):
        client.close()
    return sum(answer.is_whole for answer in answers), refusal_s, answer.status == 503


def _is_there(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False
