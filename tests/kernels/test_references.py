"""The torch references against formulas of spec 2 and 4, written out in fp64.

`stage` rounds where the spec rounds. In fp32 an operation then agrees to a few parts in 10^7; in bf16 nearly
all values are equal, and where a sum lies next to a rounding boundary they are one ulp apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from gemcut import kernels
from gemcut.kernels import Backend, Routing
from gemcut.kernels.add_norm.op import rms_norm

TORCH = Backend()
BACKENDS = [TORCH, Backend(deterministic=True)]
EPS = 1e-6
T, H = 37, 24
NAN = float("nan")

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
both_orders = pytest.mark.parametrize("backend", BACKENDS, ids=["plain", "deterministic"])


def f(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, shift: float = 0.0, scale: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype)


def stage(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).double()


def norm(x: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """n(x; w) of an fp64 tensor, rounded once."""
    out = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return stage(out if weight is None else out * weight.double(), dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def assert_near(
    got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, *, ulps: float = 1.0, equal: float = 0.97
) -> None:
    """want: fp64. bf16: within so many ulps of the larger of a value and its row's mean, most are equal."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    difference = (got.double() - want).abs()
    scale = torch.maximum(want.abs(), want.square().mean(-1, keepdim=True).sqrt())
    if dtype == torch.float32:
        assert (difference <= 2e-6 * scale).all(), (difference / scale).max()
        return
    assert (difference <= ulps * torch.exp2(torch.floor(torch.log2(scale)) - 7)).all()
    assert (difference == 0).double().mean() >= equal


# ---- norms and tails


@both_dtypes
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(dtype: torch.dtype, weighted: bool) -> None:
    x = f(T, H, dtype=dtype, scale=30.0)
    weight = f(H, dtype=dtype, shift=1.0) if weighted else None
    assert_near(rms_norm(x, weight, EPS), norm(x.double(), weight, dtype), dtype)
    # epsilon counts where the row is small, and keeps a row of zeros at zero
    small = torch.full((1, H), 1e-3, dtype=torch.float32)
    assert rms_norm(small, None, EPS)[0, 0] == pytest.approx(1e-3 / math.sqrt(2e-6), rel=1e-6)
    assert not rms_norm(torch.zeros(1, H), None, EPS).any()


@both_dtypes
def test_add_norm(dtype: torch.dtype) -> None:
    x, a = f(T, H, dtype=dtype), f(T, H, dtype=dtype, seed=1)
    post, following = f(H, dtype=dtype, seed=2), f(H, dtype=dtype, seed=3)
    x1, h = kernels.add_norm(x, a, post, following, eps=EPS, backend=TORCH)
    want = stage(x.double() + norm(a.double(), post, dtype), dtype)
    assert_near(x1, want, dtype)
    assert_near(h, norm(x1.double(), following, dtype), dtype)


@both_dtypes
def test_add_norm_moe(dtype: torch.dtype) -> None:
    x, a = f(T, H, dtype=dtype), f(T, H, dtype=dtype, seed=1)
    post, following, scale, expert = (f(H, dtype=dtype, seed=i, shift=1.0) for i in (2, 3, 4, 5))
    x1, h, r, e = kernels.add_norm_moe(x, a, post, following, scale, expert, eps=EPS, backend=TORCH)
    assert_near(x1, stage(x.double() + norm(a.double(), post, dtype), dtype), dtype)
    wide = x1.double()
    assert_near(h, norm(wide, following, dtype), dtype)
    assert_near(e, norm(wide, expert, dtype), dtype)
    # first the scale, then H^-1/2, each rounded (spec 2.4)
    assert_near(r, stage(stage(norm(wide, None, dtype) * scale.double(), dtype) * H**-0.5, dtype), dtype)


