"""Figure 10: hours of mixed requests with media that never come again; memory, descriptors and times stay."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from server_rig import Server

from soak.soak_rig import Client, Figure, descendants, descriptors, missed, percentile, rss_mb, run_client

CALLERS = 4
WARM = 0.2  # of the time; caches fill
EVERY_S = 5.0
MOST_SLOPE = 2.0  # % an hour
LEAST_MINUTES = 30.0  # a slope an hour cannot be read off less
ABORTED = 0.1  # of the requests


@dataclass(frozen=True)
class Sample:
    at_s: float
    rss_mb: float  # of all processes
    descriptors: int


def run(minutes: float, seed: int = 0) -> Figure:
    """`minutes` with the demo model."""
    with Server.demo() as server:
        return run_client(_run(server, 60 * minutes, random.Random(seed)))


async def _run(server: Server, seconds: float, rng: random.Random) -> Figure:
    began = time.monotonic()
    samples: list[Sample] = []
    took: list[tuple[float, float]] = []  # when, how long
    wrong = 0

    async def caller() -> None:
        nonlocal wrong
        client = Client(server.port)
        while time.monotonic() - began < seconds:
            asked = request(rng)
            if rng.random() < ABORTED:
                asking = asyncio.create_task(client.chat(**asked, stream=True))
                await asyncio.wait({asking}, timeout=rng.random() * 0.3)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                client.close()
                continue
            answer = await client.chat(**asked)
            wrong += answer.status != 200
            took.append((time.monotonic() - began, answer.seconds))
        client.close()

    async def look() -> None:
        while True:
            pids = descendants(server.process.pid)
            sizes = sum(map(rss_mb, pids)), sum(map(descriptors, pids))
            samples.append(Sample(time.monotonic() - began, *sizes))
            await asyncio.sleep(min(EVERY_S, seconds / 40))

    looking = asyncio.create_task(look())
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    looking.cancel()
    warm = [sample for sample in samples if sample.at_s > WARM * seconds]
    slope, _ = np.polyfit([s.at_s / 3600 for s in warm], [s.rss_mb for s in warm], 1)
    percent = float(100 * slope / warm[0].rss_mb)
    thirds = [[s for at, s in took if lo <= at / seconds < hi] for lo, hi in ((WARM, 0.5), (0.7, 1.0))]
    # a short run on a busy machine may have no answer in one of them
    early, late = (percentile(times, 0.5) if times else float("nan") for times in thirds)
    first, last = (np.mean([s.descriptors for s in part]) for part in (warm[:5], warm[-5:]))
    judged = seconds >= 60 * LEAST_MINUTES
    slope_told = f"{percent:+.2f} %/h" if judged else "too short for a slope"
    return Figure(
        10,
        f"{seconds / 60:.1f} min, {len(took):,} answers with pictures of their own: memory of all processes "
        f"{warm[0].rss_mb:.0f} -> {warm[-1].rss_mb:.0f} MB ({slope_told}), "
        f"descriptors {first:.0f} -> {last:.0f}, median answer {1e3 * early:.0f} -> {1e3 * late:.0f} ms",
        missed(
            all_answered=wrong == 0,
            memory_flat=not judged or percent < MOST_SLOPE,
            descriptors_flat=last <= first + CALLERS,
        ),
    )


def request(rng: random.Random) -> dict[str, Any]:
    """Text alone, or one to three pictures of noise; an answer of any length."""
    text = f"Describe {rng.randrange(10**9)}: {'x' * rng.randrange(200)}"
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        height, width = rng.randint(50, 400), rng.randint(50, 400)
        pixels = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG")
        uri = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": uri}})
    fields: dict[str, Any] = {"max_tokens": rng.randint(1, 60), "temperature": rng.choice((0, 1))}
    if rng.random() < 0.1:
        fields["response_format"] = {"type": "json_object"}
    return {"messages": [{"role": "user", "content": parts}], **fields}
