"""Where output goes and how it looks: rich on a terminal, plain in a pipe.

stdout carries what was asked for and nothing else; everything beside it goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import typer

from gemcut.errors import GemcutError

# An answer may hold any character. A terminal would obey these: move the cursor, rename the window, ...
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LOGGER = "gemcut"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads this stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def has_style(stream: TextIO | None) -> bool:
    """Whether colours and dimming are wanted there."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write(text: str) -> None:
    """Write to stdout at once. A reader that went away ends the command quietly."""
    if sys.stdout is None:  # closed by the caller (>&-)
        return
    if is_terminal(sys.stdout):
        text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
        raise typer.Exit(141) from None  # as if by SIGPIPE
    except OSError as error:
        _close_stdout()
        raise GemcutError(f"The output cannot be written: {error.strerror}.") from error


def write_json(value: Any) -> None:
    """One line of JSON on stdout. ASCII: no locale breaks it, and no reader takes U+2028 for a line end."""
    write(json.dumps(value, allow_nan=False) + "\n")


def write_dim(text: str) -> None:
    """Write to stderr, dimmed on a terminal: what stands beside the answer."""
    if is_terminal(sys.stderr):
        text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
    if text and has_style(sys.stderr):
        text = f"\x1b[2m{text}\x1b[0m"
    _write_stderr(text)


def complain(message: str) -> None:
    """One message on stderr, behind the command's name."""
    _write_stderr(f"gemcut: {message}\n")


def write_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: ruled on a terminal, columns of text in a pipe."""
    if is_terminal(sys.stdout):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left")
        for name in header:
            table.add_column(name)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    write("\n".join([title, *(f"  {text}".rstrip() for text in texts)]) + "\n")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes time; nothing in a pipe."""
    if not has_style(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def session() -> Iterator[None]:
    """One run of the command: encodings that cannot fail, and the rooms' log lines on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    logger, handler = logging.getLogger(LOGGER), _ToStderr()
    level = logger.level
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def log_details() -> None:
    """Show the rooms' informative lines too, for --verbose."""
    logging.getLogger(LOGGER).setLevel(logging.INFO)


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def _write_stderr(text: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # nobody is left to tell
            sys.stderr.write(text)
            sys.stderr.flush()


def _close_stdout() -> None:
    """Send the rest to nowhere, so that the interpreter's own last flush does not fail again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
