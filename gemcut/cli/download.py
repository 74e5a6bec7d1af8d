"""`gemcut download`: a hub id's files on this machine, before they are needed."""

from __future__ import annotations

from typing import Annotated

import typer

from gemcut.cli import options, terminal


def download(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A hub id such as google/gemma-4-31B-it.", show_default=False),
    ],
    revision: options.Revision = None,
) -> None:
    """Fetch a checkpoint from the hub.

    Prints the folder that holds it, in HF_HOME. An interrupted download goes on where it stopped.
    """
    from gemcut.hub import resolve

    terminal.write(f"{resolve(model, revision=revision)}\n")
