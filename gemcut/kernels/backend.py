"""Which implementation of the operations runs: a value that the engine's config hands down, not a global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemcut.errors import ConfigError

KERNELS = ("torch", "triton")
NUMERICS = ("reference", "fused")


@dataclass(frozen=True, slots=True)
class Backend:
    """How operations compute.

    kernels: "torch", the references, which run anywhere; or "triton", for CUDA devices.
    numerics: "reference" rounds wherever transformers rounds; "fused" rounds once a segment, where a
        kernel need not leave fp32. The torch kernels are always "reference".
    deterministic: a row's bits depend on its own tokens alone, not on the batch, the chunking or the
        cache: one tile shape and one order of reduction, fixed by absolute position, in every product.
    """

    kernels: Literal["torch", "triton"] = "torch"
    numerics: Literal["reference", "fused"] = "reference"
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.kernels not in KERNELS:
            raise ConfigError(f"Kernels {self.kernels!r} do not exist. Choose one of: {', '.join(KERNELS)}.")
        if self.numerics not in NUMERICS:
            raise ConfigError(
                f"Numerics {self.numerics!r} do not exist. Choose one of: {', '.join(NUMERICS)}."
            )
        if self.kernels == "torch" and self.numerics != "reference":
            raise ConfigError("The torch kernels round as the reference does; fused numerics need triton.")
