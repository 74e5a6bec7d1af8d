"""The doors of the operations: no tensor that breaks the contract gets in, and the message says which.

Signatures are read, so an operation without an example here, or an argument without a check, fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from gemcut import kernels
from gemcut.errors import ConfigError
from gemcut.kernels import Backend, Routing

TORCH = Backend()
EPS = 1e-6
T, H, HEAD, HQ, HK, PAGES, SIZE, E, K, WIDTH = 6, 16, 8, 4, 2, 5, 3, 4, 2, 10


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def routing() -> Routing:
    return kernels.route_experts(f(T, H), f(E, H), f(E), ints(T), top_k=K, backend=TORCH)


# What each operation takes. Optional tensors are given, so that they are tried too.
EXAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "add_norm": lambda: {"x": f(T, H), "a": f(T, H), "post_weight": f(H), "next_weight": f(H), "eps": EPS},
    "add_norm_moe": lambda: {
        "x": f(T, H),
        "a": f(T, H),
        "post_weight": f(H),
        "next_weight": f(H),
        "router_scale": f(H),
        "expert_weight": f(H),
        "eps": EPS,
    },
    "add_normed": lambda: {"x": f(T, H), "d": f(T, H), "post_weight": f(H), "eps": EPS},
    "add_positions": lambda: {
        "x": f(T, H),
        "table": f(2, 9, H),
        "positions": torch.zeros(T, 2, dtype=torch.int64),
        "next_weight": f(H),
        "eps": EPS,
    },
    "block_maxima": lambda: {"logits": f(T, 20)},
    "close_layer": lambda: {
        "x": f(T, H),
        "d": f(T, H),
        "post_weight": f(H),
        "layer_scalar": f(1),
        "next_weight": f(H),
        "eps": EPS,
    },
    "close_layer_moe": lambda: {
        "x": f(T, H),
        "d": f(T, H),
        "t": f(T, K, H),
        "expert_weights": f(T, K),
        "dense_weight": f(H),
        "moe_weight": f(H),
        "post_weight": f(H),
        "layer_scalar": f(1),
        "next_weight": f(H),
        "eps": EPS,
    },
    "embed": lambda: {
        "token_ids": torch.arange(T),
        "weight": f(20, H),
        "soft": f(3, H),
        "soft_rows": torch.full((T,), -1),
        "next_weight": f(H),
        "eps": EPS,
    },
    "gate_per_layer": lambda: {"gate": f(T, WIDTH), "inputs": f(T, WIDTH)},
    "glu": lambda: {"gate_up": f(T, 2 * WIDTH)},
    "grouped_glu": lambda: {"h": f(T, H), "gate_up": f(E, 2 * WIDTH, H), "routing": routing()},
    "grouped_linear": lambda: {"m": f(T * K, WIDTH), "down": f(E, H, WIDTH), "routing": routing()},
    "linear": lambda: {"x": f(T, H), "weight": f(7, H)},
    "logits": lambda: {"h": f(T, H), "weight": f(20, H), "softcap": 30.0},
    "paged_attention": lambda: {
        "q": f(T, HQ, HEAD),
        "k_pages": f(PAGES, SIZE, HK, HEAD),
        "v_pages": f(PAGES, SIZE, HK, HEAD),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "query_start": ints(0, 2, T),
        "seq_lens": ints(5, 4),
        "spans": torch.zeros(T, 2, dtype=torch.int32),
        "window": 3,
    },
    "per_layer_inputs": lambda: {
        "projected": f(T, 3 * WIDTH),
        "token_ids": torch.arange(T),
        "weight": f(20, 3 * WIDTH),
        "soft_rows": torch.full((T,), -1),
        "norm_weight": f(WIDTH),
        "hidden": H,
        "pad_id": 0,
        "eps": EPS,
    },
    "pool_patches": lambda: {
        "x": f(9, H),
        "cells": torch.arange(9)[None],
        "starts": torch.tensor([0, 9], dtype=torch.int32),
        "std_bias": f(H),
        "std_scale": f(H),
        "eps": EPS,
    },
    "prepare_q": lambda: {
        "q": f(T, HQ * HEAD),
        "q_norm": f(HEAD),
        "rope": f(2, T, HEAD // 2),
        "eps": EPS,
    },
    "prepare_qkv": lambda: {
        "qkv": f(T, (HQ + 2 * HK) * HEAD),
        "q_norm": f(HEAD),
        "k_norm": f(HEAD),
        "rope": f(2, T, HEAD // 2),
        "slots": torch.arange(T),
        "k_pages": f(PAGES, SIZE, HK, HEAD),
        "v_pages": f(PAGES, SIZE, HK, HEAD),
        "q_heads": HQ,
        "eps": EPS,
    },
    "prepare_tower_qkv": lambda: {
        "qkv": f(T, 3 * HQ * HEAD),
        "q_norm": f(HEAD),
        "k_norm": f(HEAD),
        "x_rope": f(2, T, HEAD // 4),
        "y_rope": f(2, T, HEAD // 4),
        "eps": EPS,
    },
    "rope_table": lambda: {"positions": torch.arange(T), "inv_freq": f(4), "dtype": torch.float32},
    "route_experts": lambda: {
        "r": f(T, H),
        "weight": f(E, H),
        "per_expert_scale": f(E),
        "count": ints(T),
        "top_k": K,
    },
    "sample": lambda: {
        "logits": f(T, 20),
        "maxima": f(T, 1),
        "temperature": torch.ones(T),
        "top_k": torch.full((T,), 20),
        "top_p": torch.ones(T),
        "min_p": torch.zeros(T),
        "uniform": torch.full((T,), 0.5, dtype=torch.float64),
    },
    "scale_patches": lambda: {"pixels": torch.zeros(T, 768, dtype=torch.uint8), "dtype": torch.float32},
    "tower_attention": lambda: {
        "q": f(T, HQ, HEAD),
        "k": f(T, HQ, HEAD),
        "v": f(T, HQ, HEAD),
        "starts": ints(0, 2, T),
    },
}
# Dimensions that an argument defines: any size is right, as (operation, argument, dimension).
FREE = {
    ("add_positions", "table", 1),
    ("block_maxima", "logits", 0),
    ("block_maxima", "logits", 1),
    ("embed", "weight", 0),  # more ids than are used
    ("embed", "soft", 0),
    ("glu", "gate_up", 0),
    ("grouped_glu", "gate_up", 1),  # an even width is checked apart
    ("grouped_linear", "down", 1),
    ("linear", "weight", 0),
    ("linear", "x", 0),
    ("logits", "weight", 0),
    ("logits", "h", 0),
    ("pool_patches", "x", 0),
    ("pool_patches", "cells", 0),
    ("pool_patches", "starts", 0),
    ("per_layer_inputs", "weight", 0),  # more ids than are used
    ("prepare_q", "rope", 2),
    ("prepare_qkv", "rope", 2),
    ("rope_table", "positions", 0),
    ("route_experts", "r", 0),  # padding rows
    ("rope_table", "inv_freq", 0),
    ("sample", "logits", 1),
    ("scale_patches", "pixels", 0),
    ("scale_patches", "pixels", 1),
    ("paged_attention", "q", 1),  # a multiple of the KV heads is checked apart
    ("paged_attention", "page_table", 1),
    ("tower_attention", "starts", 0),
}


def operations() -> list[str]:
    return sorted(name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name)))


def tensor_arguments(operation: str) -> list[str]:
    """Every tensor of a signature; those inside a Routing as `routing.order`."""
    names = []
    for name, parameter in inspect.signature(getattr(kernels, operation)).parameters.items():
        annotation = str(parameter.annotation)
        if "torch.Tensor" in annotation:
            names.append(name)
        elif annotation == "Routing":
            names += [f"{name}.{part.name}" for part in fields(Routing)]
    return names


def get(arguments: dict[str, Any], name: str) -> torch.Tensor:
    owner, _, part = name.partition(".")
    return getattr(arguments[owner], part) if part else arguments[owner]


def put(arguments: dict[str, Any], name: str, value: torch.Tensor) -> dict[str, Any]:
    owner, _, part = name.partition(".")
    return arguments | {owner: replace(arguments[owner], **{part: value}) if part else value}


def refusal(operation: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=f"^{operation}: ") as raised:
        getattr(kernels, operation)(**arguments, backend=TORCH)
    return str(raised.value)


def blamed(message: str, operation: str) -> str:
    """The argument that a message names: `OPERATION: ARGUMENT must be EXPECTED, got CAME`."""
    head, _, tail = message.removeprefix(f"{operation}: ").partition(" must ")
    assert head in tensor_arguments(operation), message
    assert ", got " in tail, message
    return head


EACH = [(operation, name) for operation in operations() for name in tensor_arguments(operation)]


def test_every_operation_has_an_example_of_all_its_tensors() -> None:
    assert set(EXAMPLES) == set(operations())
    for operation, name in EACH:
        assert isinstance(get(EXAMPLES[operation](), name), torch.Tensor), f"{operation} {name}"


@pytest.mark.parametrize("operation", EXAMPLES)
def test_the_examples_are_taken(operation: str) -> None:
    getattr(kernels, operation)(**EXAMPLES[operation](), backend=TORCH)


@pytest.mark.parametrize(("operation", "name"), EACH)
def test_a_dimension_too_many_is_refused(operation: str, name: str) -> None:
    arguments = EXAMPLES[operation]()
    wrong = get(arguments, name)[None].contiguous()
    message = refusal(operation, put(arguments, name, wrong))
    assert blamed(message, operation) == name
    assert str(list(wrong.shape)) in message


def sizes() -> Iterator[tuple[str, str, int]]:
    for operation, name in EACH:
        for dimension in range(get(EXAMPLES[operation](), name).dim()):
            if (operation, name, dimension) not in FREE:
                yield operation, name, dimension


@pytest.mark.parametrize(("operation", "name", "dimension"), list(sizes()))
def test_a_wrong_size_is_refused(operation: str, name: str, dimension: int) -> None:
    """One more in any dimension. Where several arguments share a size, any of them may be blamed."""
    arguments = EXAMPLES[operation]()
    tensor = get(arguments, name)
    wrong = torch.cat([tensor, tensor.narrow(dimension, 0, 1)], dim=dimension)
    blamed(refusal(operation, put(arguments, name, wrong)), operation)


@pytest.mark.parametrize(("operation", "name"), EACH)
def test_a_wrong_dtype_is_refused(operation: str, name: str) -> None:
    arguments = EXAMPLES[operation]()
    tensor = get(arguments, name)
    other = torch.int32 if tensor.is_floating_point() else torch.float32
    message = refusal(operation, put(arguments, name, tensor.to(other)))
    assert blamed(message, operation) == name
    assert str(other).removeprefix("torch.") in message


@pytest.mark.parametrize(("operation", "name"), EACH)
def test_two_float_dtypes_do_not_mix(operation: str, name: str) -> None:
    arguments = EXAMPLES[operation]()
    tensor = get(arguments, name)
    floats = [n for n in tensor_arguments(operation) if get(arguments, n).is_floating_point()]
    if name not in floats or operation == "glu":
        pytest.skip("no float, or the only tensor")
    message = refusal(operation, put(arguments, name, tensor.half()))
    blamed(message, operation)
    assert "float16" in message
    assert str(tensor.dtype).removeprefix("torch.") in message


@pytest.mark.parametrize(("operation", "name"), EACH)
def test_a_tensor_of_another_device_is_refused(operation: str, name: str) -> None:
    arguments = EXAMPLES[operation]()
    if len(tensor_arguments(operation)) == 1:
        pytest.skip("a tensor alone is where it is")
    message = refusal(operation, put(arguments, name, get(arguments, name).to("meta")))
    blamed(message, operation)
    assert "on meta" in message
    assert "on cpu" in message


@pytest.mark.parametrize(("operation", "name"), EACH)
def test_a_tensor_with_gaps_is_refused(operation: str, name: str) -> None:
    arguments = EXAMPLES[operation]()
    tensor = get(arguments, name)
    if tensor.numel() == 1:
        pytest.skip("one value has no gaps")
    gapped = tensor.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(gapped, tensor)
    message = refusal(operation, put(arguments, name, gapped))
    assert blamed(message, operation) == name
    assert "contiguous" in message


def test_sizes_that_must_divide() -> None:
    assert "gate_up" in refusal("glu", {"gate_up": f(T, 5)})
    arguments = EXAMPLES["paged_attention"]()
    assert "KV heads" in refusal("paged_attention", arguments | {"q": f(T, HQ + 1, HEAD)})


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("embed", "soft"),
        ("embed", "soft_rows"),
        ("pool_patches", "std_bias"),
        ("pool_patches", "std_scale"),
    ],
)
def test_what_comes_in_pairs_is_refused_alone(operation: str, name: str) -> None:
    assert name in refusal(operation, EXAMPLES[operation]() | {name: None})


def test_backends_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="cuda"):
        Backend("cuda")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exact"):
        Backend("triton", "exact")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="triton"):
        Backend("torch", "fused")
