"""The frozen facts of a model: what `parse_config` returns (spec 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["sliding", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of one layer kind: inv_freq[i] = theta^(-2i/head_dim), 0 from `live_angles` on."""

    theta: float
    head_dim: int
    live_angles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsPlan:
    """The mixture of experts beside the dense MLP of every layer (spec 2.4)."""

    count: int
    top_k: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One decoder layer.

    kv_layer: index of the layer whose K and V this layer reads; its own index if it owns them.
    window: keys a query may see, its own included; None in full-attention layers.
    ff_width: width of the dense MLP.
    """

    index: int
    kind: LayerKind
    q_heads: int
    kv_heads: int
    head_dim: int
    k_eq_v: bool
    kv_layer: int
    window: int | None
    ff_width: int
    rope: Rope
    experts: ExpertsPlan | None

    @property
    def owns_kv(self) -> bool:
        return self.kv_layer == self.index


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerInputPlan:
    """Per-layer embeddings of E2B and E4B (spec 2.5)."""

    width: int
    vocab: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlan:
    """The decoder. `bidirectional_vision`: sliding layers see whole vision blocks (spec 3)."""

    hidden: int
    vocab: int
    layers: tuple[LayerPlan, ...]
    eps: float
    softcap: float | None
    max_positions: int
    bidirectional_vision: bool
    per_layer_input: PerLayerInputPlan | None

    @property
    def window(self) -> int | None:
        """The sliding window, None if no layer has one."""
        return next((layer.window for layer in self.layers if layer.window is not None), None)

    def owners(self, kind: LayerKind) -> tuple[LayerPlan, ...]:
        """Layers of `kind` that own a KV cache."""
        return tuple(layer for layer in self.layers if layer.kind == kind and layer.owns_kv)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionPlan:
    """The vision tower (spec 4.2, 4.3). `positions`: rows of each axis of the position table."""

    hidden: int
    ff_width: int
    layers: int
    heads: int
    head_dim: int
    eps: float
    positions: int
    rope_theta: float
    standardize: bool
    clipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchEmbedderPlan:
    """The encoder-free vision embedder of the 12B (spec 4.6)."""

    hidden: int
    patch_values: int
    positions: int
    output: int
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioPlan:
    """Audio: a conformer (E2B, E4B; spec 5.2) if `layers` > 0, else raw frames (12B; spec 5.3)."""

    hidden: int
    layers: int
    heads: int
    ff_width: int
    channels: tuple[int, int]
    kernel: int
    output: int
    clipped: bool
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Token ids that the config names. `eos` stop generation."""

    pad: int
    bos: int | None
    eos: tuple[int, ...]
    image: int | None = None
    boi: int | None = None
    eoi: int | None = None
    audio: int | None = None
    boa: int | None = None
    eoa: int | None = None
    video: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """Everything about one checkpoint's architecture.

    text_prefix: what the decoder's tensor names start with, `model.language_model.` in multimodal
        checkpoints and `model.` in text-only ones.
    default_image_tokens: soft-token budget of a picture when the request names none.
    unknown_keys: config keys that were let through on request, for the log.
    """

    model_type: str
    text: TextPlan
    vision: VisionPlan | None
    patch_embedder: PatchEmbedderPlan | None
    audio: AudioPlan | None
    ids: TokenIds
    text_prefix: str
    default_image_tokens: int
    unknown_keys: tuple[str, ...] = ()
