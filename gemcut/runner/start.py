"""A config and a checkpoint become a running model: device, dtype, weights, KV memory, limits."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from gemcut.config import EngineConfig, is_triton_interpreted
from gemcut.data import SOFT_TOKEN_BUDGETS
from gemcut.errors import ConfigError
from gemcut.kernels import Backend
from gemcut.models.checkpoint import LoadReport, load
from gemcut.models.gemma4.model import Gemma4
from gemcut.models.weight_sources import WeightSource
from gemcut.plan import ModelPlan, TextPlan, kv_bytes
from gemcut.runner.capture import Recorder
from gemcut.runner.graphs import FINE_FROM, Kind, padding_waste
from gemcut.runner.kv import PoolSizes
from gemcut.runner.runner import ModelRunner

log = logging.getLogger(__name__)

CPU_KV_BYTES = 1 << 30
PAGE_SIZES = {"cpu": 16, "cuda": 64}
GRAPH_BYTES = 1 << 29  # of the launches that graphs hold
LEAST_CAPABILITY = (8, 0)  # bf16 products: Ampere and newer
AUTO_NUMERICS = "reference"  # no kernel rounds more often than the reference, so this is never less exact
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Used:
    """What an engine really runs with, for logs and `--json`. switched_off: (what, why).

    graphs: the kinds in use; num_graphs, graph_bytes and graph_s: what they come to.
    """

    device: str
    dtype: str
    kernels: str
    numerics: str
    graphs: str
    load_s: float
    kv_tokens: int
    num_graphs: int = 0
    graph_bytes: int = 0
    graph_s: float = 0.0
    switched_off: tuple[tuple[str, str], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Started:
    """A runner, the sizes it has room for, and how it came about."""

    runner: ModelRunner
    sizes: PoolSizes
    max_model_len: int
    loaded: LoadReport
    used: Used


def start(
    config: EngineConfig, plan: ModelPlan, weights: Path | WeightSource, stored_dtype: str | None
) -> Started:
    """Fill a model with the weights of a folder or another source, and allocate the KV cache.

    stored_dtype: what the checkpoint's config says.
    Raises ConfigError if the device, the dtype or the memory is not there.
    """
    began = time.perf_counter()
    device, switched_off = choose_device(config.device)
    backend, without = choose_backend(config, device)
    switched_off += without
    kinds, without = choose_graphs(config, backend, device)
    switched_off += without
    dtype, dtype_name = choose_dtype(config.dtype, stored_dtype, device)
    with torch.device("meta"):
        model = Gemma4(plan, backend)
    loaded = load_weights(model, plan, weights, device=device, dtype=dtype)
    model.eval()
    value_bytes = dtype.itemsize
    max_model_len = min(config.max_model_len or plan.text.max_positions, plan.text.max_positions)
    largest = max(config.max_num_batched_tokens, largest_block(plan))
    fused = backend.kernels == "triton"
    work_bytes = step_bytes(plan.text, largest, config.max_num_seqs, value_bytes, fused=fused)
    # a pool of their own as large as a step's, and what they consist of
    graph_bytes = work_bytes + GRAPH_BYTES if kinds else 0
    budget = config.kv_bytes or kv_budget(
        config, plan, device, value_bytes, max_model_len, largest, work_bytes, graph_bytes
    )
    sizes = PoolSizes.within(
        plan.text,
        budget,
        page_size=config.page_size or PAGE_SIZES[device.type],
        value_bytes=value_bytes,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=largest,
        max_model_len=max_model_len,
    )
    if plan.text.owners("full"):
        max_model_len = min(max_model_len, sizes.full_pages * sizes.page_size)
    runner = ModelRunner(
        model,
        sizes,
        max_num_seqs=config.max_num_seqs,
        max_num_tokens=largest,
        max_model_len=max_model_len,
        device=device,
        dtype=dtype,
    )
    loaded_s = time.perf_counter() - began
    if kinds:
        runner.capture(kinds, graph_bytes, lambda: Recorder(device))
        switched_off += tuple((f"graph for {what}", why) for what, why in runner.graphs.dropped)
    used = Used(
        device=describe(device),
        dtype=dtype_name,
        kernels=backend.kernels,
        numerics=backend.numerics,
        graphs=runner.graphs.kinds,
        load_s=loaded_s,
        kv_tokens=sizes.full_pages * sizes.page_size,
        num_graphs=len(runner.graphs),
        graph_bytes=runner.graphs.num_bytes,
        graph_s=runner.graphs.seconds,
        switched_off=switched_off,
    )
    log.info(
        "%.2f GB of weights on %s as %s in %.1f s; KV cache of %.2f GB holds %s tokens; %s",
        loaded.bytes / 1e9,
        used.device,
        dtype_name,
        loaded_s,
        sizes.bytes(plan.text, value_bytes) / 1e9,
        f"{used.kv_tokens:,}",
        what_fits(plan.text, sizes, config.max_num_seqs, max_model_len),
    )
    if kinds:
        graphs = runner.graphs
        log.info(
            "%d graphs (%s) of steps of up to %s tokens take %.2f GB and took %.1f s; at most %.0f %% of a "
            "step of more than %d tokens is padding; %d were dropped",
            len(graphs),
            graphs.kinds,
            f"{max((graph.size.tokens for graph in graphs.others), default=0):,}",
            graphs.num_bytes / 1e9,
            graphs.seconds,
            100 * padding_waste([graph.size for graph in graphs.others]),
            FINE_FROM,
            len(graphs.dropped),
        )
    return Started(runner, sizes, max_model_len, loaded, used)


def load_weights(
    model: Gemma4, plan: ModelPlan, weights: Path | WeightSource, *, device: torch.device, dtype: torch.dtype
) -> LoadReport:
    """Fill a model from a checkpoint folder, or from whatever else brings its values."""
    if isinstance(weights, Path):
        return load(model, plan, weights, device=device, dtype=dtype)
    return weights.fill(model, plan, device=device, dtype=dtype)


def choose_device(name: str) -> tuple[torch.device, tuple[tuple[str, str], ...]]:
    """The device, and what was given up for it."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), ()
        return torch.device("cpu"), (("gpu", "no CUDA device is visible to torch"),)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"There is no device {name!r}. Choose auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ConfigError(f"Device {name} is not there: torch sees {count} GPUs. Use --device cpu.")
        return torch.device("cuda", device.index or 0), ()
    if device.type != "cpu":
        raise ConfigError(f"gemcut runs on cpu and cuda, not on {device.type}.")
    return torch.device("cpu"), ()


