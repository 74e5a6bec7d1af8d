"""Figure 2: mutated media files end in an answer or a refusal within 5 s, and nothing dies or grows."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections import Counter

import numpy as np
from PIL import Image
from server_rig import Server

from soak.soak_rig import Client, Figure, descendants, missed, peak_mb, rss_mb, run_client

MOST_GROWTH_MB, MOST_S = 256, 5.0


def seeds() -> list[bytes]:
    """Small files of each format and of many of their kinds."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8))
    clear = Image.fromarray(rng.integers(0, 256, (40, 56, 4), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (24, 24), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[Image.Image, str, dict]] = [
        (colour, "PNG", {}),
        (clear, "PNG", {}),
        (deep, "PNG", {}),
        (colour.convert("L"), "PNG", {"optimize": True}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (colour.convert("1"), "PNG", {}),
        (colour, "JPEG", {}),
        (colour, "JPEG", {"progressive": True, "exif": exif}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour.convert("L"), "JPEG", {"quality": 30}),
        (colour, "WEBP", {}),
        (clear, "WEBP", {"lossless": True}),
        (colour, "WEBP", {"exif": exif.tobytes()}),
        (colour.convert("P"), "GIF", {}),
        (colour, "GIF", {"save_all": True, "append_images": [colour.rotate(90)]}),
    ]
    files = []
    for picture, kind, options in kinds:
        out = io.BytesIO()
        picture.save(out, kind, **options)
        files.append(out.getvalue())
    return files


def mutant(files: list[bytes], rng: random.Random) -> bytes:
    """A file with bytes changed, cut out, doubled, taken from another, or with an end that is missing."""
    out = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) if rng.random() < 0.5 else min(64, len(out)))  # headers matter most
        kind = rng.randrange(6)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", rng.randbytes(4)))
        elif kind == 2:
            del out[at : at + rng.randint(1, 30)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randint(1, 200)]
        elif kind == 4:
            other = rng.choice(files)
            out[at:] = other[rng.randrange(len(other)) :]
        else:
            del out[max(1, at) :]
        if not out:
            return b"\0"
    return bytes(out)


def run(count: int, seed: int = 0) -> Figure:
    """`count` files, at most 8 at a time."""
    with Server.scripted() as server:
        return run_client(_run(server, count, random.Random(seed)))


async def _run(server: Server, count: int, rng: random.Random) -> Figure:
    files = seeds()
    engine, front = server.engine_pid, server.process.pid
    statuses: Counter[int] = Counter()
    slowest, left = 0.0, count
    start = 0.0
    peaks: dict[int, float] = {}

    def memory_mb() -> float:
        return max(rss_mb(pid) for pid in descendants(front) if pid != engine)

    def note_peaks() -> None:
        peaks.update({pid: peak_mb(pid) for pid in descendants(front) if pid not in (engine, front)})

    async def sender() -> None:
        nonlocal slowest, left, start
        client = Client(server.port)
        while left > 0:
            left -= 1
            uri = f"data:image/png;base64,{base64.b64encode(mutant(files, rng)).decode()}"
            content = [{"type": "image_url", "image_url": {"url": uri}}]
            body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
            answer = await client.ask("/tokenize", body)
            statuses[answer.status] += 1
            slowest = max(slowest, answer.seconds)
            if sum(statuses.values()) % 100 == 0:
                start = start or memory_mb()
                note_peaks()
        client.close()

    await asyncio.gather(*(sender() for _ in range(8)))
    growth = memory_mb() - start
    peak = max(peaks.values())  # of the workers, as the kernel counted it
    died = server.lines("the engine died")
    return Figure(
        2,
        f"{count:,} mutated files: {statuses[200]:,} decoded, {statuses[400]:,} refused, slowest "
        f"{slowest:.2f} s, largest process {start:.0f} MB at first, {start + growth:.0f} MB at last, at "
        f"most {peak:.0f} MB while it decoded",
        missed(
            each_answered_with_200_or_400=set(statuses) <= {200, 400},
            each_within_5_s=slowest <= MOST_S,
            growth_within_256_MB=max(growth, peak - start) <= MOST_GROWTH_MB,
            nothing_died=not died and server.process.poll() is None and server.engine_pid == engine,
        ),
    )