@both_dtypes
def test_close_layer(dtype: torch.dtype) -> None:
    x, d = f(T, H, dtype=dtype), f(T, H, dtype=dtype, seed=1)
    post, following = f(H, dtype=dtype, seed=2), f(H, dtype=dtype, seed=3)
    scalar = torch.tensor([0.7], dtype=dtype)
    x2, h = kernels.close_layer(x, d, post, scalar, following, eps=EPS, backend=TORCH)
    summed = stage(x.double() + norm(d.double(), post, dtype), dtype)
    assert_near(x2, stage(summed * scalar.double(), dtype), dtype)
    assert_near(h, norm(x2.double(), following, dtype), dtype)


@both_dtypes
def test_close_layer_moe(dtype: torch.dtype) -> None:
    x, d, t = f(T, H, dtype=dtype), f(T, H, dtype=dtype, seed=1), f(T, 3, H, dtype=dtype)
    weights = f(T, 3).abs()
    dense, moe, post, following = (f(H, dtype=dtype, seed=i, shift=1.0) for i in (2, 3, 4, 5))
    scalar = torch.tensor([0.7], dtype=dtype)
    x2, h = kernels.close_layer_moe(
        x, d, t, weights, dense, moe, post, scalar, following, eps=EPS, backend=TORCH
    )
    combined = stage((weights.double()[:, :, None] * t.double()).sum(1), dtype)
    y = stage(norm(d.double(), dense, dtype) + norm(combined, moe, dtype), dtype)
    summed = stage(x.double() + norm(y, post, dtype), dtype)
    assert_near(x2, stage(summed * scalar.double(), dtype), dtype, ulps=2)
    assert_near(h, norm(x2.double(), following, dtype), dtype)


# ---- start, activation, head


@both_dtypes
def test_embed(dtype: torch.dtype) -> None:
    weight, following, soft = f(50, H, dtype=dtype), f(H, dtype=dtype), f(4, H, dtype=dtype, seed=1)
    ids = torch.randint(0, 50, (T,), generator=torch.Generator().manual_seed(0))
    rows = torch.full((T,), -1)
    rows[[0, 5, 6, T - 1]] = torch.tensor([2, 0, 3, 2])
    x, h = kernels.embed(ids, weight, soft, rows, following, eps=EPS, backend=TORCH)
    root = torch.tensor(math.sqrt(H)).to(dtype).double()  # 4.90625 in bf16, not 4.89898
    want = stage(weight[ids].double() * root, dtype)
    assert_near(kernels.embed(ids, weight, None, None, following, eps=EPS, backend=TORCH)[0], want, dtype)
    for at, row in ((0, 2), (5, 0), (6, 3), (T - 1, 2)):
        want[at] = soft[row].double()  # as it is: not times sqrt(H)
    assert_near(x, want, dtype)
    assert_near(h, norm(x.double(), following, dtype), dtype)


@both_dtypes
def test_glu(dtype: torch.dtype) -> None:
    gate_up = f(T, 2 * H, dtype=dtype, scale=2.0)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_near(kernels.glu(gate_up, backend=TORCH), stage(stage(gelu(gate), dtype) * up, dtype), dtype)


@both_dtypes
@both_orders
def test_linear(dtype: torch.dtype, backend: Backend) -> None:
    x, weight = f(T, H, dtype=dtype), f(11, H, dtype=dtype)
    got = kernels.linear(x, weight, backend=backend)
    assert_near(got, stage(x.double() @ weight.double().T, dtype), dtype)


@both_dtypes
def test_logits(dtype: torch.dtype) -> None:
    h, weight = f(5, H, dtype=dtype), f(60, H, dtype=dtype, scale=6.0)
    got, _ = kernels.logits(h, weight, softcap=30.0, backend=TORCH)
    assert got.dtype == torch.float32
    z = stage(h.double() @ weight.double().T, dtype)
    assert z.abs().max() > 60  # the cap bends
    want = stage(torch.tanh(stage(z / 30, dtype)), dtype)
    assert_near(got.to(dtype), stage(want * 30, dtype), dtype, ulps=2)
    assert got.abs().max() <= 30
    assert_near(kernels.logits(h, weight, softcap=None, backend=TORCH)[0].to(dtype), z, dtype)


# ---- per-layer inputs