def choose_backend(config: EngineConfig, device: torch.device) -> tuple[Backend, tuple[tuple[str, str], ...]]:
    """What computes, and what was given up. Raises ConfigError for what was asked for and cannot be."""
    obstacle = triton_obstacle(device)
    if config.kernels == "triton" and obstacle:
        raise ConfigError(f"The triton kernels cannot run: {obstacle}. Use --kernels torch.")
    if config.kernels == "auto":
        # a CPU misses nothing: interpreted, the triton kernels are for tests
        kernels = "triton" if device.type == "cuda" and not obstacle else "torch"
    else:
        kernels = config.kernels
    without: tuple[tuple[str, str], ...] = ()
    if config.kernels == "auto" and device.type == "cuda" and obstacle:
        without = (("triton kernels", obstacle),)
    if config.deterministic and device.type == "cuda" and kernels == "torch":
        reason = f"they cannot run: {obstacle}" if obstacle else "the library's products depend on the batch"
        raise ConfigError(
            f"Deterministic mode on a GPU needs the triton kernels: {reason}. Use --device cpu, or run "
            "without it."
        )
    numerics = config.numerics
    if numerics == "auto":
        numerics = AUTO_NUMERICS if kernels == "triton" else "reference"
    return Backend(kernels, numerics, config.deterministic), without


def choose_graphs(
    config: EngineConfig, backend: Backend, device: torch.device
) -> tuple[tuple[Kind, ...], tuple[tuple[str, str], ...]]:
    """The kinds of graphs to try, in order, and what was given up.

    Raises ConfigError for an order that cannot be kept.
    """
    if config.graphs == "off":
        return (), ()
    obstacle = ""
    if device.type != "cuda":
        obstacle = "they need a GPU"
    elif backend.kernels == "torch":
        obstacle = "the torch kernels wait for the device between launches"
    if config.graphs != "auto":
        if obstacle:
            raise ConfigError(f"graphs cannot be {config.graphs!r}: {obstacle}. Use --graphs auto or off.")
        return (config.graphs,), ()
    if not obstacle:
        return ("full", "piecewise"), ()
    # a CPU misses nothing
    return (), (("CUDA graphs", obstacle),) if device.type == "cuda" else ()


