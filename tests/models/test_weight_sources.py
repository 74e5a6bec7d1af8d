"""Weights from a seed and from another model: what a benchmark is run on."""

from __future__ import annotations

import pytest
import tiny
import torch

from gemcut.errors import ConfigError
from gemcut.kernels import Backend
from gemcut.models.gemma4.model import Gemma4
from gemcut.models.weight_sources import RandomWeights, SharedWeights, WeightSource, draw
from gemcut.plan import ModelPlan, parameter_count, parse_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan() -> ModelPlan:
    return parse_config(tiny.make_config("moe").to_dict(), allow_unknown=True)


def filled(plan: ModelPlan, source: WeightSource, dtype: torch.dtype = torch.float32) -> Gemma4:
    with torch.device("meta"):
        model = Gemma4(plan, Backend())
    source.fill(model, plan, device=CPU, dtype=dtype)
    return model


def test_vectors_are_one_and_the_rest_is_normal(plan: ModelPlan) -> None:
    model = filled(plan, RandomWeights(0))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    assert all((p == 1.0).all() for p in model.parameters() if p.dim() < 2)
    values = torch.cat([p.flatten() for p in matrices])
    assert values.mean().abs() < 1e-3
    assert values.std() == pytest.approx(0.02, rel=0.02)


def test_the_report_counts_what_was_filled(plan: ModelPlan) -> None:
    with torch.device("meta"):
        model = Gemma4(plan, Backend())
    report = RandomWeights().fill(model, plan, device=CPU, dtype=torch.bfloat16)
    assert report.bytes == 2 * parameter_count(plan)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_values_follow_from_seed_and_name_alone(plan: ModelPlan) -> None:
    first, again, other = (filled(plan, RandomWeights(seed)) for seed in (3, 3, 4))
    name = "language_model.layers.1.self_attn.qkv_proj.weight"
    fused = first.state_dict()[name]
    assert torch.equal(fused, again.state_dict()[name])
    assert not torch.equal(fused, other.state_dict()[name])
    # the k rows, drawn alone as another implementation would, under the checkpoint's name
    q_rows = plan.text.layers[1].q_heads * plan.text.layers[1].head_dim
    k_rows = plan.text.layers[1].kv_heads * plan.text.layers[1].head_dim
    alone = torch.empty(k_rows, plan.text.hidden)
    draw(alone, "model.language_model.layers.1.self_attn.k_proj.weight", 3)
    assert torch.equal(fused[q_rows : q_rows + k_rows], alone)


def test_shared_weights_are_one_set_in_memory(plan: ModelPlan) -> None:
    owner = filled(plan, RandomWeights())
    sharer = filled(plan, SharedWeights(owner))
    places = {name: value.data_ptr() for name, value in owner.state_dict().items()}
    assert {name: value.data_ptr() for name, value in sharer.state_dict().items()} == places


def test_shared_weights_are_not_cast(plan: ModelPlan) -> None:
    owner = filled(plan, RandomWeights())
    with pytest.raises(ConfigError, match=r"are torch.float32 on cpu, wanted are torch.bfloat16"):
        filled(plan, SharedWeights(owner), torch.bfloat16)
