"""A tiny random mixture of experts, from its config alone: what the benchmarks are rehearsed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from gemcut.bench.contender import Gemcut, Setup
from gemcut.config import EngineConfig


def write_config(folder: Path, kind: str = "moe") -> Path:
    """The config.json of a tiny model. Nothing else is in the folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(tiny.make_config(kind).to_dict(), default=str))
    return path


def setup(config: Path, versus: dict[str, dict[str, str]] | None = None, **settings: Any) -> Setup:
    given = {"device": "cpu", "kv_bytes": 16 << 20, "max_num_seqs": 8, "seed": 0} | settings
    engine = EngineConfig(**given, enable_prefix_caching=False, allow_unknown_config=True)
    return Setup(config=engine, random_weights=str(config), versus=versus or {})


def start(config: Path, **settings: Any) -> Gemcut:
    (contender,) = setup(config, **settings).start()
    return contender
