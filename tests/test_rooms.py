"""Who may import whom: the table of ARCHITECTURE.md, read from the syntax trees of all modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {p.relative_to(ROOT): p.read_text() for p in sorted((ROOT / "gemcut").rglob("*.py"))}

SHARED = {"data", "errors", "config", "plan", "hub", "sampling", "outputs", "worker_pool"}
ANY = None
TABLE: dict[str, set[str] | None] = {
    "server": {"engine", "prompt", "media"},
    "engine": {"prompt", "media"},  # the runner comes in through engine.protocol
    "runner": {"models", "nn", "kernels", "parallel"},
    "models": {"nn", "quant", "kernels", "parallel"},
    "nn": {"quant", "kernels", "parallel"},
    "quant": {"kernels"},
    "kernels": set(),
    "parallel": set(),
    "prompt": set(),
    "media": set(),
    **dict.fromkeys(("gemcut", "cli", "__main__", "llm", "bench", "evaluate", "demo", "testing"), ANY),
}
# the shared modules themselves lie in layers, so that none of them can lead anywhere
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "data": {"errors"},
    "config": {"data", "errors"},
    "plan": {"data", "errors"},
    "hub": {"data", "errors"},
    "sampling": {"data", "errors"},
    "outputs": {"data", "errors"},
    "worker_pool": {"errors"},
}
# the engine process's main is a room of its own: it starts the runner; the front end never loads it
MAINS = {"gemcut.server.engine_main"}
WITHOUT_TORCH = ("server", "prompt", "media", "engine", *SHARED)


def room_of(module: str) -> str:
    """`gemcut.engine.loop` -> `engine`, `gemcut` -> `gemcut`."""
    return module.split(".")[1] if "." in module else module


def module_of(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, source: str) -> Iterator[str]:
    """Every module that a file imports, wherever in the file; `from a import b` counts as a and as a.b."""
    package = path.parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if base == "gemcut")


def violations(path: Path, source: str) -> list[str]:
    if module_of(path) in MAINS:
        return []
    room = room_of(module_of(path))
    if room not in TABLE and room not in LAYERS:
        return [f"{path}: there is no room {room!r} in the table"]
    allowed = LAYERS[room] if room in LAYERS else TABLE[room]
    if room in TABLE and allowed is not ANY:
        allowed = allowed | SHARED
    found = []
    for name in imports(path, source):
        top, target = name.split(".")[0], room_of(name)
        # `from gemcut import __version__` names the package itself, which is no room
        own = target in ("gemcut", room) or (name.count(".") == 1 and target not in ROOMS)
        if top == "gemcut" and not own and allowed is not ANY and target not in allowed:
            found.append(f"{path}: {room} may not import {name}")
        elif top == "torch" and room in WITHOUT_TORCH:
            found.append(f"{path}: {room} never imports torch")
        elif top == "triton" and room != "kernels":
            found.append(f"{path}: only kernels import triton")
    return found


ROOMS = {room_of(module_of(path)) for path in SOURCES} | set(TABLE) | set(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_module_imports_what_its_room_may(path: Path) -> None:
    assert violations(path, SOURCES[path]) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gemcut/engine/loop.py", "from gemcut.runner.start import start"),
        ("gemcut/engine/loop.py", "def f():\n    import torch.nn"),
        ("gemcut/engine/loop.py", "from gemcut import runner"),
        ("gemcut/engine/loop.py", "from ..runner import start"),
        ("gemcut/models/gemma4/text.py", "from gemcut.runner.kv import KVPools"),
        ("gemcut/runner/runner.py", "import gemcut.engine.loop"),
        ("gemcut/runner/runner.py", "import triton.language as tl"),
        ("gemcut/bench/kernels.py", "def f():\n    import triton"),
        ("gemcut/kernels/glu/op.py", "from gemcut.nn.norm import Norm"),
        ("gemcut/plan/parse.py", "from gemcut.hub import resolve"),
        ("gemcut/prompt/template.py", "from gemcut.llm import LLM"),
        ("gemcut/cellar/__init__.py", ""),
        ("gemcut/helper.py", ""),
    ],
)
def test_a_violation_is_seen(path: str, source: str) -> None:
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gemcut/engine/loop.py", "from gemcut.engine.protocol import Runner\nfrom gemcut.data import Step"),
        ("gemcut/kernels/glu/triton.py", "import triton\nfrom gemcut.kernels.check import check"),
        ("gemcut/cli.py", "def run():\n    from gemcut.runner.start import start\n    import torch"),
        ("gemcut/media/image.py", "from . import image"),
    ],
)
def test_what_the_table_allows_is_allowed(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def test_rooms_without_torch_load_without_torch() -> None:
    """Nor does anything that they import bring it in."""
    modules = [module_of(path) for path in SOURCES if room_of(module_of(path)) in WITHOUT_TORCH]
    assert set(modules) >= MAINS, "a main is named that is not there"
    assert len(modules) > 20
    code = f"import sys, {', '.join(modules)}; sys.exit(int(bool({{'torch', 'triton'}} & set(sys.modules))))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
