"""Figure 9: at 20 times what the server can do, those who are admitted are served as ever and the others are
told at once."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

from server_rig import Server

from soak.soak_rig import CHAT, Answer, Client, Figure, missed, percentile, run_client, said

SEQUENCES, TOKENS, STEP_S = 8, 20, 0.02  # some 20 requests a second
TIMES = 20
REFUSED_S, LIVE_S, KEPT = 0.020, 0.100, 0.95
KEYS = ("first key", "second key")


WARM_S = 1.0  # the first answers are still on their way; then the time counts


@dataclass
class Seen:
    """done_at: when each answer was complete, from the beginning."""

    done_at: list[float] = field(default_factory=list)
    refused: list[Answer] = field(default_factory=list)
    live: list[Answer] = field(default_factory=list)
    others: list[Answer] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def note(self, answer: Answer) -> None:
        if answer.status == 200:
            self.done_at.append(self.now())
        else:
            (self.refused if answer.status in (429, 503) else self.others).append(answer)

    def now(self) -> float:
        return time.monotonic() - self.began

    def rate(self, seconds: float) -> float:
        """Answers a second, while the time counts."""
        return sum(WARM_S <= at < WARM_S + seconds for at in self.done_at) / seconds


def run(seconds: float) -> Figure:
    """`seconds` at the peak, then as long at 20 times as much."""
    config = {"max_waiting": 2 * SEQUENCES, "max_per_key": 2 * SEQUENCES, "api_keys": list(KEYS)}
    engine = {"max_num_seqs": SEQUENCES}
    with Server.scripted(step_s=STEP_S, config=config, engine=engine) as server:
        return run_client(_run(server, seconds))


async def _run(server: Server, seconds: float) -> Figure:
    # as many callers as there is room for, each asking again when it is answered
    peak = await _closed(server.port, SEQUENCES, seconds)
    rate = peak.rate(seconds)
    over = await _open(server.port, TIMES * rate, seconds)
    goodput = over.rate(seconds)
    refused_s = [answer.seconds for answer in over.refused]
    live_s = [answer.seconds for answer in over.live]
    statuses = {answer.status for answer in over.refused}
    return Figure(
        9,
        f"at {TIMES} x the peak of {rate:.1f} requests/s: {100 * goodput / rate:.1f} % of it done, "
        f"{len(over.refused):,} refused (statuses {sorted(statuses)}, p99 "
        f"{1e3 * percentile(refused_s, 0.99):.1f} ms), /live p99 {1e3 * percentile(live_s, 0.99):.1f} ms",
        missed(
            goodput_at_least_95_percent=goodput >= KEPT * rate,
            refused_within_20_ms_p99=percentile(refused_s, 0.99) <= REFUSED_S,
            live_within_100_ms_p99=percentile(live_s, 0.99) <= LIVE_S,
            each_refusal_says_when_to_retry=all("retry-after" in answer.headers for answer in over.refused),
            refusals_are_503_and_429_for_a_key=statuses == {429, 503},
            nothing_else=not over.others and not peak.refused,
        ),
    )


def _request(key: str) -> tuple[bytes, dict[str, str]]:
    return json.dumps(said("long", max_tokens=TOKENS)).encode(), {"authorization": f"Bearer {key}"}


async def _closed(port: int, callers: int, seconds: float) -> Seen:
    seen = Seen()
    body, headers = _request(KEYS[0])

    async def caller() -> None:
        client = Client(port)
        while seen.now() < WARM_S + seconds:
            seen.note(await client.ask(CHAT, body, headers))
        client.close()

    await asyncio.gather(*(caller() for _ in range(callers)))
    return seen


async def _open(port: int, rate: float, seconds: float) -> Seen:
    """Requests at a rate, whatever becomes of them; two thirds of them with the first key."""
    seen, idle = Seen(), []
    tasks: set[asyncio.Task[None]] = set()

    async def one(number: int) -> None:
        client = idle.pop() if idle else Client(port)
        body, headers = _request(KEYS[number % 3 == 0])
        seen.note(await client.ask(CHAT, body, headers))
        idle.append(client)

    async def probe() -> None:
        client = Client(port)
        while seen.now() < WARM_S + seconds:
            seen.live.append(await client.ask("/live"))
            await asyncio.sleep(0.02)
        client.close()

    probing = asyncio.create_task(probe())
    number = 0
    while seen.now() < WARM_S + seconds:
        while number < seen.now() * rate:
            tasks.add(task := asyncio.create_task(one(number)))
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks, probing)
    for client in idle:
        client.close()
    return seen
