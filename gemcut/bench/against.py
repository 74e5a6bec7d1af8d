"""Another engine as the other side of a benchmark: who there is, what each needs, how two share a GPU.

Where both fit on the device they are measured by turns in one run; otherwise one after the other, in the
same command. vLLM and SGLang start from a config alone and make random values of their own, so their answers
are not ours, and the experts of their decode steps are not the ones that the floor counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from gemcut.bench.contender import BESIDE_KV_BYTES, Contender, Setup
from gemcut.errors import ConfigError, GemcutError
from gemcut.plan import weight_bytes

PeerName = Literal["transformers", "vllm", "sglang"]
PEER_SUBJECTS = ("prefill", "decode", "vision", "batch")  # of `gemcut bench`, that all can be measured by
LEAST_KV_BYTES = 4 << 30  # of each of two engines that share a GPU


class Peer(Contender, Protocol):
    """Another engine, started and idle."""

    def close(self) -> None:
        """Give its memory back."""
        ...


@dataclass(frozen=True, slots=True)
class Kind:
    """What there is to know of an engine before it starts.

    marks: files of its package that a version with Gemma 4 has, text and pictures. source: the versions whose
    code was read.
    """

    marks: tuple[str, ...]
    source: str


KINDS: dict[PeerName, Kind] = {
    "transformers": Kind(
        marks=("models/gemma4/modeling_gemma4.py",),
        source="5.17 and 5.23",
    ),
    "vllm": Kind(
        marks=("model_executor/models/gemma4.py", "model_executor/models/gemma4_mm.py"),
        source="0.33.0",
    ),
    "sglang": Kind(
        marks=("srt/models/gemma4_causal.py", "srt/models/gemma4_mm.py"),
        source="0.5.23",
    ),
}


@dataclass(frozen=True, slots=True)
class Share:
    """What each of two engines on one device gets. kv_bytes: for KV, None where nobody has to be told.
    all_bytes: for everything, weights included."""

    kv_bytes: int | None
    all_bytes: int


def check_peer(name: PeerName, setup: Setup, subjects: Sequence[str]) -> list[str]:
    """The subjects that the other side can be measured by. Raises ConfigError if it cannot be had or knows
    none of them; before ours takes minutes."""
    kind = KINDS[name]
    known = [subject for subject in subjects if subject in PEER_SUBJECTS]
    if not known:
        raise ConfigError(f"{name} is measured by {', '.join(PEER_SUBJECTS)}, not by {', '.join(subjects)}.")
    if setup.random_weights is None:
        raise ConfigError("Both sides get random values, from a config alone: give --random-weights.")
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{name} is not installed: pip install {name}. This was written for {kind.source}.")
    root = Path(next(iter(spec.submodule_search_locations)))
    if not all((root / mark).is_file() for mark in kind.marks):
        raise ConfigError(
            f"{name} {installed(name)} does not know Gemma 4: pip install --upgrade {name}. "
            f"This was written for {kind.source}."
        )
    return known


def divide(setup: Setup, device: torch.device, dtype: torch.dtype) -> Share | None:
    """How our engine and another one share the device; None if they do not fit on it together."""
    if device.type != "cuda":
        return Share(setup.config.kv_bytes, 0)
    if setup.versus:
        return None  # several of ours divide it already
    free, total = torch.cuda.mem_get_info(device)
    weights = weight_bytes(setup.files().plan, dtype.itemsize)
    usable = free - (1 - setup.config.gpu_memory_utilization) * total
    each = int(usable) // 2
    kv_bytes = each - weights - BESIDE_KV_BYTES
    if setup.config.kv_bytes is not None:
        kv_bytes = min(kv_bytes, setup.config.kv_bytes)
    least = min(LEAST_KV_BYTES, setup.config.kv_bytes or LEAST_KV_BYTES)
    return Share(kv_bytes, each) if kv_bytes >= least else None


def start_peer(
    name: PeerName,
    setup: Setup,
    device: torch.device,
    dtype: torch.dtype,
    *,
    share: Share | None,
    pictures: bool,
) -> Peer:
    """share: None for all of the device. pictures: whether its prompts have any. Raises GemcutError with what
    the other engine said if it does not start."""
    from gemcut.bench.sglang_peer import SGLang
    from gemcut.bench.transformers_peer import Transformers
    from gemcut.bench.vllm_peer import VLLM

    kinds: dict[str, Any] = {"transformers": Transformers, "vllm": VLLM, "sglang": SGLang}
    try:
        return kinds[name](setup, device, dtype, share=share, pictures=pictures)
    except GemcutError:
        raise
    except Exception as error:
        raise GemcutError(
            f"{name} {installed(name)} did not start: {type(error).__name__}: {error}. "
            f"This was written for {KINDS[name].source}."
        ) from error


def installed(name: str) -> str:
    """The version of a package, for people."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "of an unknown version"