@both_dtypes
@pytest.mark.parametrize("with_soft", [True, False])
def test_per_layer_inputs(dtype: torch.dtype, with_soft: bool) -> None:
    layers, width, pad = 3, 16, 5
    projected, weight = f(T, layers * width, dtype=dtype, scale=5.0), f(50, layers * width, dtype=dtype)
    scale = f(width, dtype=dtype, shift=1.0)
    ids = torch.arange(T)
    soft_rows = torch.where(ids % 3 == 0, ids, -1) if with_soft else None
    got = kernels.per_layer_inputs(
        projected, ids, weight, soft_rows, scale, hidden=H, pad_id=pad, eps=EPS, backend=TORCH
    )
    context = stage(projected.double() * H**-0.5, dtype).view(T, layers, width)
    rows = torch.where(ids % 3 == 0, pad, ids) if with_soft else ids
    embedded = stage(weight[rows].double() * 4, dtype).view(T, layers, width)
    want = stage(norm(context, scale, dtype) + embedded, dtype) * 2**-0.5
    assert_near(got, stage(want, dtype).transpose(0, 1), dtype)


@both_dtypes
def test_per_layer_gate(dtype: torch.dtype) -> None:
    x, d, weight = f(T, H, dtype=dtype), f(T, H, dtype=dtype, seed=1, scale=9.0), f(H, dtype=dtype, seed=2)
    got = kernels.add_normed(x, d, weight, eps=EPS, backend=TORCH)
    assert_near(got, stage(x.double() + norm(d.double(), weight, dtype), dtype), dtype)
    gated = kernels.gate_per_layer(x, d, backend=TORCH)
    assert_near(gated, stage(stage(gelu(x.double()), dtype) * d.double(), dtype), dtype)


# ---- rope, q, k and v


def test_rope_table_at_the_last_positions_of_the_context() -> None:
    positions = torch.tensor([0, 1, 77, 131_071, 262_143])
    inv_freq = 1.0 / 1e4 ** (torch.arange(0, 256, 2).float() / 256)
    cos, sin = kernels.rope_table(positions, inv_freq, torch.float32, backend=TORCH)
    angles = (positions.float()[:, None] * inv_freq).double()  # the product itself is fp32 (spec 2.1)
    assert (cos - angles.cos()).abs().max() < 1e-6
    assert (sin - angles.sin()).abs().max() < 1e-6
    half = kernels.rope_table(positions, inv_freq, torch.bfloat16, backend=TORCH)
    assert torch.equal(half, torch.stack([cos, sin]).bfloat16())


