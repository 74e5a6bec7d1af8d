"""Figure 1: malformed requests are all 4xx, by the same engine, and valid ones beside them say what they say
alone."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter
from typing import Any

from mutations import mutated, spoiled
from server_rig import Server

from gemcut.demo import PICTURES
from soak.soak_rig import CHAT, Client, Figure, missed, run_client

CANARIES = [
    ("sign.png", "What does the sign say?"),
    ("shapes.png", "Describe the image."),
    ("shapes.png", "How many shapes are there?"),
    ("first.png", "What is in the picture?"),
    ("second.png", "List all shapes."),
    (None, "Repeat: GEM"),
    (None, "What is 3 + 4?"),
    (None, "Reverse: 1234"),
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def question(picture: str | None, text: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        octets = base64.b64encode((PICTURES / picture).read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{octets}"}})
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 40}


SEEDS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, question("sign.png", "x") | {"max_tokens": 2, "stop": ["x"]}),
    (CHAT, question(None, "x") | {"max_tokens": 2, "tools": [TOOL], "tool_choice": "auto", "stream": True}),
    (CHAT, question(None, "x") | {"max_tokens": 2, "logprobs": True, "top_logprobs": 2}),
    (CHAT, question(None, "x") | {"max_tokens": 2, "response_format": {"type": "json_object"}}),
    ("/v1/completions", {"prompt": ["x", "y"], "n": 2, "logit_bias": {"5": 1}, "seed": 1, "max_tokens": 2}),
    ("/v1/messages", {"max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}),
    ("/tokenize", {"messages": question("sign.png", "x")["messages"], "return_token_strs": True}),
]  # fmt: skip


def run(count: int, seed: int = 0) -> Figure:
    """Until `count` requests were refused."""
    # a mutant without a limit ends soon, too
    with Server.demo("--max-model-len", "400") as server:
        return run_client(_run(server, count, random.Random(seed)))


async def _run(server: Server, count: int, rng: random.Random) -> Figure:
    engine = server.engine_pid
    first = Client(server.port)
    alone = [text_of((await first.chat(**question(*asked))).body) for asked in CANARIES]
    first.close()
    statuses: Counter[int] = Counter()
    done = asyncio.Event()
    num_canaries, wrong = 0, []

    async def canary(number: int) -> None:
        nonlocal num_canaries
        client = Client(server.port)
        while not done.is_set():
            answer = await client.chat(**question(*CANARIES[number]))
            num_canaries += 1
            if answer.status != 200 or text_of(answer.body) != alone[number]:
                wrong.append(answer)
        client.close()

    async def attacker() -> None:
        client = Client(server.port)
        while not done.is_set():
            path, body = rng.choice(SEEDS)
            sent = (
                json.dumps(mutated(body, rng)).encode()
                if rng.random() < 0.5
                else spoiled(json.dumps(body).encode(), rng)
            )
            statuses[(await client.ask(path, sent)).status] += 1
            if sum(n for status, n in statuses.items() if status >= 400) >= count:
                done.set()
        client.close()

    await asyncio.gather(*map(canary, range(len(CANARIES))), *(attacker() for _ in range(8)))
    refused = sum(n for status, n in statuses.items() if 400 <= status < 500)
    return Figure(
        1,
        f"{refused:,} malformed requests refused with 4xx ({statuses[200]:,} of the mutants were valid); "
        f"{num_canaries:,} valid answers beside them, {len(wrong)} other than alone; statuses "
        f"{dict(sorted(statuses.items()))}",
        missed(
            no_5xx_and_none_unanswered=all(200 <= status < 500 for status in statuses),
            canaries_equal_to_solo=not wrong and num_canaries > 0,
            same_engine=server.engine_pid == engine,
        ),
    )


def text_of(body: bytes) -> str:
    return json.loads(body)["choices"][0]["message"]["content"]
