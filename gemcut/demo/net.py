"""The demo's Gemma 4 as plain functions over named tensors, made for training it.

Parameters carry transformers' names, so that exporting is writing them down. Products run in a compute dtype
(bf16 on a GPU), norms and the residual stream in float32. The functions in ``Kernels`` hold all the
elementwise work; the training compiles them one by one and leaves attention to PyTorch's fused kernels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.demo.questions import KINDS
from gemcut.demo.render import PATCHES, Positions
from gemcut.demo.scenes import BUDGET, GROUP_CLASSES, MARK_CLASSES, MAX_SHAPES
from gemcut.demo.tokenizer import SPECIAL_ID, VOCABULARY

Parameters = dict[str, Tensor]
HELPERS = ("helper.marks", "helper.groups")  # the helper loss's own matrices, not part of the model
FIXED = ("std_bias", "std_scale", "layer_scalar")  # buffers: set once, not trained
_VISION, _TEXT = "model.vision_tower.", "model.language_model."
_EPSILON = 1e-6
_SOFT_CAP = 30.0


@dataclass(frozen=True)
class Size:
    """Dimensions of the model."""

    hidden: int = 128
    heads: int = 4
    mlp: int = 192
    layers: str = "SSFSFSF"  # S: sliding window, F: full attention
    sliding_heads: int = 2
    sliding_dim: int = 32
    full_heads: int = 1
    full_dim: int = 64
    window: int = 64
    experts: int = 8
    expert_mlp: int = 64
    scalars: tuple[float, ...] = (0.875, 0.8125, 0.9375, 0.75, 1.0625, 0.6875, 0.9375)  # exact in bf16
    vision_hidden: int = 128
    vision_heads: int = 4
    vision_mlp: int = 320
    vision_layers: int = 5
    positions: int = 840  # rows of the position table: no picture at up to 280 soft tokens is longer


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters and buffers, in transformers' naming."""
    hidden, vision = size.hidden, size.vision_hidden
    result: dict[str, tuple[int, ...]] = {
        "model.embed_vision.embedding_projection.weight": (hidden, vision),
        f"{_TEXT}embed_tokens.weight": (VOCABULARY, hidden),
        f"{_TEXT}norm.weight": (hidden,),
        f"{_VISION}patch_embedder.input_proj.weight": (vision, 768),
        f"{_VISION}patch_embedder.position_embedding_table": (2, size.positions, vision),
        f"{_VISION}std_bias": (vision,),
        f"{_VISION}std_scale": (vision,),
        HELPERS[0]: (MAX_SHAPES * MARK_CLASSES, hidden),
        HELPERS[1]: (3 * GROUP_CLASSES, hidden),
    }
    for index, kind in enumerate(size.layers):
        heads, dim = (
            (size.sliding_heads, size.sliding_dim) if kind == "S" else (size.full_heads, size.full_dim)
        )
        layer: dict[str, tuple[int, ...]] = {
            f"{norm}.weight": (hidden,)
            for norm in (
                "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "pre_feedforward_layernorm_2", "post_feedforward_layernorm", "post_feedforward_layernorm_1",
                "post_feedforward_layernorm_2",
            )
        }  # fmt: skip
        layer |= {
            "self_attn.q_proj.weight": (size.heads * dim, hidden),
            "self_attn.k_proj.weight": (heads * dim, hidden),
            "self_attn.o_proj.weight": (hidden, size.heads * dim),
            "self_attn.q_norm.weight": (dim,),
            "self_attn.k_norm.weight": (dim,),
            "mlp.gate_proj.weight": (size.mlp, hidden),
            "mlp.up_proj.weight": (size.mlp, hidden),
            "mlp.down_proj.weight": (hidden, size.mlp),
            "router.scale": (hidden,),
            "router.per_expert_scale": (size.experts,),
            "router.proj.weight": (size.experts, hidden),
            "experts.gate_up_proj": (size.experts, 2 * size.expert_mlp, hidden),
            "experts.down_proj": (size.experts, hidden, size.expert_mlp),
            "layer_scalar": (1,),
        }
        if kind == "S":  # full layers take their values from the keys' projection
            layer["self_attn.v_proj.weight"] = (heads * dim, hidden)
        result |= {f"{_TEXT}layers.{index}.{name}": shape for name, shape in layer.items()}
    dim = vision // size.vision_heads
    for index in range(size.vision_layers):
        layer = {
            f"{norm}.weight": (vision,)
            for norm in (
                "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            )
        }  # fmt: skip
        layer |= {f"self_attn.{name}_proj.linear.weight": (vision, vision) for name in "qkvo"}
        layer |= {f"self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        layer |= {f"mlp.{name}_proj.linear.weight": (size.vision_mlp, vision) for name in ("gate", "up")}
        layer["mlp.down_proj.linear.weight"] = (vision, size.vision_mlp)
        result |= {f"{_VISION}encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    return result


def initial(size: Size, seed: int = 0) -> Parameters:
    """Random parameters in float32; ``calibrate`` sets the rest from pictures."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes(size).items():
        value = torch.zeros(shape)
        if name.endswith("embed_tokens.weight"):
            value.normal_(0, size.hidden**-0.5, generator=generator)
        elif "q_norm" in name or "k_norm" in name:
            value.fill_(1.2 * shape[0] ** -0.25)  # the attention's scale is 1: unit norms would saturate it
        elif "post_" in name and name.endswith("layernorm.weight"):
            value.fill_(0.5)
        elif "norm" in name or name.endswith(("scale",)):
            value.fill_(1.0)
        elif name.endswith("layer_scalar"):
            value.fill_(size.scalars[int(name.split(".")[3])])
        elif "router.proj" in name:
            value.normal_(0, 1.0, generator=generator)  # its input is scaled down by sqrt(hidden)
        elif name.endswith("position_embedding_table"):
            quarter = shape[2] // 4
            rates = 1.5 * (0.03 / 1.5) ** (torch.arange(quarter) / (quarter - 1))
            angles = torch.arange(shape[1])[:, None] * rates
            waves = torch.cat([angles.sin(), angles.cos()], -1) * 0.5
            value[0, :, : 2 * quarter], value[1, :, 2 * quarter :] = waves, waves
        elif len(shape) >= 2:
            value.normal_(0, shape[-1] ** -0.5, generator=generator)
        result[name] = value
    return result


@torch.no_grad()
def calibrate(
    parameters: Parameters, patches: Tensor, run_tower: Callable[[], Tensor], seed: int = 0
) -> None:
    """Set the patch projection to whitened principal components, then the tower's standardization.

    patches [count, 768] in -1..1 are a sample of real ones. ``run_tower`` gives the tower's pooled output
    [count, vision hidden] under standardization by 0 and 1 (as ``initial`` leaves it).
    """
    weight = parameters[f"{_VISION}patch_embedder.input_proj.weight"]
    sample = patches.double().cpu()
    values, vectors = torch.linalg.eigh(sample.T @ sample / len(sample))
    rows = weight.shape[0]
    # Whitened, so that strokes are not drowned by flat color; rotated, so that every row carries a mixture.
    whitened = (vectors[:, -rows:] / (values[-rows:] + 1e-2 * values[-8]).sqrt()).T.float() * 0.7
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
    weight.copy_(rotation @ whitened)
    pooled = run_tower().float()
    parameters[f"{_VISION}std_bias"].copy_(pooled.mean(0).bfloat16())
    parameters[f"{_VISION}std_scale"].copy_((1 / pooled.std(0)).bfloat16())


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """RMS norm in float32."""
    x = x.float()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPSILON)
    return y if weight is None else y * weight


def _linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; x [..., heads, dim], cos and sin broadcast to [..., heads, dim / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _rotate_2d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first half of each head turns with the column, the second with the row."""
    (x_a, x_b), (cos_a, cos_b), (sin_a, sin_b) = x.chunk(2, -1), cos.chunk(2, -1), sin.chunk(2, -1)
    return torch.cat([_rotate(x_a, cos_a, sin_a), _rotate(x_b, cos_b, sin_b)], -1)


def vision_qkv(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor,
    sin: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [pictures, patches, hidden] to queries, keys and values [pictures, patches, heads, dim]."""
    qkv = _linear(rms(x, norm), torch.cat([wq, wk, wv]), dtype).unflatten(-1, (3, -1, q_norm.shape[0]))
    cos, sin = cos[:, :, None], sin[:, :, None]
    q, k, v = qkv.unbind(2)
    return (
        _rotate_2d(rms(q, q_norm), cos, sin).to(dtype),
        _rotate_2d(rms(k, k_norm), cos, sin).to(dtype),
        rms(v).to(dtype),
    )


def vision_rest(
    x: Tensor, attended: Tensor, wo: Tensor, norm_1: Tensor, norm_2: Tensor, gate: Tensor, up: Tensor,
    down: Tensor, norm_3: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The layer after its attention; attended [pictures, patches, hidden]."""
    x = x + rms(_linear(attended, wo, dtype), norm_1)
    gated, straight = _linear(rms(x, norm_2), torch.cat([gate, up]), dtype).chunk(2, -1)
    return x + rms(_linear(F.gelu(gated, approximate="tanh") * straight, down, dtype), norm_3)


def text_qkv(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor | None, q_norm: Tensor, k_norm: Tensor,
    cos: Tensor, sin: Tensor, heads: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [rows, length, hidden] to queries, keys, values [rows, heads, length, dim], keys repeated."""
    rows, length, _ = x.shape
    dim = q_norm.shape[0]
    y = rms(x, norm)
    q, k = (_linear(y, weight, dtype).view(rows, length, -1, dim) for weight in (wq, wk))
    v = k if wv is None else _linear(y, wv, dtype).view(rows, length, -1, dim)
    cos, sin = cos[:, None], sin[:, None]
    q, k, v = _rotate(rms(q, q_norm), cos, sin), _rotate(rms(k, k_norm), cos, sin), rms(v)
    groups = heads // k.shape[2]
    k, v = (
        part.to(dtype)
        .transpose(1, 2)[:, :, None]
        .expand(-1, -1, groups, -1, -1)
        .reshape(rows, heads, length, dim)
        for part in (k, v)
    )
    return q.to(dtype).transpose(1, 2), k, v


def text_rest(
    x: Tensor, attended: Tensor, live: Tensor, wo: Tensor, norm_attention: Tensor, norm_mlp: Tensor,
    gate: Tensor, up: Tensor, down: Tensor, norm_dense: Tensor, norm_experts: Tensor, norm_experts_in: Tensor,
    norm_out: Tensor, router_scale: Tensor, router: Tensor, expert_scale: Tensor, gate_up: Tensor,
    expert_down: Tensor, scalar: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layer after its attention, and its load balancing loss; attended [rows, length, heads * dim].

    All experts run as one wide MLP whose middle is weighted by the router: the same sum, and cheaper than
    gathering at this size. ``live`` [rows, length, 1] is 0 on padding.
    """
    rows, length, hidden = x.shape
    x = x + rms(_linear(attended, wo, dtype), norm_attention)
    gated, straight = _linear(rms(x, norm_mlp), torch.cat([gate, up]), dtype).chunk(2, -1)
    dense = rms(_linear(F.gelu(gated, approximate="tanh") * straight, down, dtype), norm_dense)
    experts, double, _ = gate_up.shape
    shares = torch.softmax(F.linear(rms(x) * router_scale * hidden**-0.5, router), -1)
    best = shares.amax(-1, keepdim=True).detach()
    second = torch.where(shares >= best, -1.0, shares).amax(-1, keepdim=True).detach()
    chosen = (shares >= second).float()
    weights = shares * chosen
    weights = weights / weights.sum(-1, keepdim=True) * expert_scale
    middle = _linear(rms(x, norm_experts_in), gate_up.reshape(experts * double, hidden), dtype)
    gated, straight = middle.view(rows, length, experts, double).chunk(2, -1)
    middle = F.gelu(gated, approximate="tanh") * straight * weights.to(dtype)[..., None]
    mixed = _linear(middle.flatten(2), expert_down.permute(1, 0, 2).reshape(hidden, -1), dtype)
    count = live.sum()
    share, used = (shares * live).sum((0, 1)) / count, (chosen * live).sum((0, 1)) / (2 * count)
    balance = experts * (share * used.detach()).sum()
    return (x + rms(dense + rms(mixed, norm_experts), norm_out)) * scalar, balance


def answer_loss(
    x: Tensor, norm: Tensor, embedding: Tensor, ids: Tensor, kind: Tensor, size: Tensor, kind_weight: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Cross entropy on the answers, each weighted by its kind and 1 / sqrt(its length).

    Returns the loss, sums per kind [1 + kinds, (loss, hits, tokens)] (row 0: no answer) and hits [rows,
    length - 1].
    """
    logits = _linear(rms(x, norm), embedding, dtype)[:, :-1].float()
    logits = _SOFT_CAP * torch.tanh(logits / _SOFT_CAP)
    target, label = ids[:, 1:], (kind[:, 1:] + 1).long()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    hits = (logits.argmax(-1) == target).float()
    weight = kind_weight[label] * size[:, 1:].float().clamp(min=1).rsqrt()
    one_hot = (label[..., None] == torch.arange(len(kind_weight), device=x.device)).float().flatten(0, 1)
    sums = one_hot.T @ torch.stack([loss, hits, torch.ones_like(loss)], -1).flatten(0, 1)
    return (loss * weight).sum() / weight.sum(), sums, hits


def helper_loss(
    soft: Tensor, mark_weight: Tensor, group_weight: Tensor, tokens: Tensor, marks: Tensor, groups: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The helper: a soft token tells the letters or shapes centered in it, their ranks, how many are alike.

    This tells the vision tower directly what the answers would teach it only slowly. soft [n, 70, hidden],
    tokens [n] valid soft tokens, marks [n, 8, 2], groups [n, 8, 3]. Returns the loss and (hits, marks) over
    the marked ones; the hits need rank, class and group sizes right.
    """
    count = soft.shape[0]
    soft = rms(soft)
    logits = _linear(soft, mark_weight, dtype).float().view(count, BUDGET, MAX_SHAPES, MARK_CLASSES)
    log_shares = torch.log_softmax(logits, -1)
    nothing = (
        log_shares[..., 0] * (torch.arange(BUDGET, device=soft.device) < tokens[:, None]).float()[..., None]
    )
    place, label = marks[..., 0].long(), marks[..., 1].long()
    marked, place = (place >= 0).float(), place.clamp(min=0)
    rank = torch.arange(MAX_SHAPES, device=soft.device)
    index = (place * MAX_SHAPES + rank) * MARK_CLASSES
    found = torch.gather(log_shares.flatten(1), 1, index + label.clamp(min=0))
    empty = torch.gather(log_shares.flatten(1), 1, index)
    chosen = torch.gather(logits.detach().argmax(-1).flatten(1), 1, place * MAX_SHAPES + rank)
    total = marked.sum()
    loss = -(found * marked).sum() - 0.05 * (nothing.sum() - (empty * marked).sum())
    sizes = _linear(soft, group_weight, dtype).float().view(count, BUDGET, 3, GROUP_CLASSES)
    member = place[..., None] * 3 + torch.arange(3, device=soft.device)
    known, wanted = (groups > 0).float(), groups.long()
    alike = torch.gather(
        torch.log_softmax(sizes, -1).flatten(1), 1, (member * GROUP_CLASSES + wanted).flatten(1)
    ).view(groups.shape)
    told = torch.gather(sizes.detach().argmax(-1).flatten(1), 1, member.flatten(1)).view(groups.shape)
    hits = (chosen == label).float() * marked * ((told == wanted).float() * known + 1 - known).amin(-1)
    return (loss - (alike * known).sum()) / total, torch.stack([hits.sum(), total])


@dataclass
class Kernels:
    """The elementwise parts, replaceable by their compiled forms."""

    vision_qkv: Callable[..., Any] = vision_qkv
    vision_rest: Callable[..., Any] = vision_rest
    text_qkv: Callable[..., Any] = text_qkv
    text_rest: Callable[..., Any] = text_rest
    answer_loss: Callable[..., Any] = answer_loss
    helper_loss: Callable[..., Any] = helper_loss

    def compiled(self) -> "Kernels":
        """With torch.compile around each."""
        return Kernels(
            **{item.name: torch.compile(getattr(self, item.name), dynamic=False) for item in fields(self)}
        )


@dataclass
class Net:
    """The model's forward pass over ``parameters``; ``flash``: use CUDA's variable-length flash attention."""

    size: Size
    parameters: Parameters
    dtype: torch.dtype = torch.float32
    kernels: Kernels = field(default_factory=Kernels)
    flash: bool = False

    def _vision_attention(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        pictures, patches, heads, dim = q.shape
        if not self.flash:
            mask = positions.valid[:, None, None, :]
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            return (
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).flatten(2)
            )
        # Every picture is two sequences, its patches and its padding, so that the padding is never
        # attended to.
        begin = torch.arange(pictures, device=q.device) * patches
        bounds = torch.stack([begin, begin + positions.valid.sum(1)], 1).flatten()
        bounds = F.pad(bounds, (0, 1), value=pictures * patches).int()
        q, k, v = (part.reshape(-1, heads, dim) for part in (q, k, v))
        attended = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, patches, patches, 0.0, False, False, scale=1.0
        )[0]
        return attended.reshape(pictures, patches, heads * dim)

    def tower(self, pixels: Tensor, positions: Positions) -> Tensor:
        """Patches [n, PATCHES, 768] in -1..1 to standardized soft tokens [n, 70, vision hidden] (float32)."""
        weights, size = self.parameters, self.size
        table = weights[f"{_VISION}patch_embedder.position_embedding_table"]
        column, row = positions.x.clamp(max=size.positions - 1), positions.y.clamp(max=size.positions - 1)
        x = _linear(pixels, weights[f"{_VISION}patch_embedder.input_proj.weight"], self.dtype).float()
        x = x + F.embedding(column, table[0]) + F.embedding(row, table[1])
        quarter = size.vision_hidden // size.vision_heads // 4
        rates = 100.0 ** (-torch.arange(quarter, device=x.device) / quarter)
        angles = torch.cat([positions.x[..., None] * rates, positions.y[..., None] * rates], -1)
        cos, sin = angles.cos(), angles.sin()
        for index in range(size.vision_layers):
            layer = _Layer(weights, f"{_VISION}encoder.layers.{index}.", ".linear")
            q, k, v = self.kernels.vision_qkv(
                x, layer["input_layernorm"], layer["self_attn.q_proj"], layer["self_attn.k_proj"],
                layer["self_attn.v_proj"], layer["self_attn.q_norm"], layer["self_attn.k_norm"], cos, sin,
                self.dtype,
            )  # fmt: skip
            x = self.kernels.vision_rest(
                x, self._vision_attention(q, k, v, positions), layer["self_attn.o_proj"],
                layer["post_attention_layernorm"], layer["pre_feedforward_layernorm"], layer["mlp.gate_proj"],
                layer["mlp.up_proj"], layer["mlp.down_proj"], layer["post_feedforward_layernorm"], self.dtype,
            )  # fmt: skip
        pooled = x.unflatten(1, (BUDGET, PATCHES // BUDGET)).mean(2) * math.sqrt(size.vision_hidden)
        return (pooled - weights[f"{_VISION}std_bias"]) * weights[f"{_VISION}std_scale"]

    def soft_tokens(self, pixels: Tensor, positions: Positions) -> Tensor:
        """The tower's soft tokens in the text's space, [n, 70, hidden] (float32)."""
        projection = self.parameters["model.embed_vision.embedding_projection.weight"]
        return _linear(rms(self.tower(pixels, positions)), projection, self.dtype).float()

    def embed(self, ids: Tensor, soft: Tensor, start: Tensor, tokens: Tensor) -> Tensor:
        """Token embeddings with the soft tokens in their places, [rows, length, hidden] (float32).

        start [n]: where a picture's soft tokens begin in the flattened rows; tokens [n]: how many there are.
        """
        table = self.parameters[f"{_TEXT}embed_tokens.weight"]
        rows, length = ids.shape
        # A product with one-hot rows: its backward is a product too, where an index's would be atomic adds.
        one_hot = ids[..., None] == torch.arange(table.shape[0], device=ids.device)
        x = (_linear(one_hot, table.t(), self.dtype) * math.sqrt(table.shape[1])).float()
        offset = torch.arange(BUDGET, device=ids.device)
        spare = rows * length  # one row past the end takes the unused soft tokens
        place = torch.where(offset < tokens[:, None], start[:, None].long() + offset, spare)
        flat = F.pad(x.flatten(0, 1), (0, 0, 0, 1)).index_copy(0, place.flatten(), soft.flatten(0, 1))
        return flat[:spare].view(rows, length, -1)

    def text(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder layers over embeddings [rows, length, hidden]; the stream before the last norm, and the
        balance loss.
        """
        size, (rows, length, _) = self.size, x.shape
        image = ids == SPECIAL_ID["<|image|>"]
        block = torch.where(image, (image & ~F.pad(image[:, :-1], (1, 0))).cumsum(1), 0)
        query, key = torch.arange(length, device=x.device)[:, None], torch.arange(length, device=x.device)
        same = (block[:, :, None] == block[:, None]) & (block[:, :, None] > 0)
        seen = ((key <= query) | same) & (key > query - size.window)
        bias = torch.zeros(rows, 1, length, length, dtype=self.dtype, device=x.device)
        bias = bias.masked_fill(~seen[:, None], float("-inf")).expand(-1, size.heads, -1, -1)
        live, balance = (ids != 0).float()[..., None], x.new_zeros(())
        for index, kind in enumerate(size.layers):
            layer = _Layer(self.parameters, f"{_TEXT}layers.{index}.")
            cos, sin = self._text_angles(kind, length, x.device)
            q, k, v = self.kernels.text_qkv(
                x, layer["input_layernorm"], layer["self_attn.q_proj"], layer["self_attn.k_proj"],
                layer["self_attn.v_proj"] if kind == "S" else None, layer["self_attn.q_norm"],
                layer["self_attn.k_norm"], cos, sin, size.heads, self.dtype,
            )  # fmt: skip
            if kind == "S":
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
            else:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
            x, part = self.kernels.text_rest(
                x, attended.transpose(1, 2).reshape(rows, length, -1), live, layer["self_attn.o_proj"],
                layer["post_attention_layernorm"], layer["pre_feedforward_layernorm"], layer["mlp.gate_proj"],
                layer["mlp.up_proj"], layer["mlp.down_proj"], layer["post_feedforward_layernorm_1"],
                layer["post_feedforward_layernorm_2"], layer["pre_feedforward_layernorm_2"],
                layer["post_feedforward_layernorm"], layer["router.scale"], layer["router.proj"],
                layer["router.per_expert_scale"], layer["experts.gate_up_proj"], layer["experts.down_proj"],
                layer["layer_scalar"], self.dtype,
            )  # fmt: skip
            balance = balance + part / len(size.layers)
        return x, balance

    def _text_angles(self, kind: str, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        half = (self.size.sliding_dim if kind == "S" else self.size.full_dim) // 2
        index = torch.arange(half, device=device)
        rates = (1e4 if kind == "S" else 1e6) ** (-index / half)
        if kind == "F":  # only a quarter of the angles turn
            rates = torch.where(index < half // 4, rates, 0.0)
        angles = torch.arange(length, device=device)[:, None] * rates
        return angles.cos(), angles.sin()

    def loss(
        self, pixels: Tensor, positions: Positions, batch: dict[str, Tensor], kind_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Answer loss, balance loss, helper loss, sums per kind, hits per token, (helper hits, marks)."""
        ids, tokens = batch["ids"].long(), (batch["grid"][:, 0] * batch["grid"][:, 1]).long()
        soft = self.soft_tokens(pixels, positions)
        helper, marked = self.kernels.helper_loss(
            soft,
            *(self.parameters[name] for name in HELPERS),
            tokens,
            batch["marks"],
            batch["groups"],
            self.dtype,
        )
        x, balance = self.text(self.embed(ids, soft, batch["start"], tokens), ids)
        loss, sums, hits = self.kernels.answer_loss(
            x, self.parameters[f"{_TEXT}norm.weight"], self.parameters[f"{_TEXT}embed_tokens.weight"], ids,
            batch["kind"], batch["size"], kind_weight, self.dtype,
        )  # fmt: skip
        return loss, balance, helper, sums, hits, marked

    def logits(self, x: Tensor) -> Tensor:
        """Soft-capped logits (float32) of the stream that ``text`` returns."""
        x = rms(x, self.parameters[f"{_TEXT}norm.weight"])
        z = _linear(x, self.parameters[f"{_TEXT}embed_tokens.weight"], self.dtype).float()
        return _SOFT_CAP * torch.tanh(z / _SOFT_CAP)


class _Layer:
    """Looks up a layer's tensors by short names: weights with or without ``.weight`` and the vision tower's
    infix.
    """

    def __init__(self, parameters: Parameters, prefix: str, infix: str = "") -> None:
        self.parameters, self.prefix, self.infix = parameters, prefix, infix

    def __getitem__(self, name: str) -> Tensor:
        for suffix in (f"{self.infix}.weight", ".weight", ""):
            found = self.parameters.get(f"{self.prefix}{name}{suffix}")
            if found is not None:
                return found
        raise KeyError(f"{self.prefix}{name}")


KIND_ROWS = len(KINDS) + 1