def turned(x: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rope of fp64 heads [T, heads, D], pair by pair: (i, i + D/2) for the angles that there are."""
    cos, sin = table.double()
    half, out = x.shape[-1] // 2, x.clone()
    for i in range(table.shape[-1]):
        c, s = cos[:, None, i], sin[:, None, i]
        low, high = x[..., i], x[..., i + half]
        out[..., i] = stage(low * c, dtype) + stage(-high * s, dtype)
        out[..., i + half] = stage(high * c, dtype) + stage(low * s, dtype)
    return stage(out, dtype)


@both_dtypes
@pytest.mark.parametrize("angles", [8, 3], ids=["all angles", "some angles"])
@pytest.mark.parametrize("k_eq_v", [False, True])
def test_prepare_qkv(dtype: torch.dtype, angles: int, k_eq_v: bool) -> None:
    heads, kv_heads, head, size = 4, 2, 16, 4
    width = (heads + (1 if k_eq_v else 2) * kv_heads) * head
    qkv, q_norm, k_norm = f(T, width, dtype=dtype), f(head, dtype=dtype), f(head, dtype=dtype, seed=1)
    rope = kernels.rope_table(torch.arange(T) + 90, f(angles).abs(), dtype, backend=TORCH)
    pages = torch.full((15, size, kv_heads, head), NAN, dtype=dtype)
    k_pages, v_pages = pages.clone(), pages.clone()
    slots = torch.randperm(15 * size, generator=torch.Generator().manual_seed(0))[:T]
    slots[[3, T - 1]] = -1  # padding, with whatever is in it
    qkv[[3, T - 1]] = NAN
    q = kernels.prepare_qkv(
        qkv, q_norm, k_norm, rope, slots, k_pages, v_pages, q_heads=heads, eps=EPS, backend=TORCH
    )
    real = slots >= 0
    wide = qkv.double()[real]
    raw_q = wide[:, : heads * head].view(-1, heads, head)
    raw_k = wide[:, heads * head : (heads + kv_heads) * head].view(-1, kv_heads, head)
    raw_v = raw_k if k_eq_v else wide[:, -kv_heads * head :].view(-1, kv_heads, head)
    table = rope[:, real]
    assert_near(q[real], turned(norm(raw_q, q_norm, dtype), table, dtype), dtype)
    written_k, written_v = (p.view(-1, kv_heads, head) for p in (k_pages, v_pages))
    where = slots[real]
    assert_near(written_k[where], turned(norm(raw_k, k_norm, dtype), table, dtype), dtype)
    assert_near(written_v[where], norm(raw_v, None, dtype), dtype)
    others = torch.ones(15 * size, dtype=torch.bool)
    others[where] = False
    assert written_k[others].isnan().all()
    assert written_v[others].isnan().all()
    # a layer without K and V of its own does the same to its queries
    alone = kernels.prepare_q(qkv[:, : heads * head].contiguous(), q_norm, rope, eps=EPS, backend=TORCH)
    assert torch.equal(alone[real], q[real])


# ---- attention over pages


@dataclass
class Ragged:
    """Random rows over pages in which nothing is a number but what a row may read."""

    arguments: dict[str, torch.Tensor | None]
    window: int | None
    keys: list[torch.Tensor]  # of each row, by position
    values: list[torch.Tensor]


def ragged(seed: int, dtype: torch.dtype) -> Ragged:
    draw = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    size, kv_heads, group, head = between(1, 6), between(1, 3), between(1, 4), 2 * between(2, 8)
    window = None if seed % 3 == 0 else between(1, 20)
    with_spans = seed % 2 == 0
    counts, lengths = [], []
    for _ in range(between(1, 6)):
        # an empty row, a decode row, a chunk on cached positions, a whole prompt
        count = (0, 1, between(2, 25), between(2, 25))[between(0, 3)]
        counts.append(count)
        lengths.append(count + between(0, 40) * between(0, 1) if count else 0)
    rows, total, padding = len(counts), sum(counts), between(0, 3)
    if not total:
        return ragged(seed + 1000, dtype)
    widest = -(-max(lengths) // size) + between(0, 2)
    pool = widest * rows + 3
    free = torch.randperm(pool, generator=draw).tolist()
    pages = torch.full((2, pool, size, kv_heads, head), NAN, dtype=dtype)
    # entries that nobody reads hold anything: no page, pages of others, numbers beyond all pages
    table = torch.randint(-9, 10**6, (rows, widest), generator=draw, dtype=torch.int32)
    spans = torch.zeros(total + padding, 2, dtype=torch.int32)
    keys, values, at = [], [], 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        k, v = (
            torch.randn((length, kv_heads, head), generator=draw).to(dtype) * scale for scale in (0.7, 1.0)
        )
        first = length - count
        lowest = 0 if window is None else max(0, first - window + 1)
        for page in range(lowest // size, -(-length // size)):
            table[row, page] = free.pop()
        for p in range(lowest, length):
            pages[0, table[row, p // size], p % size] = k[p]
            pages[1, table[row, p // size], p % size] = v[p]
        if with_spans and count > 2:
            begin = first + between(0, count - 2)
            end = between(begin + 1, length)
            spans[at + begin - first : at + end - first] = torch.tensor([begin, end], dtype=torch.int32)
        keys.append(k)
        values.append(v)
        at += count
    q = torch.randn((total + padding, kv_heads * group, head), generator=draw).to(dtype)
    q[total:] = NAN
    arguments = {
        "q": q,
        "k_pages": pages[0].contiguous(),
        "v_pages": pages[1].contiguous(),
        "page_table": table,
        "query_start": torch.tensor([0, *counts]).cumsum(0).int(),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "spans": spans if with_spans else None,
    }
    return Ragged(arguments, window, keys, values)


def dense_attention(case: Ragged) -> torch.Tensor:
    """The definition, one query and head at a time, in fp64."""
    q, starts = case.arguments["q"], case.arguments["query_start"]
    lengths, spans = case.arguments["seq_lens"], case.arguments["spans"]
    assert q is not None
    assert starts is not None
    assert lengths is not None
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, (k, v) in enumerate(zip(case.keys, case.values, strict=True)):
        start, stop, length = int(starts[row]), int(starts[row + 1]), int(lengths[row])
        group = q.shape[1] // k.shape[1]
        for token in range(start, stop):
            p = length - (stop - token)
            begin, end = (0, 0) if spans is None else spans[token].tolist()
            seen = [
                j
                for j in range(length)
                if (j <= p or begin <= j < end) and (case.window is None or j > p - case.window)
            ]
            for head in range(q.shape[1]):
                scores = k[seen, head // group].double() @ q[token, head].double()
                weights = (scores - scores.max()).exp()
                out[token, head] = weights @ v[seen, head // group].double() / weights.sum()
    return out


@both_orders
@pytest.mark.parametrize("seed", range(30))
def test_paged_attention_is_dense_attention_with_a_mask(seed: int, backend: Backend) -> None:
    case = ragged(seed, torch.float32)
    got = kernels.paged_attention(**case.arguments, window=case.window, backend=backend)  # type: ignore[arg-type]
    want = dense_attention(case)
    assert not got.isnan().any()
    assert (got - want).abs().max() <= 1e-5
    assert not got[int(case.arguments["query_start"][-1]) :].any()  # type: ignore[index]


def test_the_ragged_cases_hold_what_they_are_for() -> None:
    cases = [ragged(seed, torch.float32) for seed in range(30)]
    counts = torch.cat([c.arguments["query_start"].diff() for c in cases])  # type: ignore[union-attr]
    lengths = torch.cat([c.arguments["seq_lens"] for c in cases])  # type: ignore[misc]
    assert ((counts == 0) & (lengths == 0)).sum() > 5  # empty rows
    assert ((counts == 1) & (lengths > 1)).sum() > 5  # decode rows
    assert ((counts > 1) & (lengths > counts)).sum() > 5  # chunks on cached positions
    assert any(c.window and (c.arguments["seq_lens"] > 2 * c.window).any() for c in cases)  # type: ignore[operator]
    assert any(
        (c.arguments["spans"].diff() > c.window).any()  # type: ignore[union-attr]
        for c in cases
        if c.window and c.arguments["spans"] is not None
    )


@both_orders
def test_paged_attention_rounds_once_in_bf16(backend: Backend) -> None:
    for seed in range(6):
        case = ragged(seed, torch.bfloat16)
        got = kernels.paged_attention(**case.arguments, window=case.window, backend=backend)  # type: ignore[arg-type]
        real = int(case.arguments["query_start"][-1])  # type: ignore[index]
        assert_near(got[:real], stage(dense_attention(case)[:real], torch.bfloat16), torch.bfloat16)


# ---- experts


@both_orders
def test_route_experts(backend: Backend) -> None:
    experts, top_k, real = 9, 3, T - 4
    r, weight, scale = f(T, H), f(experts, H), f(experts, shift=1.0)
    r[real:] = NAN  # padding
    count = torch.tensor([real], dtype=torch.int32)
    got = kernels.route_experts(r, weight, scale, count, top_k=top_k, backend=backend)
    for token in range(real):
        probabilities = (weight.double() @ r[token].double()).softmax(0)
        ranked = sorted(range(experts), key=lambda e: -probabilities[e].item())[:top_k]
        assert got.experts[token].tolist() == ranked
        chosen = probabilities[ranked]
        # the scale comes after the renormalisation: weights do not sum to 1
        want = chosen / chosen.sum() * scale[ranked].double()
        assert (got.weights[token] - want).abs().max() < 1e-6
    check_order(got, real, experts)


def check_order(got: Routing, real: int, experts: int) -> None:
    top_k = got.experts.shape[1]
    pairs = [(int(got.experts[pair // top_k, pair % top_k]), pair) for pair in range(real * top_k)]
    offsets = got.offsets.tolist()
    assert [got.order[i].item() for i in range(real * top_k)] == [pair for _, pair in sorted(pairs)]
    assert offsets[0] == 0
    assert offsets[-1] == real * top_k
    for expert in range(experts):
        mine = got.order[offsets[expert] : offsets[expert + 1]]
        assert all(int(got.experts[p // top_k, p % top_k]) == expert for p in mine.tolist())
    assert sorted(got.order.tolist()) == list(range(got.order.shape[0]))


@both_orders
def test_ties_go_to_the_lowest_expert(backend: Backend) -> None:
    """In bf16 two experts' logits are often equal (spec 10 item 9)."""
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [2.0], [3.0], [2.0]])
    r = torch.tensor([[1.0], [-1.0], [0.0]])
    count = torch.tensor([3], dtype=torch.int32)
    got = kernels.route_experts(r, weight, torch.ones(7), count, top_k=4, backend=backend)
    assert got.experts.tolist() == [[1, 3, 5, 2], [0, 2, 4, 6], [0, 1, 2, 3]]
    check_order(got, 3, 7)


