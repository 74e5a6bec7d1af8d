"""The vision tower of 26B-A4B and 31B: packed patches in, features of the soft tokens out (spec 4.2, 4.3)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from gemcut.data import PATCH
from gemcut.kernels import (
    Backend,
    add_norm,
    add_positions,
    glu,
    pool_patches,
    prepare_tower_qkv,
    rope_table,
    scale_patches,
    tower_attention,
)
from gemcut.models.batch import Patches
from gemcut.nn.linear import FusedLinear, Linear
from gemcut.nn.norm import Norm
from gemcut.nn.rope import tower_inv_freq
from gemcut.plan import VisionPlan


class TowerAttention(nn.Module):
    def __init__(self, plan: VisionPlan, backend: Backend) -> None:
        super().__init__()
        inner = plan.heads * plan.head_dim
        sources = (("q_proj.linear", inner), ("k_proj.linear", inner), ("v_proj.linear", inner))
        self.qkv_proj = FusedLinear(plan.hidden, sources, backend)
        self.q_norm, self.k_norm = Norm(plan.head_dim), Norm(plan.head_dim)
        self.o_proj = FusedLinear(inner, (("o_proj.linear", plan.hidden),), backend)
        self.eps, self.backend = plan.eps, backend

    def forward(
        self, h: torch.Tensor, ropes: tuple[torch.Tensor, torch.Tensor], starts: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = prepare_tower_qkv(
            self.qkv_proj(h),
            self.q_norm.weight,
            self.k_norm.weight,
            *ropes,
            eps=self.eps,
            backend=self.backend,
        )
        return self.o_proj(tower_attention(q, k, v, starts, backend=self.backend).flatten(1))


class TowerMLP(nn.Module):
    def __init__(self, plan: VisionPlan, backend: Backend) -> None:
        super().__init__()
        sources = (("gate_proj.linear", plan.ff_width), ("up_proj.linear", plan.ff_width))
        self.gate_up_proj = FusedLinear(plan.hidden, sources, backend)
        self.down_proj = FusedLinear(plan.ff_width, (("down_proj.linear", plan.hidden),), backend)
        self.backend = backend

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down_proj(glu(self.gate_up_proj(h), backend=self.backend))


class TowerLayer(nn.Module):
    def __init__(self, plan: VisionPlan, backend: Backend) -> None:
        super().__init__()
        self.input_layernorm = Norm(plan.hidden)
        self.self_attn = TowerAttention(plan, backend)
        self.post_attention_layernorm = Norm(plan.hidden)
        self.pre_feedforward_layernorm = Norm(plan.hidden)
        self.mlp = TowerMLP(plan, backend)
        self.post_feedforward_layernorm = Norm(plan.hidden)
        self.eps, self.backend = plan.eps, backend

    def forward(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        next_norm: torch.Tensor,
        ropes: tuple[torch.Tensor, torch.Tensor],
        starts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = add_norm(
            x,
            self.self_attn(h, ropes, starts),
            self.post_attention_layernorm.weight,
            self.pre_feedforward_layernorm.weight,
            eps=self.eps,
            backend=self.backend,
        )
        return add_norm(
            x,
            self.mlp(h),
            self.post_feedforward_layernorm.weight,
            next_norm,
            eps=self.eps,
            backend=self.backend,
        )


class PatchEmbedder(nn.Module):
    def __init__(self, plan: VisionPlan, backend: Backend) -> None:
        super().__init__()
        self.input_proj = Linear(3 * PATCH * PATCH, plan.hidden, backend)
        table = torch.empty(2, plan.positions, plan.hidden)
        self.position_embedding_table = nn.Parameter(table, requires_grad=False)


class TowerLayers(nn.Module):
    def __init__(self, plan: VisionPlan, backend: Backend) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(plan, backend) for _ in range(plan.layers))


class VisionTower(nn.Module):
    """Patches to pooled, standardised and normed features, ready for the projector."""

    def __init__(self, plan: VisionPlan, backend: Backend) -> None:
        super().__init__()
        self.patch_embedder = PatchEmbedder(plan, backend)
        self.encoder = TowerLayers(plan, backend)
        if plan.standardize:
            self.std_bias = nn.Parameter(torch.empty(plan.hidden), requires_grad=False)
            self.std_scale = nn.Parameter(torch.empty(plan.hidden), requires_grad=False)
        else:
            self.std_bias = self.std_scale = None
        self.plan, self.backend = plan, backend

    def forward(self, patches: Patches) -> torch.Tensor:
        """Returns [S, hidden], the soft tokens of all pictures in order, under the projector's norm."""
        plan, backend = self.plan, self.backend
        embedder = self.patch_embedder
        dtype = embedder.input_proj.weight.dtype
        layers = cast("list[TowerLayer]", list(self.encoder.layers))
        inv_freq = tower_inv_freq(plan.rope_theta, plan.head_dim, patches.pixels.device)
        columns, rows = patches.positions.unbind(dim=1)
        ropes = (
            rope_table(columns.contiguous(), inv_freq, dtype, backend=backend),
            rope_table(rows.contiguous(), inv_freq, dtype, backend=backend),
        )
        x, h = add_positions(
            embedder.input_proj(scale_patches(patches.pixels, dtype, backend=backend)),
            embedder.position_embedding_table,
            patches.positions,
            layers[0].input_layernorm.weight,
            eps=plan.eps,
            backend=backend,
        )
        for i, layer in enumerate(layers):
            # nothing norms the stream after the last layer: its second output is not read
            following = layers[min(i + 1, len(layers) - 1)].input_layernorm.weight
            x, h = layer(x, h, following, ropes, patches.starts)
        return pool_patches(
            x, patches.cells, patches.starts, self.std_bias, self.std_scale, eps=plan.eps, backend=backend
        )
