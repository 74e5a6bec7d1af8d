"""`gemcut run`: one question, one answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gemcut.cli import options, terminal
from gemcut.errors import InvalidRequest

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]... QUESTION", help="Picture files, then the question.", show_default=False
        ),
    ] = None,
    image_tokens: options.ImageTokens = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    think: options.Think = False,
    system: options.System = None,
    json: options.Json = False,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    kernels: options.Kernels = "auto",
    numerics: options.Numerics = "auto",
    graphs: options.Graphs = "off",
    max_model_len: options.MaxModelLen = None,
    kv_bytes: options.KVBytes = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    allow_unknown_config: options.AllowUnknownConfig = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer a question, about pictures if there are any.

    gemcut run photo.jpg "What is in the picture?"

    The answer goes to stdout as it is written, thoughts go to stderr. With --json the last line of stdout is
    one object: text, reasoning, tool_calls, prompt_token_ids, token_ids, finish_reason, usage, timings, used,
    forwards. CUDA graphs are off here: a single answer does not repay the seconds that making them takes.
    """
    pictures, question = split_words(words or ())
    settings = options.engine_settings(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        kernels=kernels,
        numerics=numerics,
        graphs=graphs,
        max_model_len=max_model_len,
        kv_bytes=kv_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        allow_unknown_config=allow_unknown_config,
    )
    if verbose:
        terminal.log_details()
    # only now: these bring in numpy and Pillow
    from gemcut.cli import answer
    from gemcut.sampling import SamplingParams

    with options.usage():
        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_tokens=max_tokens, seed=seed
        )
    files = answer.open_files(settings)
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    at = f"messages[{len(messages)}]"
    messages.append(user_message(pictures, question))
    with answer.naming_pictures({f"{at}.content[{i}]": name for i, name in enumerate(pictures)}):
        prompt = files.chat_prompt(
            messages, enable_thinking=think, image_tokens=int(image_tokens) if image_tokens else None
        )
    llm = answer.start(settings, files)
    output = answer.stream(llm, prompt, params, shown=not json)
    if json:
        terminal.write_json(answer.as_json(output, llm.used, llm.stats()))
    answer.closing_line(output, llm.used, asked_tokens=max_tokens)


def split_words(words: Sequence[str]) -> tuple[list[str], str]:
    """The pictures and the question. Refuses what a slip of the pen makes of a command line."""
    example = 'gemcut run photo.jpg "What is in the picture?"'
    if not words:
        raise typer.BadParameter(f"There is no question. Try: {example}")
    *pictures, question = words
    if not question.strip():
        raise typer.BadParameter("The question is empty. It is the last word of the command.")
    if question.lower().endswith(PICTURE_SUFFIXES) and os.path.exists(question):
        raise typer.BadParameter(f"{question} is a file; the question comes after it. Try: {example}")
    for name in pictures:
        try:
            check_picture(name)
        except InvalidRequest as error:
            hint = " The question is one word to the shell: put it in quotes." if len(pictures) > 1 else ""
            raise typer.BadParameter(f"{error}{hint}") from None
    return pictures, question


def check_picture(name: str) -> None:
    """Raise InvalidRequest unless there is a file of that name; whether it is a picture shows later."""
    if name.startswith(("http://", "https://")):
        raise InvalidRequest(f"{name} is a web address; download the picture and name the file.")
    if not name:
        raise InvalidRequest("A picture's name is empty.")
    path = Path(name)
    try:
        if path.is_dir():
            raise InvalidRequest(f"{name} is a directory; name a picture file.")
        if not path.exists():
            raise InvalidRequest(f"There is no picture file {name!r}.")
    except (OSError, ValueError) as error:  # no permission on the way, a NUL, a name too long
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidRequest(f"The picture file {name!r} cannot be read: {reason}.") from None


def user_message(pictures: Sequence[str], text: str) -> dict[str, Any]:
    """A user's turn: the pictures in order, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image", "path": name} for name in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
