"""The commands put together, and what becomes of an error: a line on stderr and an exit code.

0: done. 1: it could not be done. 2: the command line is wrong, a picture that is not there included.
130: interrupted (Ctrl-C). 141: the reader of our output went away. A traceback is printed for bugs only.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import gemcut
from gemcut.cli import bench, chat, doctor, download, inspect, render, run, serve, terminal
from gemcut.cli import eval as evaluate
from gemcut.errors import GemcutError

app = typer.Typer(
    # plain help in a pipe: it is also the faster one
    rich_markup_mode="rich" if terminal.is_terminal(sys.stdout) else None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(run.run)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(render.render)
app.command()(inspect.inspect)
app.command()(doctor.doctor)
app.command()(download.download)
app.command("eval")(evaluate.eval)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.write(f"gemcut {gemcut.__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def gemcut_(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A Gemma 4 engine: pictures and text in, text out.

    gemcut run photo.jpg "What is in the picture?"

    Every flag has an environment twin: GEMCUT_MODEL stands for --model, GEMCUT_MAX_TOKENS for --max-tokens.
    """
    if context.invoked_subcommand is None:
        terminal.write(context.get_help() + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code."""
    with terminal.session():
        try:
            arguments = sys.argv[1:] if argv is None else list(argv)
            return app(args=arguments, prog_name="gemcut", standalone_mode=False) or 0
        except typer.TyperException as error:
            terminal.complain(_usage_message(error))
            return error.exit_code
        except typer.Exit as error:
            return error.exit_code
        except GemcutError as error:
            terminal.complain(str(error))
            return 1
        except (KeyboardInterrupt, typer.Abort):
            return 130
        except Exception as error:
            return _failed(error)


def _usage_message(error: typer.TyperException) -> str:
    """typer's complaint in our words: what is wrong, and what would be right."""
    message = error.format_message().replace("Value error, ", "")
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption":
        near = getattr(error, "possibilities", None)
        remedy = f"Did you mean {' or '.join(near)}?" if near else "See --help."
        message = f"There is no option {option}. {remedy}"
        if getattr(getattr(error, "cmd", None), "name", None) == "run":
            message += " A question that begins with - goes after --."
    given = _given_value(error.__cause__)
    if given is not None and repr(given) not in message:
        message += f", got {given!r}"
    return message.removeprefix("Invalid value: ")


def _given_value(cause: BaseException | None) -> object:
    """What was typed, where typer's validation of a value failed: its texts leave that out."""
    errors: Any = getattr(cause, "errors", None)
    return None if errors is None else errors()[0].get("input")


def _failed(error: Exception) -> int:
    # by name: torch is not imported for this
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = (str(error) or "no memory is left").splitlines()[0]
        terminal.complain(
            f"Out of memory: {first} Lower --max-model-len, --kv-bytes or --gpu-memory-utilization."
        )
        return 1
    traceback.print_exc()
    terminal.complain("This is a bug in gemcut. Please report it with the lines above.")
    return 1