def test_the_routers_logits_are_rounded_to_the_activation_dtype() -> None:
    """1 and 1 + 2^-9 are one number in bf16: a tie, which goes to the lower id."""
    r = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16)
    count = torch.tensor([1], dtype=torch.int32)
    got = kernels.route_experts(r, weight, torch.ones(2, dtype=torch.bfloat16), count, top_k=2, backend=TORCH)
    assert got.experts.tolist() == [[0, 1]]
    assert got.weights.tolist() == [[0.5, 0.5]]


@both_dtypes
@both_orders
def test_grouped_products_are_loops_over_tokens(dtype: torch.dtype, backend: Backend) -> None:
    experts, top_k, width, real = 5, 2, 12, T - 3
    h, gate_up = f(T, H, dtype=dtype), f(experts, 2 * width, H, dtype=dtype, scale=0.3)
    down = f(experts, H, width, dtype=dtype, scale=0.3)
    h[real:] = NAN
    count = torch.tensor([real], dtype=torch.int32)
    router = f(experts, H, dtype=dtype, seed=5)
    router[2] = 0.0  # an expert that few or none choose
    routing = kernels.route_experts(
        h, router, torch.ones(experts, dtype=dtype), count, top_k=top_k, backend=backend
    )
    m = kernels.grouped_glu(h, gate_up, routing, backend=backend)
    t = kernels.grouped_linear(m, down, routing, backend=backend)
    assert m.shape == (T * top_k, width)
    assert t.shape == (T, top_k, H)
    place = {pair: i for i, pair in enumerate(routing.order.tolist())}
    for token in range(real):
        for slot in range(top_k):
            expert = int(routing.experts[token, slot])
            gate, up = (gate_up[expert].double() @ h[token].double()).chunk(2)
            want = stage(stage(gelu(stage(gate, dtype)), dtype) * stage(up, dtype), dtype)
            row = m[place[token * top_k + slot]]
            assert (row.double() - want).abs().max() <= (5e-6 if dtype == torch.float32 else 0.02)
            want = stage(down[expert].double() @ row.double(), dtype)
            difference = (t[token, slot].double() - want).abs().max()
            assert difference <= (5e-6 if dtype == torch.float32 else 2**-8)


