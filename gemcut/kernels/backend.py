"""Which implementation of the operations runs: a value that the engine's config hands down, not a global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemcut.errors import ConfigError

BACKENDS = ("torch",)


@dataclass(frozen=True, slots=True)
class Backend:
    """kernels: "torch", the references, which run anywhere and round as transformers does."""

    kernels: Literal["torch"] = "torch"

    def __post_init__(self) -> None:
        if self.kernels not in BACKENDS:
            raise ConfigError(f"Kernels {self.kernels!r} do not exist. Choose one of: {', '.join(BACKENDS)}.")
