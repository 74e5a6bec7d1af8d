"""Names, shapes and totals of a checkpoint, against spec 8 and transformers' models on the meta device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
import transformers
from sizes import SIZES, config

from gemcut.plan import canonical_name, is_dead_tensor, parameter_count, parse_config, tensor_shapes

# spec 8.2: column "transformers instance", and how many values the hub's files have beyond it
TOTALS = {
    "E2B": 5_104_298_467,
    "E4B": 7_941_101_802,
    "12B": 11_959_730_224,
    "26B-A4B": 25_805_936_206,
    "31B": 31_273_088_876,
}
DEAD_VALUES = {"E2B": 18_880_512, "E4B": 55_055_616}


def state_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """transformers' state, the tied head left out."""
    return {
        name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"
    }


@pytest.mark.parametrize("size", SIZES)
def test_totals_are_those_of_the_spec(size: str) -> None:
    assert parameter_count(parse_config(config(size))) == TOTALS[size]


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_those_of_transformers(size: str) -> None:
    if size == "12B":
        reference = transformers.Gemma4UnifiedConfig(**config(size))
        model_class: Any = transformers.Gemma4UnifiedForConditionalGeneration
    else:
        reference = transformers.Gemma4Config(**config(size))
        model_class = transformers.Gemma4ForConditionalGeneration
    with torch.device("meta"):
        model = model_class(reference)
    assert tensor_shapes(parse_config(config(size))) == state_shapes(model)


@pytest.mark.parametrize("kind", ["dense", "moe", "ple"])
def test_text_only_names_and_shapes_are_those_of_transformers(kind: str) -> None:
    reference = tiny.make_config(kind, text_only=True)
    with torch.device("meta"):
        model = transformers.Gemma4ForCausalLM(reference)
    assert tensor_shapes(parse_config(reference.to_dict())) == state_shapes(model)


@pytest.mark.parametrize("size", SIZES)
def test_dead_tensors_are_those_of_kv_shared_layers(size: str) -> None:
    plan = parse_config(config(size))
    shapes = tensor_shapes(plan)
    assert not any(is_dead_tensor(plan, name) for name in shapes)
    dead = 0
    for layer in plan.text.layers:
        at = f"model.language_model.layers.{layer.index}.self_attn."
        kv = {
            "k_proj.weight": layer.kv_heads * layer.head_dim * plan.text.hidden,
            "v_proj.weight": layer.kv_heads * layer.head_dim * plan.text.hidden,
            "k_norm.weight": layer.head_dim,
        }
        for name, count in kv.items():
            assert is_dead_tensor(plan, at + name) == (not layer.owns_kv)
            dead += count if at + name not in shapes and not layer.k_eq_v else 0
    assert dead == DEAD_VALUES.get(size, 0)


def test_nothing_else_is_dead() -> None:
    plan = parse_config(config("E2B"))
    at = "model.language_model.layers."
    for name in ("20.self_attn.q_proj.weight", "35.self_attn.k_proj.weight", "20.self_attn.k_proj.bias"):
        assert not is_dead_tensor(plan, at + name)
    assert not is_dead_tensor(plan, "model.layers.20.self_attn.k_proj.weight")


def test_clip_bounds_of_the_small_sizes_are_scalars() -> None:
    for size, count in (("E2B", 928), ("E4B", 928), ("31B", 0)):
        shapes = tensor_shapes(parse_config(config(size)))
        assert sum(shape == () for shape in shapes.values()) == count


def test_both_spellings_of_the_unified_embedder_have_one_name() -> None:
    plan = parse_config(config("12B"))
    shapes = tensor_shapes(plan)
    on_disk = {
        "model.vision_embedder.patch_dense.weight": (3840, 6912),
        "model.vision_embedder.pos_embedding": (1120, 2, 3840),
        "model.vision_embedder.pos_norm.bias": (3840,),
        "model.embed_vision.embedding_projection.weight": (3840, 3840),
    }
    for name, shape in on_disk.items():
        assert shapes[canonical_name(plan, name)] == shape
    assert all(canonical_name(plan, name) == name for name in shapes)
    dense = parse_config(config("31B"))
    assert all(canonical_name(dense, name) == name for name in tensor_shapes(dense))
    assert math.prod(shapes["model.embed_audio.embedding_projection.weight"]) == 3840 * 640
