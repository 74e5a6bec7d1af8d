"""Bytes and FLOPs of a forward, from the plan alone: the denominators of every benchmark.

A cost is the least that any implementation must do: each weight read once, activations written and
read once between products, each visible query-key pair computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gemcut.data import PATCH, POOL
from gemcut.plan.facts import LayerKind, LayerPlan, ModelPlan, TextPlan
from gemcut.plan.tensors import parameter_count

PARTS = ("qkv_o", "attention", "dense", "experts", "norms", "head")


@dataclass(slots=True)
class Work:
    """Bytes moved through device memory and floating-point operations, for each part of a forward."""

    bytes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, part: str, bytes_: float, flops: float = 0.0) -> None:
        self.bytes[part] += bytes_
        self.flops[part] += flops

    def floor_s(self, bandwidth: float, rate: float) -> float:
        """Seconds if the parts run one after another, each at the slower of its two ceilings.

        bandwidth in bytes/s, rate in FLOP/s.
        """
        return sum(max(self.bytes[part] / bandwidth, self.flops[part] / rate) for part in PARTS)


def weight_bytes(plan: ModelPlan, bytes_per_value: int = 2) -> int:
    """Bytes of all weights in a dtype of `bytes_per_value`."""
    return parameter_count(plan) * bytes_per_value


def kv_bytes_per_token(text: TextPlan, kind: LayerKind, bytes_per_value: int = 2) -> int:
    """KV bytes that one position takes in all own-KV layers of `kind` (spec 2.7)."""
    return sum(2 * layer.kv_heads * layer.head_dim * bytes_per_value for layer in text.owners(kind))


def kv_bytes(text: TextPlan, tokens: int, bytes_per_value: int = 2) -> int:
    """KV bytes of one sequence of `tokens`: full layers hold all of it, sliding layers a window."""
    seen = min(tokens, text.window) if text.window is not None else 0
    full = kv_bytes_per_token(text, "full", bytes_per_value)
    return full * tokens + kv_bytes_per_token(text, "sliding", bytes_per_value) * seen


def visible_pairs(count: int, past: int, window: int | None) -> int:
    """Query-key pairs when `count` queries follow `past` cached tokens (causal, within the window)."""
    first, last = past + 1, past + count
    if window is None or last <= window:
        return (first + last) * count // 2
    if first >= window:
        return window * count
    ramp = window - first
    return (first + window - 1) * ramp // 2 + window * (count - ramp)


def distinct_experts(layer: LayerPlan, tokens: int) -> float:
    """Experts that `tokens` tokens touch when each picks its top k uniformly: the worst case."""
    if layer.experts is None:
        return 0.0
    share = layer.experts.top_k / layer.experts.count
    return layer.experts.count * (1.0 - (1.0 - share) ** tokens)


def attention_values(text: TextPlan, layer: LayerPlan) -> int:
    """Values in a layer's q, k, v and o projections."""
    kv_projections = (1 if layer.k_eq_v else 2) if layer.owns_kv else 0
    return text.hidden * layer.head_dim * (2 * layer.q_heads + kv_projections * layer.kv_heads)


