"""Block sizes found by measuring, one JSON file per folder and GPU; a heuristic serves all other cards.

`<folder>/tuned/<gpu>.json` maps a key that names shapes and dtype to {size: fields of the folder's config},
size being what varies from call to call, tokens or rows. `python -m gemcut.bench.tune` writes them.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

Table = dict[str, dict[str, dict[str, Any]]]


def tuned(module: str, key: str, size: int, device: torch.device) -> dict[str, Any] | None:
    """The fields measured best for `key` on this device's card, at the next larger measured size.

    module: `__file__` of the folder's triton.py.
    """
    return _pick(module, key, size, torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def table_path(module: str, gpu: str) -> Path:
    """`NVIDIA H100 80GB HBM3` -> `<folder>/tuned/nvidia-h100-80gb-hbm3.json`."""
    return Path(module).parent / "tuned" / (gpu.lower().replace(" ", "-") + ".json")


@cache
def table(module: str, gpu: str) -> Table:
    path = table_path(module, gpu)
    return json.loads(path.read_text()) if path.exists() else {}


def enter(module: str, key: str, size: int, gpu: str, fields: dict[str, Any]) -> None:
    """Replace an entry in this process: for whoever tunes."""
    table(module, gpu).setdefault(key, {})[str(size)] = fields
    _pick.cache_clear()


@lru_cache(maxsize=4096)
def _pick(module: str, key: str, size: int, gpu: str) -> dict[str, Any] | None:
    entries = table(module, gpu).get(key)
    if entries is None:
        return None
    sizes = sorted(map(int, entries))
    return entries[str(next((limit for limit in sizes if limit >= size), sizes[-1]))]
