"""`gemcut inspect`: the plan of a model, and what it needs. Reads config.json and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.cli import options, terminal
from gemcut.hub import SIZES

if TYPE_CHECKING:
    from gemcut.plan import LayerPlan, ModelPlan

LENGTHS = (1024, 8192, 32768)
VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"Folder, hub id, config.json, or {', '.join(SIZES)}; by default the demo.",
            envvar="GEMCUT_MODEL",
            show_default=False,
        ),
    ] = None,
    gpu_memory: Annotated[
        int | None,
        options.flag(
            "--gpu-memory",
            help="Plan for a GPU of this size, such as 80GB, instead of this machine's.",
            parser=options.parse_bytes,
            metavar="BYTES",
        ),
    ] = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    json: options.Json = False,
    revision: options.Revision = None,
    allow_unknown_config: options.AllowUnknownConfig = False,
) -> None:
    """Print a model's plan and what fits on a GPU.

    Layers, parameters, weight and KV bytes; from its config, no weights are loaded or downloaded.
    """
    if not 0 < gpu_memory_utilization <= 1:
        raise typer.BadParameter(
            f"--gpu-memory-utilization must lie above 0 and at most 1, got {gpu_memory_utilization}."
        )
    from gemcut.plan import parse_config

    name, config = _read_config(model, revision)
    plan = parse_config(config, allow_unknown=allow_unknown_config)
    stored = config.get("dtype") or config.get("torch_dtype")
    dtype = stored if stored in VALUE_BYTES else "bfloat16"
    gpu = (f"a GPU of {_gb(gpu_memory)}", gpu_memory) if gpu_memory else _this_gpu()
    facts = describe(plan, name, dtype, gpu, gpu_memory_utilization)
    if json:
        terminal.write_json(facts)
    else:
        _print(facts)


def _read_config(model: str | None, revision: str | None) -> tuple[str, Mapping[str, Any]]:
    from gemcut.demo import CHECKPOINT
    from gemcut.hub import read_config, read_json

    if not model:
        return "the demo checkpoint", read_json(CHECKPOINT, "config.json")
    return read_config(model, revision=revision)


def _this_gpu() -> tuple[str, int] | None:
    """Name and memory of the first GPU. Torch takes seconds to come, so only where a driver shows itself."""
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return facts.name, facts.total_memory


def describe(
    plan: ModelPlan, name: str, dtype: str, gpu: tuple[str, int] | None, utilization: float
) -> dict[str, Any]:
    """All facts of a plan as plain values. Bytes of KV are of `dtype`."""
    from gemcut.models.gemma4.built import missing_parts
    from gemcut.plan import kv_bytes, kv_bytes_per_token, parameter_count, weight_bytes

    text, width = plan.text, VALUE_BYTES[dtype]
    missing = missing_parts(plan)
    context = text.max_positions
    lengths = sorted({length for length in LENGTHS if length < context} | {context})
    kv = {
        "dtype": dtype,
        "full_bytes_per_token": kv_bytes_per_token(text, "full", width),
        "sliding_bytes_per_token": kv_bytes_per_token(text, "sliding", width),
        "window": text.window,
        "bytes_at": {str(length): kv_bytes(text, length, width) for length in lengths},
        "bytes_at_full_context": kv_bytes(text, context, width),
    }
    fits = None
    if gpu is not None:
        free = int(gpu[1] * utilization) - weight_bytes(plan, width)
        fits = {
            "gpu": gpu[0],
            "gpu_bytes": gpu[1],
            "utilization": utilization,
            "dtype": dtype,
            "bytes_beside_weights": free,
            "sequences_of": {
                str(length): max(0, free) // max(1, kv_bytes(text, length, width)) for length in lengths
            },
        }
    return {
        "model": name,
        "model_type": plan.model_type,
        "hidden": text.hidden,
        "vocab": text.vocab,
        "context": context,
        "layers": _layer_groups(text.layers),
        "vision": _tower(plan.vision or plan.patch_embedder),
        "audio": _tower(plan.audio),
        "parameters": {"total": parameter_count(plan), **_parameters(plan)},
        "weight_bytes": {name: weight_bytes(plan, size) for name, size in VALUE_BYTES.items()},
        "kv": kv,
        "fits": fits,
        "runs": {"now": not missing, "missing": missing},
        "unknown_keys": list(plan.unknown_keys),
    }


def _layer_groups(layers: tuple[LayerPlan, ...]) -> list[dict[str, Any]]:
    """Layers that are alike in all but their place, in the order of their first one."""
    groups: dict[LayerPlan, list[LayerPlan]] = {}
    for layer in layers:
        alike = replace(layer, index=0, kv_layer=0 if layer.owns_kv else layer.kv_layer + 1)
        groups.setdefault(alike, []).append(layer)
    return [_group(members) for members in groups.values()]


def _group(members: list[LayerPlan]) -> dict[str, Any]:
    one = members[0]
    experts = one.experts
    return {
        "count": len(members),
        "indices": [layer.index for layer in members],
        "kind": one.kind,
        "heads": one.q_heads,
        "kv_heads": one.kv_heads,
        "head_size": one.head_dim,
        "window": one.window,
        "mlp_width": one.ff_width,
        "experts": None
        if experts is None
        else {"count": experts.count, "active": experts.top_k, "width": experts.width},
        "k_eq_v": one.k_eq_v,
        "kv_of_layer": None if one.owns_kv else one.kv_layer,
    }


def _tower(tower: Any) -> dict[str, Any] | None:
    """The facts of an encoder that a person asks for; the encoder-free ones have no layers."""
    if tower is None:
        return None
    return {"layers": getattr(tower, "layers", 0), "hidden": tower.hidden}


def _parameters(plan: ModelPlan) -> dict[str, int]:
    """Parameters by part, and those of the decoder that one token uses."""
    from gemcut.plan import tensor_shapes

    parts = dict.fromkeys(("decoder", "token_embedding", "per_layer_embedding", "vision", "audio"), 0)
    idle = 0.0
    experts = plan.text.layers[0].experts
    for name, shape in tensor_shapes(plan).items():
        count = math.prod(shape)
        own = name.removeprefix(plan.text_prefix)
        if ".vision_" in name or ".embed_vision." in name:
            parts["vision"] += count
        elif ".audio_" in name or ".embed_audio." in name:
            parts["audio"] += count
        elif own == "embed_tokens.weight":
            parts["token_embedding"] += count
        elif own == "embed_tokens_per_layer.weight":
            parts["per_layer_embedding"] += count
        else:
            parts["decoder"] += count
        if experts is not None and ".experts." in name:
            idle += count * (experts.count - experts.top_k) // experts.count
    return {**parts, "active": int(parts["decoder"] + parts["token_embedding"] - idle)}


def _print(facts: Mapping[str, Any]) -> None:
    header = ("layers", "kind", "heads", "KV heads", "head size", "window", "MLP", "experts", "KV")
    rows = [_layer_row(group) for group in facts["layers"]]
    count = sum(group["count"] for group in facts["layers"])
    terminal.write_table(
        f"{facts['model']} ({facts['model_type']}): {count} layers, hidden {facts['hidden']:,}, "
        f"vocabulary {facts['vocab']:,}, context {facts['context']:,}",
        header,
        rows,
    )
    lines = [*_parameter_lines(facts), *_memory_lines(facts), *_fit_lines(facts)]
    width = max(len(name) for name, _ in lines)
    terminal.write("".join(f"{name.ljust(width)}  {value}\n" for name, value in lines))


def _layer_row(group: Mapping[str, Any]) -> tuple[str, ...]:
    experts = group["experts"]
    shared = group["kv_of_layer"]
    return (
        str(group["count"]),
        group["kind"],
        str(group["heads"]),
        str(group["kv_heads"]),
        str(group["head_size"]),
        "all" if group["window"] is None else f"{group['window']:,}",
        f"{group['mlp_width']:,}",
        "none" if experts is None else f"{experts['active']} of {experts['count']} x {experts['width']:,}",
        f"layer {shared}'s" if shared is not None else "own, K = V" if group["k_eq_v"] else "own",
    )


def _parameter_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    parameters = facts["parameters"]
    names = {
        "decoder": "decoder layers",
        "token_embedding": "token embedding",
        "per_layer_embedding": "per-layer embeddings",
        "vision": "vision",
        "audio": "audio",
    }
    parts = ", ".join(f"{names[key]} {_count(parameters[key])}" for key in names if parameters[key])
    lines = [("parameters", f"{parameters['total']:,} ({parts})")]
    if any(group["experts"] for group in facts["layers"]):
        lines.append(("active per token", f"{parameters['active']:,} (decoder with its chosen experts)"))
    return lines


def _memory_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    weights, kv = facts["weight_bytes"], facts["kv"]
    lines = [("weights", ", ".join(f"{_gb(size)} in {dtype}" for dtype, size in weights.items()))]
    growth = [f"{kv['full_bytes_per_token']:,} bytes a token in the full layers"]
    if kv["window"] is not None:
        growth.append(f"{kv['sliding_bytes_per_token']:,} in the sliding ones, up to {kv['window']:,} tokens")
    lines.append((f"KV cache ({kv['dtype']})", ", ".join(growth)))
    sizes = ", ".join(f"{_gb(size)} at {int(length):,}" for length, size in kv["bytes_at"].items())
    return [*lines, ("KV of a sequence", f"{sizes} tokens")]


def _fit_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    fits, runs = facts["fits"], facts["runs"]
    if fits is None:
        told = "no GPU is visible here; ask for one with --gpu-memory 80GB"
    else:
        dtype = fits["dtype"]
        share = f"{fits['utilization']:.0%} of {_gb(fits['gpu_bytes'])}"
        weights = _gb(facts["weight_bytes"][dtype])
        if fits["bytes_beside_weights"] <= 0:
            told = f"no: the {dtype} weights take {weights}, {share} is there"
        else:
            sequences = ", ".join(
                f"{count:,} of {int(length):,}" for length, count in fits["sequences_of"].items()
            )
            told = (
                f"{_gb(fits['bytes_beside_weights'])} beside the {dtype} weights ({share}), less what "
                f"activations take; sequences at once: {sequences} tokens"
            )
        told = f"{fits['gpu']}: {told}"
    return [
        ("fits", told),
        ("gemcut runs it", "yes" if runs["now"] else f"not yet: it needs {', '.join(runs['missing'])}"),
    ]


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _gb(size: int) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.1f} {unit}"
    return f"{size} bytes"
