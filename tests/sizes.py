"""The model configs of the five released sizes (spec 1), as plain dictionaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "plan" / "configs"
SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")


def config(size: str) -> dict[str, Any]:
    """A fresh copy of the config.json of a size, in the hub's spelling."""
    return json.loads((CONFIGS / f"{size}.json").read_text())
