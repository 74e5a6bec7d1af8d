"""Block sizes found by measuring, one JSON file per folder and GPU; a heuristic serves all other cards.

`<folder>/tuned/<gpu>.json` maps a key that names the shapes to the fields of the folder's own config.
`python -m gemcut.bench.tune` writes them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch


def file_name(gpu: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3.json`."""
    return gpu.lower().replace(" ", "-") + ".json"


@cache
def _tables(folder: Path, gpu: str) -> dict[str, dict[str, Any]]:
    path = folder / "tuned" / file_name(gpu)
    return json.loads(path.read_text()) if path.exists() else {}


def tuned(folder: Path, key: str, device: torch.device) -> dict[str, Any] | None:
    """The fields measured best for `key` on this device's card, or None."""
    if device.type != "cuda":
        return None
    return _tables(folder, torch.cuda.get_device_name(device)).get(key)
