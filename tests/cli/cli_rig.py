"""How the tests of the command run it: in this process, as a process of its own, and on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemcut import demo
from gemcut.cli import main

ROOT = Path(__file__).parents[2]
SIGN = str(demo.PICTURES / "sign.png")
LIMIT_S = 300  # for a machine that is busy with other things; each takes 2 or 3
QUESTION, SAID = "What does the sign say?", "GEMCUT\n"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


def call(*words: str, stdin: str | bytes = "") -> Result:
    """The command in this process. Its streams are pipes, as far as it can tell."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    given, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    finally:
        sys.stdin = given
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Result(code, *texts)


def refused(code: int, *words: str, says: str) -> None:
    """The command ends with `code`, one line on stderr that holds `says`, and nothing on stdout."""
    result = call(*words)
    assert result.code == code, result
    assert result.out == ""
    assert result.err.startswith("gemcut: ")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    assert says in result.err


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GEMCUT_")}
    return clean | {"PYTHONPATH": str(ROOT), **more}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "gemcut.cli", *words]


def spawn(*words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command as a process of its own, in pipes."""
    return subprocess.run(
        command(*words), capture_output=True, timeout=LIMIT_S, check=False, env=environment(), **options
    )


def on_terminal(words: Sequence[str], typed: Sequence[tuple[str, str]] = ()) -> tuple[int, str]:
    """The command on a terminal: its exit code and all that was shown. typed: (wait for this, type that)."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        os.chdir(ROOT)
        os.execvpe(sys.executable, command(*words), environment(TERM="xterm-256color"))
    shown, seen, waits = b"", 0, list(typed)
    until, again, key = time.monotonic() + LIMIT_S, 0.0, b""
    while time.monotonic() < until:
        ready, _, _ = select.select([terminal], [], [], 0.1)
        if ready:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            shown += data
        if waits and (at := shown.find(waits[0][0].encode(), seen)) >= 0:
            seen = at + len(waits[0][0])
            key = waits.pop(0)[1].encode()
            os.write(terminal, key)
            again = time.monotonic() + 3
        elif not waits and key in (b"\x03", b"\x04") and time.monotonic() > again:
            # pressed between the prompt and the moment from which Python listens, a key is lost
            with contextlib.suppress(OSError):
                os.write(terminal, key)
            again = time.monotonic() + 3
    else:
        os.kill(pid, 9)
        pytest.fail(f"no end after {LIMIT_S} s: {shown!r}")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert not waits, (waits, shown)
    return os.waitstatus_to_exitcode(status), shown.decode().replace("\r\n", "\n")
