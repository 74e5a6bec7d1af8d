"""Figure 3: clients that go away at any moment leave nothing behind; pages are counted at each step."""

from __future__ import annotations

import asyncio
import json
import random

from server_rig import DATA_URI, Server, until

from soak.soak_rig import CHAT, Client, Figure, descriptors, gauge, missed, run_client, said, threads

HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
BACK_S = 2.0


def run(count: int, seed: int = 0) -> Figure:
    """`count` aborts."""
    with Server.scripted(audit=True) as server:
        picture = {"type": "image_url", "image_url": {"url": DATA_URI}}
        content = [picture, picture, {"type": "text", "text": "script:long"}]
        pictures = {"messages": [{"role": "user", "content": content}]}
        storm = Storm(server.port, pictures, random.Random(seed))
        run_client(storm.run(64))  # workers and threads are there
        assert server.post(CHAT, pictures | {"max_tokens": 1}).status == 200
        pids = server.process.pid, server.engine_pid
        before = [(descriptors(pid), threads(pid)) for pid in pids]
        run_client(storm.run(count))

        def is_clean() -> bool:
            return not any(gauge(server, name) for name in HELD)

        def is_back() -> bool:
            now = [(descriptors(pid), threads(pid)) for pid in pids]
            return all(n[0] <= b[0] and n[1] <= b[1] for n, b in zip(now, before, strict=True))

        took = until(lambda: is_clean() and is_back(), 10 * BACK_S, server.log)
        died = server.lines("the engine died")
        return Figure(
            3,
            f"{count:,} aborts at random phases: pages, sequences, descriptors and threads back after "
            f"{took:.2f} s; free + cached + used was the total at each step",
            missed(
                back_within_2_s=took <= BACK_S,
                pages_add_up=not died,
                it_still_answers=server.chat("hello").status == 200,
            ),
        )


class Storm:
    """Callers that give up."""

    def __init__(self, port: int, pictures: dict, rng: random.Random) -> None:
        self._port, self._pictures, self._rng = port, pictures, rng
        self._left = 0

    async def run(self, count: int) -> None:
        """`count` of them, 32 at a time."""
        self._left = count
        await asyncio.gather(*(self._call() for _ in range(32)))

    async def _call(self) -> None:
        rng = self._rng
        while self._left > 0:
            self._left -= 1
            fields = self._pictures if rng.random() < 0.2 else said(rng.choice(["long", "hello", "call"]))
            body = json.dumps(fields | {"stream": rng.random() < 0.7}).encode()
            client = Client(self._port)
            asking = asyncio.create_task(client.ask(CHAT, body))
            await asyncio.wait({asking}, timeout=rng.choice((0, 0, 0.001, 0.005, 0.02, 0.1)))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            client.close()