# ---- vision tower


def test_scale_patches() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 768)
    for dtype in (torch.float32, torch.bfloat16):
        got = kernels.scale_patches(pixels, dtype, backend=TORCH)
        # 1/255 in fp64, rounded once; then fp32 (spec 4.1 step 4, 4.2)
        values = (torch.arange(256).double() * (1 / 255)).float()
        assert torch.equal(got[0, :256], (2 * (values - 0.5)).to(dtype))
    assert kernels.scale_patches(pixels, torch.float32, backend=TORCH)[0, [0, 255]].tolist() == [-1.0, 1.0]


@both_dtypes
def test_add_positions(dtype: torch.dtype) -> None:
    x, table, following = f(T, H, dtype=dtype), f(2, 20, H, dtype=dtype), f(H, dtype=dtype)
    positions = torch.randint(0, 20, (T, 2), generator=torch.Generator().manual_seed(0))
    got, h = kernels.add_positions(x, table, positions, following, eps=EPS, backend=TORCH)
    column, row = table[0].double()[positions[:, 0]], table[1].double()[positions[:, 1]]
    assert_near(got, stage(x.double() + stage(column + row, dtype), dtype), dtype)
    assert_near(h, norm(got.double(), following, dtype), dtype)


@both_dtypes
def test_prepare_tower_qkv(dtype: torch.dtype) -> None:
    heads, head = 3, 16
    qkv = f(T, 3 * heads * head, dtype=dtype)
    q_norm, k_norm = f(head, dtype=dtype), f(head, dtype=dtype, seed=1)
    ropes = [
        kernels.rope_table((torch.arange(T) * i) % 11, f(head // 4).abs(), dtype, backend=TORCH)
        for i in (1, 3)
    ]
    got = kernels.prepare_tower_qkv(qkv, q_norm, k_norm, *ropes, eps=EPS, backend=TORCH)
    q, k, v = qkv.double().view(T, 3, heads, head).unbind(1)

    def twice(x: torch.Tensor) -> torch.Tensor:
        """Columns turn the first half of a head, rows the second."""
        left, right = x[..., : head // 2], x[..., head // 2 :]
        return torch.cat([turned(left, ropes[0], dtype), turned(right, ropes[1], dtype)], dim=-1)

    assert_near(got[0], twice(norm(q, q_norm, dtype)), dtype)
    assert_near(got[1], twice(norm(k, k_norm, dtype)), dtype)
    assert_near(got[2], norm(v, None, dtype), dtype)


@both_dtypes
@both_orders
def test_tower_attention_stays_within_each_picture(dtype: torch.dtype, backend: Backend) -> None:
    heads, head = 2, 8
    q, k, v = (f(T, heads, head, dtype=dtype, seed=i) for i in range(3))
    bounds = [0, 9, 10, T]
    starts = torch.tensor(bounds, dtype=torch.int32)
    want = torch.zeros(T, heads, head, dtype=torch.float64)
    for a, b in pairwise(bounds):
        for i in range(heads):
            scores = q[a:b, i].double() @ k[a:b, i].double().T
            want[a:b, i] = scores.softmax(-1) @ v[a:b, i].double()
    got = kernels.tower_attention(q, k, v, starts, backend=backend)
    assert_near(got, stage(want, dtype), dtype)
    k[0], v[0] = NAN, NAN  # one picture's trouble is not the others'
    spoiled = kernels.tower_attention(q, k, v, starts, backend=backend)
    assert spoiled[:9].isnan().all()
    assert torch.equal(spoiled[9:], got[9:])


@both_dtypes
@pytest.mark.parametrize("standardised", [True, False])
def test_pool_patches(dtype: torch.dtype, standardised: bool) -> None:
    x = f(36, H, dtype=dtype)
    grid = torch.arange(36).view(2, 3, 2, 3)  # 6 x 6 patches, 2 x 2 soft tokens
    cells = grid.permute(0, 2, 1, 3).reshape(4, 9)
    bias, scale = (f(H, dtype=dtype), f(H, dtype=dtype, seed=1)) if standardised else (None, None)
    starts = torch.tensor([0, 36], dtype=torch.int32)
    got = kernels.pool_patches(x, cells, starts, bias, scale, eps=EPS, backend=TORCH)
    pooled = stage(torch.stack([x.double()[cell].mean(0) for cell in cells]), dtype) * math.sqrt(H)
    if bias is not None and scale is not None:
        pooled = (pooled - bias.double()) * scale.double()
    # a mean that rounds the other way shifts the norm of its whole row
    assert_near(got, norm(stage(pooled, dtype), None, dtype), dtype, equal=0.9)
