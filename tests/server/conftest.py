"""Servers that several test files share, one a worker process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_rig import Server


@pytest.fixture(scope="session")
def scripted() -> Iterator[Server]:
    """A server over the scripted engine."""
    with Server.scripted(config={"max_images": 2, "max_body_bytes": 1 << 20}) as server:
        yield server


@pytest.fixture(scope="session")
def demo() -> Iterator[Server]:
    """`gemcut serve` with the demo model."""
    with Server.demo() as server:
        yield server
