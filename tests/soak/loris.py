"""Figure 13: a thousand connections that send a byte now and then slow nobody down.

`python -m soak.loris PORT CONNECTIONS` makes them, in a process of its own, until it is ended.
"""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import time

from server_rig import Server, until

from soak.soak_rig import Client, Figure, descriptors, missed, percentile, run_client, said

TOKENS, STEP_S = 20, 0.01
BYTE_S, HEAD_S = 2.5, 10.0  # between two bytes; what the server gives a head
MOST_RISE = 0.10


def run(seconds: float, connections: int = 1000) -> Figure:
    """Good requests for `seconds` alone, then as long beside the connections."""
    with Server.scripted(step_s=STEP_S, config={"head_s": HEAD_S}) as server:
        run_client(_good(server.port, 1.0))
        alone = run_client(_good(server.port, seconds))
        quiet = descriptors(server.process.pid)
        command = [sys.executable, "-m", "soak.loris", str(server.port), str(connections)]
        paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, env=os.environ | paths) as slow:
            try:
                until(lambda: descriptors(server.process.pid) > quiet + 0.9 * connections, 20.0)
                beside = run_client(_good(server.port, seconds))
                held = descriptors(server.process.pid) - quiet
            finally:
                slow.kill()
    was, now = percentile(alone, 0.99), percentile(beside, 0.99)
    return Figure(
        13,
        f"p99 of good requests {1e3 * was:.0f} ms alone, {1e3 * now:.0f} ms beside {connections:,} slow "
        f"connections ({100 * (now / was - 1):+.1f} %)",
        missed(
            p99_rises_less_than_10_percent=now < was * (1 + MOST_RISE),
            they_were_there=held > connections / 2,
        ),
    )


async def _good(port: int, seconds: float) -> list[float]:
    """How long each took, by 8 callers."""
    end = time.monotonic() + seconds
    took: list[float] = []

    async def caller() -> None:
        client = Client(port)
        while time.monotonic() < end:
            answer = await client.chat(**said("long", max_tokens=TOKENS))
            assert answer.status == 200, answer
            took.append(answer.seconds)
        client.close()

    await asyncio.gather(*(caller() for _ in range(8)))
    return took


async def attack(port: int, connections: int) -> None:
    """Heads that never end, byte by byte; again when the server has had enough."""

    async def one(number: int) -> None:
        await asyncio.sleep(BYTE_S * number / connections)
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx: ")
            ended = asyncio.create_task(reader.read())
            while not ended.done():
                writer.write(b"x")
                await asyncio.wait({ended}, timeout=BYTE_S)
            await asyncio.gather(ended, return_exceptions=True)
            writer.transport.abort()

    await asyncio.gather(*map(one, range(connections)))


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(attack(*map(int, sys.argv[1:])))
