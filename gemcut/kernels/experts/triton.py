"""Grouped products on a GPU. Tiles find their expert on the device: nothing here waits for it.

The first product gathers its rows and has GeGLU in its epilogue, the second scatters its rows back to
(token, slot). With few rows an expert a tile is a thin strip of weights, each read once, and what counts
is how many bytes are under way; with many it is a matrix product like any other. A token or two has pairs
that hardly share an expert: each gets products of its own, outside the matrix units.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gemcut.kernels.add_norm.triton import rounded
from gemcut.kernels.backend import Backend
from gemcut.kernels.experts import hopper
from gemcut.kernels.glu.triton import gelu_tanh
from gemcut.kernels.overlap import after_previous, copies_tiles, overlap, start_next, wait_for_previous
from gemcut.kernels.ragged import count_tiles, find_tile
from gemcut.kernels.router.op import Routing
from gemcut.kernels.tuned import tuned

SINGLE_PAIRS = 16  # (token, slot) pairs up to which each is taken by itself


@dataclass(frozen=True, slots=True)
class Config:
    """block_m: rows a program. block_n: weight rows a program, gate and up together. block_k: a step.
    thin: what is left of an expert's rows takes a tile of half the height where that is enough.
    copied: weights come by the copy engine, where there is one and block_k divides their rows.
    fetchers: the second product by hopper.py's kernel, whose blocks, warps and stages are what they are."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    thin: bool = False
    copied: bool = False
    fetchers: bool = False


FETCHERS = Config(128, 256, 64, warps=12, stages=4, thin=True, copied=True, fetchers=True)


def grouped_glu(
    h: torch.Tensor, gate_up: torch.Tensor, routing: Routing, *, backend: Backend
) -> torch.Tensor:
    """See op.py. One rounding with fused numerics, three with the reference's."""
    width = gate_up.shape[1] // 2
    out = h.new_empty(routing.order.shape[0], width)
    if _by_pairs(routing, backend):
        _launch_pairs(h, gate_up, out, routing, glu=True, rounds=backend.numerics == "reference")
        return out
    config = find_config("glu", gate_up, routing, backend)
    _launch(h, gate_up, out, routing, config, glu=True, rounds=backend.numerics == "reference")
    return out


def grouped_linear(
    m: torch.Tensor, down: torch.Tensor, routing: Routing, *, backend: Backend
) -> torch.Tensor:
    """See op.py."""
    out = m.new_empty(m.shape[0], down.shape[1])
    if _by_pairs(routing, backend):
        _launch_pairs(m, down, out, routing, glu=False, rounds=False)
        return out.view(*routing.experts.shape, -1)
    config = find_config("linear", down, routing, backend)
    if config.fetchers:
        hopper.grouped_rows(m, down, out, routing)
    else:
        _launch(m, down, out, routing, config, glu=False, rounds=False)
    return out.view(*routing.experts.shape, -1)


def shape_key(product: str, weight: torch.Tensor) -> str:
    """Key of the tuned tables, whose sizes are (token, slot) pairs. product: "glu" or "linear"."""
    experts, outputs, inputs = weight.shape
    return f"{product} E={experts} {outputs}x{inputs} {str(weight.dtype).removeprefix('torch.')}"


def find_config(product: str, weight: torch.Tensor, routing: Routing, backend: Backend) -> Config:
    pairs = routing.order.shape[0]
    if not backend.deterministic:  # then one config whatever the count
        fields = tuned(__file__, shape_key(product, weight), pairs, weight.device)
        if fields is not None and (not fields.get("fetchers") or hopper.serves(weight)):
            return Config(**fields)
    experts, _, inputs = weight.shape
    if weight.element_size() == 4:  # products of fp32 run outside the matrix units: parity, not speed
        return Config(16, 32, 32, warps=4, stages=2, copied=True)
    rows = pairs / experts
    if backend.deterministic:
        return Config(64, 128, 64, warps=4, stages=3)
    if rows <= 8:
        return Config(16, 64, 128 if inputs % 128 == 0 else 64, warps=4, stages=4)
    if rows <= 32:
        return Config(32, 64, 64, warps=4, stages=4)
    if rows <= 128:
        return Config(64, 128, 64, warps=4, stages=3)
    # programs have fixed shares of the tiles: last ones of few rows must not be many of them
    if product == "linear" and rows > 448 and inputs <= 1024 and hopper.serves(weight):
        return FETCHERS
    if inputs <= 1024:  # few steps a tile: two programs a processor, one's loop hides the other's ends
        return Config(128, 128, 64, warps=4, stages=3, thin=True)
    return Config(128, 256, 64, warps=8, stages=3, thin=True)


