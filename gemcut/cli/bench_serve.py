"""`gemcut bench serve`: a server that runs already, under load."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gemcut.cli import options, terminal
from gemcut.errors import ConfigError

if TYPE_CHECKING:
    from gemcut.bench.serve import Load

TARGET, ASKED, TOLD = "The server", "What is asked", "What is told"


def serve(
    base_url: Annotated[
        str, options.flag("--base-url", help="As OpenAI's clients take it.", panel=TARGET)
    ] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None,
        options.flag("--model", help="By default the first that the server names.", panel=TARGET),
    ] = None,
    api_key: Annotated[
        str | None, options.flag("--api-key", help="OPENAI_API_KEY, too.", panel=TARGET)
    ] = None,
    rate: Annotated[
        str | None,
        options.flag(
            "--rate", help="Requests a second, sent at random times: 1,4,16.", panel=ASKED, metavar="NUMBERS"
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        options.flag(
            "--concurrency",
            help="Clients that wait for their answers: 1,8,64.",
            panel=ASKED,
            metavar="NUMBERS",
        ),
    ] = None,
    requests: Annotated[int, options.flag("--requests", help="Of each load; 100.", min=1, panel=ASKED)] = 100,
    input_words: Annotated[
        int,
        options.flag(
            "--input-words", help="Random words of a prompt, a token or so each.", min=1, panel=ASKED
        ),
    ] = 512,
    output_tokens: Annotated[
        int, options.flag("--output-tokens", help="Tokens of an answer.", min=1, panel=ASKED)
    ] = 128,
    pictures: Annotated[
        int, options.flag("--pictures", help="New pictures in each prompt.", min=0, panel=ASKED)
    ] = 0,
    picture_size: Annotated[
        str, options.flag("--picture-size", help="Their pixels: 640x480.", panel=ASKED, metavar="WxH")
    ] = "640x480",
    prompts: Annotated[
        Path | None,
        options.flag(
            "--prompts",
            help='Ask these instead: JSON lines of {"prompt": "...", "images": ["a.png"]}.',
            panel=ASKED,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    natural_end: Annotated[
        bool,
        options.flag(
            "--natural-end", help="Let answers end by themselves; needed by some servers.", panel=ASKED
        ),
    ] = False,
    warm_up: Annotated[
        int, options.flag("--warm-up", help="Requests before the measurement.", min=0, panel=ASKED)
    ] = 4,
    timeout: Annotated[
        float, options.flag("--timeout", help="Seconds until a request counts as failed.", panel=ASKED)
    ] = 600.0,
    seed: Annotated[int, options.flag("--seed", help="The same seed asks the same.", panel=ASKED)] = 0,
    slo: Annotated[
        str | None,
        options.flag(
            "--slo",
            help="Limits in ms for goodput: ttft:500,tpot:50,e2e:9000.",
            panel=TOLD,
            metavar="NAME:MS,...",
        ),
    ] = None,
    out: Annotated[
        Path | None, options.flag("--out", help="Write the figures there, as JSON.", panel=TOLD)
    ] = None,
    plot: Annotated[
        Path | None, options.flag("--plot", help="Draw the latencies there: .svg or .png.", panel=TOLD)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """A running server, this one or another with OpenAI's interface: latencies and goodput under load."""
    from gemcut.bench import serve as bench
    from gemcut.bench.serve_client import Endpoint

    with options.usage():
        endpoint = Endpoint.of(base_url, api_key or os.environ.get("OPENAI_API_KEY"))
        workload = bench.Workload(
            input_words=input_words,
            output_tokens=output_tokens,
            pictures=pictures,
            picture_size=_size(picture_size),
            prompts=bench.read_prompts(prompts) if prompts is not None else (),
            exact=not natural_end,
            seed=seed,
        )
        loads, limits = _loads(rate, concurrency), _limits(slo)
    result, traces = asyncio.run(
        bench.run(
            endpoint,
            loads,
            workload,
            requests=requests,
            model=model,
            slo_ms=limits,
            warm_up=warm_up,
            timeout_s=timeout,
            command=_command(),
            tell=lambda line: terminal.write_dim(f"{line}\n"),
        )
    )
    if out is not None:
        out.write_text(json.dumps(asdict(result), indent=1) + "\n")
    if plot is not None:
        bench.plot(result, traces, plot)
    if as_json:
        terminal.write_json(asdict(result))
    else:
        terminal.write_table(*bench.table(result))
    for row in result.rows:
        for error, count in row.errors.items():
            terminal.complain(f"{row.load}: {count} of {row.requests} failed: {error}")


def _loads(rate: str | None, concurrency: str | None) -> list[Load]:
    """One load for each number; by default one client."""
    from gemcut.bench.serve import Load

    rates = [Load(rate=number) for number in _numbers("rate", rate)]
    clients = [Load(clients=int(number)) for number in _numbers("concurrency", concurrency)]
    return [*rates, *clients] or [Load(clients=1)]


def _numbers(name: str, text: str | None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        numbers = [0.0]
    whole = name == "concurrency"
    if not all(0 < number < 1e6 and (number.is_integer() or not whole) for number in numbers):
        raise ConfigError(f"{name} must be numbers above 0 such as 1,4,16; got {text!r}.")
    return numbers


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (
        width.isdecimal() and height.isdecimal() and 0 < int(width) < 10_000 and 0 < int(height) < 10_000
    ):
        raise ConfigError(f"picture_size must be like 640x480, got {text!r}.")
    return int(width), int(height)


def _limits(text: str | None) -> dict[str, float]:
    """`ttft:500,tpot:50`"""
    from gemcut.bench.serve import SLO_NAMES

    limits = {}
    for part in text.split(",") if text is not None else ():
        name, _, value = part.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            name = ""
        if name not in SLO_NAMES:
            raise ConfigError(f"slo must be like {':500,'.join(SLO_NAMES)}:9000 (ms), got {part!r}.")
    return limits


def _command() -> str:
    """How to measure this again, without the key."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == "--api-key":
            next(words, None)
        elif not word.startswith("--api-key="):
            kept.append(word)
    return shlex.join(["gemcut", *kept])