def triton_obstacle(device: torch.device) -> str:
    """Why the triton kernels cannot run on a device; empty if they can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            have, need = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
            return f"{torch.cuda.get_device_name(device)} has compute capability {have}, they need {need}"
    elif not is_triton_interpreted():
        return "they need a GPU (or TRITON_INTERPRET=1, which is for tests)"
    return ""


def choose_dtype(name: str, stored: str | None, device: torch.device) -> tuple[torch.dtype, str]:
    """auto: what the checkpoint is stored in on a GPU, float32 on a CPU."""
    if name == "auto":
        name = (stored or "bfloat16") if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise ConfigError(f"gemcut computes in {', '.join(DTYPES)}, not in {name}. Pass --dtype.")
    return DTYPES[name], name


def largest_block(plan: ModelPlan) -> int:
    """The longest run of positions that must be computed at one go."""
    return max(SOFT_TOKEN_BUDGETS) if plan.vision is not None and plan.text.bidirectional_vision else 1


def kv_budget(
    config: EngineConfig,
    plan: ModelPlan,
    device: torch.device,
    value_bytes: int,
    max_model_len: int,
    largest: int,
    work_bytes: int,
    graph_bytes: int,
) -> int:
    """Bytes for the KV cache when the config names none: what the weights, a step's work and graphs leave."""
    if device.type == "cpu":
        return CPU_KV_BYTES
    free, total = torch.cuda.mem_get_info(device)
    budget = int(free - (1 - config.gpu_memory_utilization) * total) - work_bytes - graph_bytes
    least = kv_bytes(plan.text, min(max_model_len, largest), value_bytes)
    if budget < least:
        graphs = f", graphs {graph_bytes / 1e9:.1f} GB (--graphs off)" if graph_bytes else ""
        raise ConfigError(
            f"After the weights {free / 1e9:.1f} GB of {total / 1e9:.1f} GB are free; activations take "
            f"{work_bytes / 1e9:.1f} GB{graphs}, and a KV cache of {least / 1e9:.1f} GB does not fit "
            "beside them. Lower --max-num-batched-tokens or --max-num-seqs, or raise "
            "--gpu-memory-utilization."
        )
    return budget


def step_bytes(text: TextPlan, tokens: int, rows: int, value_bytes: int, *, fused: bool) -> int:
    """Memory for a step's work: the widest activations, and fp32 logits of all rows with a sorted copy.

    fused: the triton kernels, which gather no rows and keep no copies. 26B-A4B takes 1.2 GB for 8,192 tokens.
    """
    widest = max(
        max(layer.ff_width, (layer.q_heads + 2 * layer.kv_heads) * layer.head_dim) for layer in text.layers
    )
    experts = text.layers[0].experts
    pair = 0
    if experts is not None:
        pair = text.hidden + experts.width if fused else 2 * (text.hidden + 3 * experts.width)
    top_k = 0 if experts is None else experts.top_k
    activations = tokens * (8 * text.hidden + (2 if fused else 4) * widest + top_k * pair) * value_bytes
    return activations + rows * text.vocab * 24


def what_fits(text: TextPlan, sizes: PoolSizes, max_num_seqs: int, max_model_len: int) -> str:
    """How many sequences of which length, prompt and answer, run at once for certain."""
    parts = []
    for length in sorted({min(1024, max_model_len), min(8192, max_model_len), max_model_len}):
        full = -(-(length - 1) // sizes.page_size)  # the last token is never read back
        # a window that is not aligned with pages touches one more
        sliding = min(full, -(-(text.window or length) // sizes.page_size) + 1)
        fits = [max_num_seqs]
        # who is admitted leaves a page for each that runs
        if text.owners("full"):
            fits.append((sizes.full_pages + 1) // (full + 1))
        if text.owners("sliding"):
            fits.append((sizes.sliding_pages + 1) // (sliding + 1))
        parts.append(f"{max(1, min(fits))} of {length:,} tokens")
    return "sequences at once: " + ", ".join(parts)


def describe(device: torch.device) -> str:
    """The device as a person calls it: `cuda:0 (NVIDIA H100 80GB HBM3)`, `cpu`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
