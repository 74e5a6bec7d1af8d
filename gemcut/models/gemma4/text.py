"""The decoder. One line per segment, labelled with the letters of spec 2.6: the listing is the kernel map.

x is the residual stream, h is x normed for this layer by the operation that closed the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from gemcut.kernels import (
    Backend,
    add_norm,
    add_norm_moe,
    add_normed,
    close_layer,
    close_layer_moe,
    embed,
    gate_per_layer,
    glu,
    grouped_glu,
    grouped_linear,
    logits,
    paged_attention,
    per_layer_inputs,
    prepare_q,
    prepare_qkv,
    rope_table,
    route_experts,
)
from gemcut.models.batch import Batch, LayerKV, PagedRows
from gemcut.nn.linear import FusedLinear, Linear
from gemcut.nn.norm import Norm
from gemcut.nn.rope import text_inv_freq
from gemcut.plan import ExpertsPlan, LayerPlan, TextPlan

Attend = Callable[..., torch.Tensor]  # called as `paged_attention` is: where a runner cuts graphs


class Attention(nn.Module):
    """q, k, v to pages, attention over them, output projection. A layer that reads another one's K and V
    (spec 2.3) has q alone."""

    def __init__(self, text: TextPlan, layer: LayerPlan, backend: Backend) -> None:
        super().__init__()
        q_width, kv_width = layer.q_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        self.q_norm = Norm(layer.head_dim)
        if layer.owns_kv:
            sources = [("q_proj", q_width), ("k_proj", kv_width)]
            if not layer.k_eq_v:
                sources.append(("v_proj", kv_width))
            self.qkv_proj = FusedLinear(text.hidden, tuple(sources), backend)
            self.k_norm = Norm(layer.head_dim)
        else:
            self.q_proj = Linear(text.hidden, q_width, backend)
        self.o_proj = Linear(q_width, text.hidden, backend)
        self.layer, self.eps, self.backend = layer, text.eps, backend
        self.sees_blocks = text.bidirectional_vision and layer.kind == "sliding"

    def forward(
        self,
        h: torch.Tensor,
        rope: torch.Tensor,
        rows: PagedRows,
        kv: LayerKV,
        batch: Batch,
        attend: Attend = paged_attention,
    ) -> torch.Tensor:
        if self.layer.owns_kv:
            q = prepare_qkv(  # B
                self.qkv_proj(h),  # G1
                self.q_norm.weight,
                self.k_norm.weight,
                rope,
                rows.slots,
                kv.k_pages,
                kv.v_pages,
                q_heads=self.layer.q_heads,
                eps=self.eps,
                backend=self.backend,
            )
        else:
            q = prepare_q(  # B'
                self.q_proj(h),  # G1
                self.q_norm.weight,
                rope,
                eps=self.eps,
                backend=self.backend,
            )
        o = attend(
            q,
            kv.k_pages,
            kv.v_pages,
            rows.table,
            batch.query_start,
            batch.seq_lens,
            batch.spans if self.sees_blocks else None,
            window=self.layer.window,
            backend=self.backend,
        )
        return self.o_proj(o.flatten(1))  # G2


class DenseMLP(nn.Module):
    def __init__(self, hidden: int, width: int, backend: Backend) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear(hidden, (("gate_proj", width), ("up_proj", width)), backend)
        self.down_proj = Linear(width, hidden, backend)
        self.backend = backend

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down_proj(glu(self.gate_up_proj(h), backend=self.backend))  # G3, D, G4


class Router(nn.Module):
    """Parameters of the router; `scale` is used by the segment before it."""

    def __init__(self, hidden: int, experts: ExpertsPlan, backend: Backend) -> None:
        super().__init__()
        self.proj = Linear(hidden, experts.count, backend)
        self.scale = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.per_expert_scale = nn.Parameter(torch.empty(experts.count), requires_grad=False)


class Experts(nn.Module):
    """All experts' weights, stacked as in the checkpoint: gate rows before up rows."""

    def __init__(self, hidden: int, experts: ExpertsPlan) -> None:
        super().__init__()
        shape = experts.count, 2 * experts.width, hidden
        self.gate_up_proj = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(experts.count, hidden, experts.width), requires_grad=False)


