from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_rig import start, write_config

from gemcut.bench.contender import Gemcut, release


@pytest.fixture(scope="session")
def moe_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def moe(moe_config: Path) -> Iterator[Gemcut]:
    contender = start(moe_config)
    yield contender
    release([contender])
