"""The released sizes without weights: each parameter of the plan is there, once, and has its tensor."""

from __future__ import annotations

import math

import pytest
import torch
from sizes import config

from gemcut.errors import ConfigError
from gemcut.kernels import Backend
from gemcut.models.gemma4.model import Gemma4
from gemcut.plan import parameter_count, parse_config, tensor_shapes

BUILT = ("26B-A4B", "31B")


def build(size: str) -> Gemma4:
    with torch.device("meta"):
        return Gemma4(parse_config(config(size)), Backend())


@pytest.mark.parametrize("size", BUILT)
def test_the_state_holds_each_parameter_of_the_plan_once(size: str) -> None:
    model = build(size)
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert set(state) == set(parameters)  # no buffer needs loading
    assert len({id(p) for p in parameters.values()}) == len(parameters)
    assert all(p.is_meta and not p.requires_grad for p in parameters.values())
    assert sum(value.numel() for value in state.values()) == parameter_count(model.plan)


@pytest.mark.parametrize("size", BUILT)
def test_the_checkpoints_tensors_fill_every_row_once(size: str) -> None:
    model = build(size)
    shapes, places = tensor_shapes(model.plan), model.checkpoint_map()
    assert set(places) == set(shapes)
    state = model.state_dict()
    filled: dict[str, list[tuple[int, int]]] = {name: [] for name in state}
    for name, place in places.items():
        target, shape = state[place.parameter], shapes[name]
        assert place.stop is not None
        assert place.stop - place.start == shape[0], name
        assert tuple(target.shape[1:]) == tuple(shape[1:]), name
        filled[place.parameter].append((place.start, place.stop))
    for parameter, runs in filled.items():
        begin = 0
        for start, stop in sorted(runs):
            assert start == begin, parameter
            begin = stop
        assert begin == state[parameter].shape[0], parameter
    assert sum(math.prod(shape) for shape in shapes.values()) == sum(v.numel() for v in state.values())


@pytest.mark.parametrize("size", BUILT)
def test_gate_comes_before_up_and_query_before_key_and_value(size: str) -> None:
    """Rows of the fused products, by the order that the operations split them in."""
    places = build(size).checkpoint_map()
    for layer, names in ((0, "qkv"), (5, "qk")):  # full layers have no V product (k_eq_v)
        at = f"model.language_model.layers.{layer}.self_attn."
        starts = [places[f"{at}{name}_proj.weight"].start for name in names]
        assert starts == sorted(set(starts))
        assert f"{at}v_proj.weight" not in places or "v" in names
    at = "model.language_model.layers.0.mlp."
    assert places[f"{at}gate_proj.weight"].start == 0
    assert places[f"{at}up_proj.weight"].start == places[f"{at}gate_proj.weight"].stop
    at = "model.vision_tower.encoder.layers.0."
    starts = [places[f"{at}self_attn.{name}_proj.linear.weight"].start for name in "qkv"]
    assert starts == sorted(set(starts))
    assert places[f"{at}mlp.gate_proj.linear.weight"].start == 0


@pytest.mark.parametrize(
    ("size", "missing"),
    [
        ("E2B", ["clipped linears", "audio tower"]),
        ("E4B", ["clipped linears", "audio tower"]),
        ("12B", ["encoder-free"]),
    ],
)
def test_sizes_that_are_not_built_are_refused_by_what_they_need(size: str, missing: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        build(size)
    for part in missing:
        assert part in str(raised.value)
    # what the model has and gemcut builds is not blamed
    absent = {"12B": ["clipped", "audio tower"]}.get(size, ["encoder-free", "per-layer"])
    assert not any(part in str(raised.value) for part in absent)
