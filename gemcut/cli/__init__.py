"""The `gemcut` command: parse, call, print.

Every command is a file of its own. A command imports the rooms it needs when it runs, so that
`gemcut --help` comes at once and a usage mistake is answered before torch is loaded.
"""

from gemcut.cli.app import main

__all__ = ["main"]