class DenseLayer(nn.Module):
    """A decoder layer with a dense MLP."""

    def __init__(self, text: TextPlan, layer: LayerPlan, backend: Backend) -> None:
        super().__init__()
        self.input_layernorm = Norm(text.hidden)
        self.self_attn = Attention(text, layer, backend)
        self.post_attention_layernorm = Norm(text.hidden)
        self.pre_feedforward_layernorm = Norm(text.hidden)
        self.mlp = DenseMLP(text.hidden, layer.ff_width, backend)
        self.post_feedforward_layernorm = Norm(text.hidden)
        self.layer_scalar = nn.Parameter(torch.empty(1), requires_grad=False)
        self.eps, self.backend = text.eps, backend

    def forward(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        next_norm: Norm,
        rope: torch.Tensor,
        rows: PagedRows,
        kv: LayerKV,
        batch: Batch,
        attend: Attend = paged_attention,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, h: [T, H]. inputs: [T, W], the layer's own inputs, in models that have them.

        Returns the stream after this layer, and normed by `next_norm`.
        """
        a = self.self_attn(h, rope, rows, kv, batch, attend)
        x, h = add_norm(  # C
            x,
            a,
            self.post_attention_layernorm.weight,
            self.pre_feedforward_layernorm.weight,
            eps=self.eps,
            backend=self.backend,
        )
        return close_layer(  # E
            x,
            self.mlp(h),
            self.post_feedforward_layernorm.weight,
            self.layer_scalar,
            next_norm.weight,
            eps=self.eps,
            backend=self.backend,
        )


class GatedLayer(DenseLayer):
    """A decoder layer that ends with inputs of its own, gated by the stream (spec 2.5)."""

    def __init__(self, text: TextPlan, layer: LayerPlan, width: int, backend: Backend) -> None:
        super().__init__(text, layer, backend)
        self.per_layer_input_gate = Linear(text.hidden, width, backend)
        self.per_layer_projection = Linear(width, text.hidden, backend)
        self.post_per_layer_input_norm = Norm(text.hidden)

    def forward(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        next_norm: Norm,
        rope: torch.Tensor,
        rows: PagedRows,
        kv: LayerKV,
        batch: Batch,
        attend: Attend = paged_attention,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert inputs is not None, "this layer has inputs of its own"
        a = self.self_attn(h, rope, rows, kv, batch, attend)
        x, h = add_norm(  # C
            x,
            a,
            self.post_attention_layernorm.weight,
            self.pre_feedforward_layernorm.weight,
            eps=self.eps,
            backend=self.backend,
        )
        x = add_normed(  # P1
            x,
            self.mlp(h),
            self.post_feedforward_layernorm.weight,
            eps=self.eps,
            backend=self.backend,
        )
        g = gate_per_layer(self.per_layer_input_gate(x), inputs, backend=self.backend)  # P2
        return close_layer(  # P3
            x,
            self.per_layer_projection(g),
            self.post_per_layer_input_norm.weight,
            self.layer_scalar,
            next_norm.weight,
            eps=self.eps,
            backend=self.backend,
        )


class MoELayer(DenseLayer):
    """A decoder layer with experts beside its dense MLP (spec 2.4)."""

    def __init__(self, text: TextPlan, layer: LayerPlan, experts: ExpertsPlan, backend: Backend) -> None:
        super().__init__(text, layer, backend)
        self.pre_feedforward_layernorm_2 = Norm(text.hidden)
        self.router = Router(text.hidden, experts, backend)
        self.experts = Experts(text.hidden, experts)
        self.post_feedforward_layernorm_1 = Norm(text.hidden)
        self.post_feedforward_layernorm_2 = Norm(text.hidden)
        self.top_k = experts.top_k

    def forward(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        next_norm: Norm,
        rope: torch.Tensor,
        rows: PagedRows,
        kv: LayerKV,
        batch: Batch,
        attend: Attend = paged_attention,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.self_attn(h, rope, rows, kv, batch, attend)
        x, h, r, e = add_norm_moe(  # C-MoE
            x,
            a,
            self.post_attention_layernorm.weight,
            self.pre_feedforward_layernorm.weight,
            self.router.scale,
            self.pre_feedforward_layernorm_2.weight,
            eps=self.eps,
            backend=self.backend,
        )
        d = self.mlp(h)
        routing = route_experts(  # RT
            r,
            self.router.proj.weight,
            self.router.per_expert_scale,
            batch.query_start[-1:],
            top_k=self.top_k,
            backend=self.backend,
        )
        m = grouped_glu(e, self.experts.gate_up_proj, routing, backend=self.backend)  # D-exp
        t = grouped_linear(m, self.experts.down_proj, routing, backend=self.backend)
        return close_layer_moe(  # E-MoE
            x,
            d,
            t,
            routing.weights,
            self.post_feedforward_layernorm_1.weight,
            self.post_feedforward_layernorm_2.weight,
            self.post_feedforward_layernorm.weight,
            self.layer_scalar,
            next_norm.weight,
            eps=self.eps,
            backend=self.backend,
        )


class Embedding(nn.Module):
    """weight [V, H]: input embedding and, tied, the head; or [V, L W], that of all layers' own inputs."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden), requires_grad=False)


class Decoder(nn.Module):
    """The text backbone: token ids and soft tokens in, logits out."""

    def __init__(self, plan: TextPlan, pad_id: int, backend: Backend) -> None:
        """pad_id: whose per-layer inputs soft tokens have, in models with such inputs."""
        super().__init__()
        self.embed_tokens = Embedding(plan.vocab, plan.hidden)
        own = plan.per_layer_input
        if own is not None:
            total = own.width * len(plan.layers)
            self.embed_tokens_per_layer = Embedding(own.vocab, total)
            self.per_layer_model_projection = Linear(plan.hidden, total, backend)
            self.per_layer_projection_norm = Norm(own.width)
        self.layers = nn.ModuleList(_layer(plan, layer, backend) for layer in plan.layers)
        self.norm = Norm(plan.hidden)
        self.plan, self.pad_id, self.backend = plan, pad_id, backend

    def forward(self, batch: Batch, kv: Sequence[LayerKV], attend: Attend = paged_attention) -> torch.Tensor:
        """Run one step; K and V are written to the pages of `kv`, one entry a layer.

        attend: called for `paged_attention`, with its arguments, by whoever does other things there as well.
        Returns the final normed hidden states [T, H].
        """
        # angles of each layer kind, once a step
        ropes = {
            layer.kind: rope_table(
                batch.positions,
                text_inv_freq(layer.rope, batch.positions.device),
                self.embed_tokens.weight.dtype,
                backend=self.backend,
            )
            for layer in {layer.kind: layer for layer in self.plan.layers}.values()
        }
        layers = cast("list[DenseLayer]", list(self.layers))
        norms = [layer.input_layernorm for layer in layers] + [self.norm]
        x, h = embed(  # S0
            batch.token_ids,
            self.embed_tokens.weight,
            batch.soft,
            batch.soft_rows,
            norms[0].weight,
            eps=self.plan.eps,
            backend=self.backend,
        )
        inputs = None
        if self.plan.per_layer_input is not None:
            inputs = per_layer_inputs(  # S1
                self.per_layer_model_projection(x),
                batch.token_ids,
                self.embed_tokens_per_layer.weight,
                batch.soft_rows,
                self.per_layer_projection_norm.weight,
                hidden=self.plan.hidden,
                pad_id=self.pad_id,
                eps=self.plan.eps,
                backend=self.backend,
            )
        for i, (plan, layer, next_norm) in enumerate(zip(self.plan.layers, layers, norms[1:], strict=True)):
            rows = batch.sliding if plan.kind == "sliding" else batch.full
            x, h = layer(
                x,
                h,
                next_norm,
                ropes[plan.kind],
                rows,
                kv[plan.kv_layer],
                batch,
                attend,
                None if inputs is None else inputs[i],
            )
        return h

    def logits(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft-capped logits of final hidden states. h: [L, H].

        Returns (logits [L, V] fp32, the maxima of their blocks as `kernels.block_maxima` has them).
        """
        return logits(h, self.embed_tokens.weight, softcap=self.plan.softcap, backend=self.backend)  # Z


def _layer(text: TextPlan, layer: LayerPlan, backend: Backend) -> DenseLayer:
    if layer.experts is not None:
        return MoELayer(text, layer, layer.experts, backend)
    if text.per_layer_input is not None:
        return GatedLayer(text, layer, text.per_layer_input.width, backend)
    return DenseLayer(text, layer, backend)
