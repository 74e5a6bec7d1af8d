"""Where a model's values come from, if not from a checkpoint: a seed, or a model that is there already.

Enters: a model on the meta device. Leaves: the same model with its parameters on the target device. No file
is read, and the host holds nothing of them. For benchmarks, which need a model's sizes and not its knowledge.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gemcut.errors import ConfigError
from gemcut.models.checkpoint import LoadReport, allocate
from gemcut.plan import ModelPlan

DEVIATION = 0.02


class WeightSource(Protocol):
    """Something that fills a model as `checkpoint.load` does from a folder."""

    def fill(self, model: Any, plan: ModelPlan, *, device: torch.device, dtype: torch.dtype) -> LoadReport:
        """Give `model` its parameters. Raises ConfigError if they cannot be had there in that dtype."""
        ...


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Vectors and scalars are 1, all other tensors normal with mean 0 and deviation 0.02.

    A tensor's values follow from the seed, its checkpoint name and the kind of device, so that another
    implementation can be given the same ones (`draw`).
    """

    seed: int = 0

    def fill(self, model: Any, plan: ModelPlan, *, device: torch.device, dtype: torch.dtype) -> LoadReport:
        began = time.perf_counter()
        targets = allocate(model, plan, device=device, dtype=dtype)
        for name, values in targets.items():
            draw(values, name, self.seed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return LoadReport(
            files=(),
            bytes=sum(values.nbytes for values in targets.values()),
            seconds=time.perf_counter() - began,
            skipped=(),
        )


@torch.no_grad()
def draw(values: torch.Tensor, name: str, seed: int) -> None:
    """Fill one checkpoint tensor in place with its random values."""
    if values.dim() < 2:
        values.fill_(1.0)
        return
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    values.normal_(0.0, DEVIATION, generator=generator)


@dataclass(frozen=True, eq=False, slots=True)
class SharedWeights:
    """The parameters of a model of the same plan, not copied: two ways to run them, one set in memory."""

    model: torch.nn.Module

    def fill(self, model: Any, plan: ModelPlan, *, device: torch.device, dtype: torch.dtype) -> LoadReport:
        values = self.model.state_dict()
        others = sorted({f"{v.dtype} on {v.device}" for v in values.values()} - {f"{dtype} on {device}"})
        if others:
            raise ConfigError(
                f"Weights that are shared are {', '.join(others)}, wanted are {dtype} on {device}."
            )
        model.load_state_dict(values, assign=True)
        return LoadReport(files=(), bytes=0, seconds=0.0, skipped=())
