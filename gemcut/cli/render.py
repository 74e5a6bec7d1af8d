"""`gemcut render`: conversations in, prompts out, a JSON object a line. Neither torch nor weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer

from gemcut.cli import options, terminal
from gemcut.errors import GemcutError, InvalidRequest

SWITCHES = {"enable_thinking": False, "preserve_thinking": False, "add_generation_prompt": True}
KEYS = ("messages", "tools", *SWITCHES)


def render(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.jsonl", help="A conversation a line; - is stdin.", show_default=False),
    ],
    variant: Annotated[
        Literal["auto", "empty-thought", "plain"],
        options.flag(
            "--variant",
            help="Whether a prompt without thinking ends in an empty thought. auto: as --model has it.",
        ),
    ] = "auto",
    model: options.Model = None,
    revision: options.Revision = None,
    allow_unknown_config: options.AllowUnknownConfig = False,
) -> None:
    """Print conversations as the prompts that a model reads.

    A line of FILE.jsonl holds {"messages": [...], "tools": [...], "enable_thinking": false,
    "preserve_thinking": false, "add_generation_prompt": true}; all but messages may be left out. Each line
    becomes a line on stdout: {"prompt": "..."} with control tokens spelled out and each medium as one
    placeholder, or {"error": "..."}.

    Content that the official template drops without a word is dropped here as well. The exit code is 0
    when every line was answered, be it with an error: read the lines.
    """
    with nullcontext(sys.stdin.buffer) if str(file) == "-" else _open(file) as lines:
        empty_thought = (
            variant == "empty-thought"
            if variant != "auto"
            else _carries_empty_thought(model, revision, allow_unknown_config)
        )
        for line in _lines(lines):
            terminal.write_json(_answer(line, empty_thought))


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}.") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines end in \\n and in nothing else: JSON strings may hold what other readers take for a line end."""
    try:
        yield from file
    except OSError as error:
        raise GemcutError(f"The file cannot be read on: {error.strerror}.") from error


def _carries_empty_thought(model: str | None, revision: str | None, allow_unknown_config: bool) -> bool:
    from gemcut.demo import CHECKPOINT
    from gemcut.hub import read_json, resolve
    from gemcut.plan import parse_config
    from gemcut.prompt.variant import carries_empty_thought, read_chat_template

    folder = resolve(model or str(CHECKPOINT), revision=revision, weights=False)
    plan = parse_config(read_json(folder, "config.json"), allow_unknown=allow_unknown_config)
    return carries_empty_thought(read_chat_template(folder), plan.text.per_layer_input is not None)


def _answer(line: bytes, empty_thought: bool) -> dict[str, str]:
    from gemcut.hub import parse_json_object
    from gemcut.prompt.template import render as render_segments
    from gemcut.prompt.writer import spell

    try:
        request = _checked(parse_json_object(line, "The line"))
        messages = request.pop("messages")
        segments = render_segments(messages, **request, empty_thought=empty_thought, drop_unknown=True)
        return {"prompt": spell(segments)}
    except GemcutError as error:
        return {"error": str(error)}
    except RecursionError:
        return {"error": "The conversation is nested too deeply."}


def _checked(request: dict[str, Any]) -> dict[str, Any]:
    for key in request:
        if key not in KEYS:
            raise InvalidRequest(f"There is no key {key!r}; a conversation holds {', '.join(KEYS)}.")
    if not isinstance(request.get("messages"), list):
        raise InvalidRequest('"messages" must be a list of messages.')
    tools = request.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InvalidRequest('"tools" must be a list of tools, or null.')
    for key, default in SWITCHES.items():
        if not isinstance(request.setdefault(key, default), bool):
            raise InvalidRequest(f'"{key}" must be true or false, got {request[key]!r}.')
    return request