def _by_pairs(routing: Routing, backend: Backend) -> bool:
    return 0 < routing.order.shape[0] <= SINGLE_PAIRS and not backend.deterministic


def _launch_pairs(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, routing: Routing, *, glu: bool, rounds: bool
) -> None:
    pairs, top_k = routing.order.shape[0], routing.experts.shape[1]
    experts, _, inputs = weight.shape
    width = out.shape[1]
    # all weights of a program are under way at once and lie in its registers: 45 KB at the widths of 26B
    weight_rows, block_k, warps = (8, 1024, 4) if inputs >= 2048 else (32, 128, 8)
    block_n = weight_rows // 2 if glu else weight_rows
    _by_pair[(pairs * triton.cdiv(width, block_n),)](
        x,
        weight,
        out,
        routing.order,
        routing.experts,
        routing.offsets,
        experts,
        GLU=glu,
        ROUND=rounds,
        WIDTH=width,
        INPUTS=inputs,
        TOP_K=top_k,
        BLOCK_N=block_n,
        BLOCK_K=min(block_k, triton.next_power_of_2(inputs)),
        num_warps=warps,
        **overlap(x.device),
    )


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    routing: Routing,
    config: Config,
    *,
    glu: bool,
    rounds: bool,
) -> None:
    pairs, top_k = routing.order.shape[0], routing.experts.shape[1]
    experts, _, inputs = weight.shape
    width = out.shape[1]
    if pairs == 0:
        return
    # every expert that has rows may end in a tile that is not full; padding rows belong to none
    tiles = min(pairs, triton.cdiv(pairs, config.block_m) + experts)
    strip = config.block_n // 2 if glu else config.block_n
    narrow = config.block_n >= 64 and 0 < width % strip <= strip // 2
    whole_strips = half_strips = None
    if config.copied and inputs % config.block_k == 0 and copies_tiles(x.device):
        rows = weight.view(-1, inputs)
        whole_strips = TensorDescriptor.from_tensor(rows, [strip, config.block_k])
        half_strips = TensorDescriptor.from_tensor(rows, [strip // 2, config.block_k]) if narrow else None
    _grouped[(tiles * triton.cdiv(width, strip),)](
        x,
        weight,
        out,
        routing.order,
        routing.offsets,
        experts,
        whole_strips,
        half_strips,
        GLU=glu,
        ROUND=rounds,
        WIDTH=width,
        INPUTS=inputs,
        TOP_K=top_k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        THIN=config.thin,
        NARROW=narrow,
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap(x.device),
    )


@triton.jit
def _product(x_ptr, weight_ptr, rows, outputs, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[rows, outputs] fp32: these rows of x times these rows of one expert's weight."""
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows[:, None] * INPUTS + k[None, :]
    weight_at = weight_ptr + outputs[None, :] * INPUTS + k[:, None]
    acc = tl.zeros([rows.shape[0], outputs.shape[0]], tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_K):
        if INPUTS % BLOCK_K == 0:
            weight = tl.load(weight_at)  # first: which rows of x is known later than which expert
            x = tl.load(x_at)
        else:
            weight = tl.load(weight_at, mask=(k < INPUTS - start)[:, None], other=0.0)
            x = tl.load(x_at, mask=(k < INPUTS - start)[None, :], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    return acc


@triton.jit
def _copied_product(
    x_ptr, strips, rows, output, STRIP: tl.constexpr, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """[rows, STRIP] fp32: the same, with the weight's rows from `output` on fetched by the copy engine."""
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows[:, None] * INPUTS + k[None, :]
    acc = tl.zeros([rows.shape[0], STRIP], tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_K):
        weight = strips.load([output, start])
        acc = tl.dot(tl.load(x_at), weight.T, acc, input_precision="ieee")
        x_at += BLOCK_K
    return acc


@triton.jit
def _copied_glu(
    x_ptr, strips, rows, output,
    STRIP: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gates and ups [rows, STRIP] fp32, in two products over the same rows of x."""
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows[:, None] * INPUTS + k[None, :]
    gate = tl.zeros([rows.shape[0], STRIP], tl.float32)
    up = tl.zeros([rows.shape[0], STRIP], tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_K):
        gate_weight = strips.load([output, start])
        up_weight = strips.load([output + WIDTH, start])
        x = tl.load(x_at)
        gate = tl.dot(x, gate_weight.T, gate, input_precision="ieee")
        up = tl.dot(x, up_weight.T, up, input_precision="ieee")
        x_at += BLOCK_K
    return gate, up


@triton.jit
def _weight_rows(weight_ptr, outputs, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """These rows of one expert's weight, all under way at once: a tuple of [outputs, BLOCK_K]."""
    k = tl.arange(0, BLOCK_K)
    weight_at = weight_ptr + outputs[:, None] * INPUTS + k[None, :]
    pieces = ()
    for start in tl.static_range(0, INPUTS, BLOCK_K):
        if INPUTS - start >= BLOCK_K:
            piece = tl.load(weight_at + start, eviction_policy="evict_first")
        else:
            inside = (k < INPUTS - start)[None, :]
            piece = tl.load(weight_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
        pieces += (piece,)
    return pieces


@triton.jit
def _row_product(x_ptr, pieces, INPUTS: tl.constexpr):
    """[outputs] fp32: one row of x times what `_weight_rows` returned."""
    BLOCK_K: tl.constexpr = pieces[0].shape[1]
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros(pieces[0].shape, tl.float32)
    for i in tl.static_range(len(pieces)):
        x = tl.load(x_ptr + i * BLOCK_K + k, mask=k < INPUTS - i * BLOCK_K, other=0.0)
        acc += pieces[i].to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["experts"])
def _by_pair(
    x_ptr,
    weight_ptr,
    out_ptr,
    order_ptr,
    experts_ptr,
    offsets_ptr,
    experts,
    GLU: tl.constexpr,
    ROUND: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_N columns of one pair's product; with GLU their gates and ups.

    Gate and up let the next kernel start only after the router. So down, which follows them, may look up its
    expert and ask for weights before it waits for them.
    """
    STRIPS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if GLU:
        wait_for_previous(OVERLAP)
    start_next(OVERLAP)
    place = tl.program_id(0) // STRIPS
    columns = tl.program_id(0) % STRIPS * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.load(order_ptr + place, cache_modifier=".cg")
    expert = tl.load(experts_ptr + pair, cache_modifier=".cg")
    pairs = tl.load(offsets_ptr + experts, cache_modifier=".cg")  # behind these come the pairs of padding
    outputs = tl.minimum(columns, WIDTH - 1)
    if GLU:
        if place >= pairs:
            return
        weight_at = weight_ptr + expert * (2 * WIDTH * INPUTS)
        gates = _weight_rows(weight_at, outputs, INPUTS, BLOCK_K)
        ups = _weight_rows(weight_at + WIDTH * INPUTS, outputs, INPUTS, BLOCK_K)
        x_at = x_ptr + pair // TOP_K * INPUTS
        gate = rounded(_row_product(x_at, gates, INPUTS), dtype, ROUND)
        up = rounded(_row_product(x_at, ups, INPUTS), dtype, ROUND)
        result = rounded(gelu_tanh(gate), dtype, ROUND) * up
        at = out_ptr + place * WIDTH + columns
    else:
        weights = _weight_rows(weight_ptr + expert * (WIDTH * INPUTS), outputs, INPUTS, BLOCK_K)
        wait_for_previous(OVERLAP)
        if place >= pairs:
            return
        result = _row_product(x_ptr + place * INPUTS, weights, INPUTS)
        at = out_ptr + pair * WIDTH + columns
    tl.store(at, result.to(dtype), mask=columns < WIDTH)


@triton.jit
def _tile(
    x_ptr,
    weight_ptr,
    out_ptr,
    order_ptr,
    strips,
    output,
    first,
    stop,
    column,
    GLU: tl.constexpr,
    ROUND: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows first .. stop of one expert, BLOCK_M at most, and the columns from `column` on.

    Rows and columns behind the end repeat the last one and are not stored: the loop needs no masks.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    place = first + tl.arange(0, BLOCK_M)
    stored = (place < stop)[:, None]
    place = tl.minimum(place, stop - 1).to(tl.int64)
    pair = tl.load(order_ptr + place)
    n = tl.arange(0, BLOCK_N)
    if GLU:
        if strips is not None:
            gate, up = _copied_glu(
                x_ptr, strips, pair // TOP_K, output + column, BLOCK_N // 2, WIDTH, INPUTS, BLOCK_K
            )
        else:
            # gate and up take turns, so that both of a column end in one thread's registers
            outputs = n % 2 * WIDTH + tl.minimum(column + n // 2, WIDTH - 1)
            acc = _product(x_ptr, weight_ptr, pair // TOP_K, outputs, INPUTS, BLOCK_K)
            gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
        gate = rounded(gate, dtype, ROUND)
        up = rounded(up, dtype, ROUND)
        result = rounded(gelu_tanh(gate), dtype, ROUND) * up
        columns = column + tl.arange(0, BLOCK_N // 2)
        at = out_ptr + place[:, None] * WIDTH + columns[None, :]
    else:
        columns = column + n
        if strips is not None:
            result = _copied_product(x_ptr, strips, place, output + column, BLOCK_N, INPUTS, BLOCK_K)
        else:
            result = _product(x_ptr, weight_ptr, place, tl.minimum(columns, WIDTH - 1), INPUTS, BLOCK_K)
        at = out_ptr + pair[:, None] * WIDTH + columns[None, :]
    tl.store(at, result.to(dtype), mask=stored & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["experts"])
def _grouped(
    x_ptr,
    weight_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    experts,
    whole_strips,
    half_strips,
    GLU: tl.constexpr,
    ROUND: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    THIN: tl.constexpr,
    NARROW: tl.constexpr,
    EXPERTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
    STRIP: tl.constexpr = BLOCK_N // 2 if GLU else BLOCK_N
    STRIPS: tl.constexpr = (WIDTH + STRIP - 1) // STRIP
    # all strips of a tile run side by side, then the expert's next tile: its weights stay in L2
    tile = tl.program_id(0) // STRIPS
    strip = tl.program_id(0) % STRIPS
    index = tl.arange(0, EXPERTS)
    begins = tl.load(offsets_ptr + index, mask=index < experts, other=0).to(tl.int32)
    ends = tl.load(offsets_ptr + index + 1, mask=index < experts, other=0).to(tl.int32)
    if tile >= count_tiles(begins, ends, BLOCK_M):
        return
    expert, first, stop = find_tile(begins, ends, tile, BLOCK_M)
    column = strip * STRIP
    outputs: tl.constexpr = 2 * WIDTH if GLU else WIDTH
    weight_at = weight_ptr + expert.to(tl.int64) * (outputs * INPUTS)
    output = expert * outputs  # the expert's first row in the strips' descriptors
    if THIN and stop - first <= BLOCK_M // 2:
        _tile(
            x_ptr, weight_at, out_ptr, order_ptr, whole_strips, output, first, stop, column,
            GLU, ROUND, WIDTH, INPUTS, TOP_K, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif NARROW and strip == STRIPS - 1:
        _tile(
            x_ptr, weight_at, out_ptr, order_ptr, half_strips, output, first, stop, column,
            GLU, ROUND, WIDTH, INPUTS, TOP_K, BLOCK_M, BLOCK_N // 2, BLOCK_K,
        )  # fmt: skip
    else:
        _tile(
            x_ptr, weight_at, out_ptr, order_ptr, whole_strips, output, first, stop, column,
            GLU, ROUND, WIDTH, INPUTS, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
