"""The command's tests see none of the GEMCUT_* settings of whoever runs them."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GEMCUT_")]:
        monkeypatch.delenv(name)