def forward_work(
    plan: ModelPlan,
    sequences: int,
    count: int,
    past: int,
    logits_per_sequence: int = 1,
    *,
    experts: float | None = None,
    width: int = 2,
) -> Work:
    """Work of one pass of the decoder over `sequences` rows of `count` new tokens on `past` cached ones.

    `experts`: how many each layer was seen to touch; by default the worst case, uniform routing. `width`:
    bytes of a weight, activation or KV value. Text models without per-layer inputs.
    """
    text, work, tokens = plan.text, Work(), sequences * count
    hidden = text.hidden
    for layer in text.layers:
        q_width = layer.q_heads * layer.head_dim
        kv_width = layer.kv_heads * layer.head_dim * (1 if layer.k_eq_v else 2)
        values = attention_values(text, layer)
        activations = tokens * (2 * hidden + 2 * q_width + kv_width)
        work.add("qkv_o", width * (values + activations), 2.0 * values * tokens)
        cached = 2 * layer.kv_heads * layer.head_dim
        seen = past + count if layer.window is None else min(past + count, layer.window + count - 1)
        pairs = sequences * visible_pairs(count, past, layer.window)
        work.add(
            "attention",
            width * (sequences * seen * cached + tokens * (cached + 2 * q_width + kv_width)),
            4.0 * q_width * pairs,
        )
        values = 3 * hidden * layer.ff_width
        work.add("dense", width * (values + tokens * 2 * (hidden + layer.ff_width)), 2.0 * values * tokens)
        if layer.experts is not None:
            expert, router = 3 * hidden * layer.experts.width, hidden * layer.experts.count
            top_k = layer.experts.top_k
            # the partial outputs of the experts are written once and read once by the tail norm
            partial = 2 * top_k * hidden if tokens > 1 else hidden
            activations = tokens * (2 * hidden + 2 * top_k * layer.experts.width + partial)
            touched = distinct_experts(layer, tokens) if experts is None else experts
            read = touched * expert + router
            work.add("experts", width * (read + activations), 2.0 * tokens * (top_k * expert + router))
        work.add("norms", width * tokens * 9 * hidden)
    rows = sequences * logits_per_sequence
    head = text.vocab * hidden
    work.add("head", width * (head + rows * (text.vocab + hidden)), 2.0 * head * rows)
    return work


def tower_work(plan: ModelPlan, pictures: int, patches: int, *, width: int = 2) -> Work:
    """Work of the vision tower and the projector over pictures of `patches` patches each (spec 4.2, 4.3)."""
    vision, work, tokens = plan.vision, Work(), pictures * patches
    assert vision is not None, "a model with a vision tower"
    hidden, inner = vision.hidden, vision.heads * vision.head_dim
    values = 4 * hidden * inner
    work.add(
        "qkv_o",
        vision.layers * width * (values + tokens * (2 * hidden + 4 * inner)),
        vision.layers * 2.0 * values * tokens,
    )
    work.add(
        "attention",
        vision.layers * width * tokens * 4 * inner,
        vision.layers * 4.0 * inner * pictures * patches**2,
    )
    values = 3 * hidden * vision.ff_width
    work.add(
        "dense",
        vision.layers * width * (values + tokens * 2 * (hidden + vision.ff_width)),
        vision.layers * 2.0 * values * tokens,
    )
    # Norms add nothing: a picture's stream stays in the cache. The patch embedding comes before the layers,
    # pooling and the projector after.
    soft = tokens // (POOL * POOL)
    embedding, projector = 3 * PATCH * PATCH * hidden, hidden * plan.text.hidden
    work.add("head", width * (embedding + tokens * 2 * hidden), 2.0 * embedding * tokens)
    work.add("head", width * (projector + soft * (hidden + plan.text.hidden)), 2.0 * projector * soft)
    return work


def batch_work(
    plan: ModelPlan, requests: int, prompt: int, answer: int, at_once: int, chunk: int, *, width: int = 2
) -> list[tuple[int, Work]]:
    """Work of an offline batch: prompts in steps of `chunk` tokens, then `at_once` answers side by side until
    all have their tokens, wave by wave. A list of (times, work of one such step)."""
    steps: list[tuple[int, Work]] = []
    left = requests
    while left:
        wave = min(left, at_once)
        rows = max(1, chunk // prompt)
        whole, rest = divmod(wave, min(rows, wave))
        steps.append((whole, forward_work(plan, min(rows, wave), prompt, 0, width=width)))
        if rest:
            steps.append((1, forward_work(plan, rest, prompt, 0, width=width)))
        steps += [(1, forward_work(plan, wave, 1, prompt + i, width=width)) for i in range(answer - 1)]
        left -= wave
    return steps
