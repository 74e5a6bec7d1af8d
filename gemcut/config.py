"""The engine's settings: frozen, handed downward, narrowed at each door."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from gemcut.data import SOFT_TOKEN_BUDGETS
from gemcut.errors import ConfigError

DeviceName = str  # "auto", "cpu", "cuda", "cuda:1"
DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
Kernels = Literal["auto", "torch", "triton"]
Numerics = Literal["auto", "reference", "fused"]
GraphMode = Literal["auto", "full", "piecewise", "off"]
DTYPES = ("auto", "bfloat16", "float16", "float32")
_CHOICES = {"kernels": get_args(Kernels), "numerics": get_args(Numerics), "graphs": get_args(GraphMode)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine is started with.

    model: folder or hub id; None for the demo checkpoint. device: "auto" takes a GPU if there is one.
    dtype: "auto" is the checkpoint's on a GPU and float32 on a CPU, which has no fast bfloat16.
    kv_bytes: memory of the KV cache; None takes `gpu_memory_utilization` of the GPU's memory less what
    is in use, or 1 GiB on a CPU. max_num_batched_tokens: tokens of a step. max_num_seqs: sequences that
    run at once. max_model_len: None for the model's context, or less if the KV cache cannot hold it.
    page_size: tokens of a KV page, what a prefix hit is counted in; None for 64 on a GPU, whose copy engine
    then fetches whole tiles, and 16 on a CPU.
    deterministic: tokens and logprobs of a request are bit-equal whatever else runs, however its prompt is
    chunked, cached or recomputed; slower. Without it products of other shapes may round otherwise, and
    near-ties fall otherwise. seed: requests that bring none get seeds derived from it, in order of arrival;
    None draws them. image_tokens: budget of a picture when a request names none; None for the checkpoint's.

    kernels: "triton" on GPUs, "torch" anywhere. numerics: "reference" rounds wherever the reference
    implementation does, "fused" once a segment (triton kernels only). graphs: CUDA graphs of "full" steps, of
    the "piecewise" segments between attention calls, or "off". "auto" takes the best that works on the
    device, and what was not taken, and why, stands in `Used.switched_off`; what is named is taken, or the
    engine does not start.
    """

    model: str | None = None
    revision: str | None = None
    device: DeviceName = "auto"
    dtype: DTypeName = "auto"
    kernels: Kernels = "auto"
    numerics: Numerics = "auto"
    graphs: GraphMode = "auto"
    kv_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 64
    max_model_len: int | None = None
    page_size: int | None = None
    enable_prefix_caching: bool = True
    deterministic: bool = False
    image_tokens: int | None = None
    seed: int | None = None
    allow_unknown_config: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} does not exist. Choose one of: {', '.join(DTYPES)}.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choices = ", ".join(known)
                raise ConfigError(f"{name} cannot be {getattr(self, name)!r}. Choose one of: {choices}.")
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must lie above 0 and at most 1, got {self.gpu_memory_utilization}."
            )
        if self.image_tokens is not None and self.image_tokens not in SOFT_TOKEN_BUDGETS:
            budgets = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
            raise ConfigError(f"image_tokens must be one of {budgets}, got {self.image_tokens!r}.")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ConfigError(f"seed must be a whole number, got {self.seed!r}.")
        for name in ("kv_bytes", "max_model_len", "page_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")


def is_triton_interpreted() -> bool:
    """Whether Triton's interpreter was asked for: it runs the kernels on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
