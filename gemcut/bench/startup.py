"""Start-up: a new process, from its spawn to the first token.

`python -m gemcut.bench.startup` is that process. Triton's cache is empty, as after an installation; if asked
for, a second start finds it filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemcut.bench.contender import Setup, text_prompt
from gemcut.bench.records import Record, Table
from gemcut.config import EngineConfig
from gemcut.errors import GemcutError
from gemcut.runner.start import choose_device

PROMPT = 16


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds. imports: the interpreter, torch and gemcut. load: the device, weights and the KV cache.
    graphs: kernels compiled, graphs captured and checked. first_answer: a token for a short prompt."""

    triton_cache: str
    imports: float
    load: float
    graphs: float
    first_answer: float
    total: float
    used: dict[str, Any]


def run(
    setup: Setup, *, warm: bool, command: str, records: Path | None, tell: Callable[[str], None]
) -> tuple[Record, list[Table]]:
    """Start once with a cold Triton cache, with `warm` once more; write the record, return it with its table.

    Raises GemcutError if the engine does not start.
    """
    device, _ = choose_device(setup.config.device)
    results = measure(setup, warm=warm)
    record = Record.of("startup", device, None, results, command=command, facts=setup.facts())
    if records is not None:
        tell(f"written to {record.write(records)}")
    return record, [table(record.results)]


def measure(setup: Setup, *, warm: bool) -> list[Row]:
    job = json.dumps({"config": asdict(setup.config), "random_weights": setup.random_weights})
    with tempfile.TemporaryDirectory() as folder:
        return [_start(cache, job, folder) for cache in (("cold", "warm") if warm else ("cold",))]


def _start(cache: str, job: str, folder: str) -> Row:
    environment = os.environ | {"TRITON_CACHE_DIR": folder}
    began = time.time()
    child = subprocess.run(
        [sys.executable, "-m", "gemcut.bench.startup", str(began)],
        input=job,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    total = time.time() - began
    if child.returncode:
        last = child.stderr.strip().splitlines()
        raise GemcutError(f"The engine did not start: {last[-1] if last else 'it said nothing'}")
    parts = json.loads(child.stdout.splitlines()[-1])
    return Row(triton_cache=cache, total=total, **parts)


def main() -> None:
    """The child: argv holds when it was spawned, stdin what to start. stdout gets the parts."""
    spawned = float(sys.argv[1])
    job = json.load(sys.stdin)
    imported = time.time()
    setup = Setup(config=EngineConfig(**job["config"]), random_weights=job["random_weights"])
    (contender,) = setup.start()
    started = time.time()
    contender.generate([text_prompt(contender.plan, PROMPT, seed=0)], 1)
    parts = {
        "imports": imported - spawned,
        "load": contender.used.load_s,
        "graphs": started - imported - contender.used.load_s,
        "first_answer": time.time() - started,
        "used": asdict(contender.used),
    }
    print(json.dumps(parts))


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    header = ("triton cache", "imports s", "load s", "graphs s", "first answer s", "total s")
    rows = [
        (
            r["triton_cache"],
            *(f"{r[name]:.1f}" for name in ("imports", "load", "graphs", "first_answer", "total")),
        )
        for r in results
    ]
    return Table("Start-up of a new process", header, rows)


if __name__ == "__main__":
    main()
