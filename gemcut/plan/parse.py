"""config.json -> ModelPlan (spec 1.1, 1.2). Unknown keys and values that cannot be honoured are errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gemcut.data import PATCH, POOL, SOFT_TOKEN_BUDGETS
from gemcut.errors import ConfigError
from gemcut.plan.facts import (
    AudioPlan,
    ExpertsPlan,
    LayerKind,
    LayerPlan,
    ModelPlan,
    PatchEmbedderPlan,
    PerLayerInputPlan,
    Rope,
    TextPlan,
    TokenIds,
    VisionPlan,
)

MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")

# Written by transformers or the hub, and without effect on what the model computes. The first two
# lines are class defaults that every config inherits.
HARMLESS = frozenset(
    (
        *(
            "_name_or_path",
            "architectures",
            "chunk_size_feed_forward",
            "id2label",
            "label2id",
            "problem_type",
        ),
        *("return_dict", "is_encoder_decoder", "output_attentions", "output_hidden_states"),
        *("transformers_version", "_from_model_config", "auto_map"),
        *("dtype", "torch_dtype", "initializer_range", "attention_dropout", "use_cache"),
    )
)
# Restate what another key or the processor already says, or belong to parts that have none of it.
RESTATED = {
    "top": frozenset({"eoa_token_id", "audio_seq_length", "image_seq_length"}),
    "vision": frozenset({"max_position_embeddings", "default_output_length", "global_head_dim"}),
    "patch_embedder": frozenset({"model_patch_size", "num_soft_tokens"}),
    "frames": frozenset({"hidden_size", "output_proj_dims", "audio_samples_per_token"}),
}


# Bounds of any count: a config must not make the parser itself run out of memory.
MOST, MOST_LAYERS = 1 << 40, 1000


def _shown(value: Any) -> str:
    """A value from a file, cut to a length that an error can carry."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f"{text[:100]}..."


class _Keys:
    """Reads a mapping key by key and remembers which were read, so that the rest can be named."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.read: set[str] = set()

    def has(self, key: str) -> bool:
        self.read.add(key)
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(
                f"{self.where}{key} must be a whole number of at least {least}, got {_shown(value)}."
            )
        if value > most:
            raise ConfigError(f"{self.where}{key} is {_shown(value)}, more than {most:,}.")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}{key} must be true or false, got {_shown(value)}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ConfigError(f"{self.where}{key} must be a positive number, got {_shown(value)}.")
        return float(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}{key} must be an object, got {type(value).__name__}.")
        return value

    def token(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(f"{self.where}{key} must be a token id, got {_shown(value)}.")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """The key is absent or holds one of the values that gemcut computes with."""
        self.read.add(key)
        if key in self.values and self.values[key] not in allowed:
            raise ConfigError(
                f"{self.where}{key} is {_shown(self.values[key])}; gemcut computes with "
                f"{' or '.join(map(repr, allowed))} only."
            )

    def unread(self, restated: frozenset[str] = frozenset()) -> list[str]:
        return [f"{self.where}{key}" for key in self.values if key not in self.read | HARMLESS | restated]


def parse_config(config: Mapping[str, Any], *, allow_unknown: bool = False) -> ModelPlan:
    """Read a config.json of any Gemma 4 size, in the hub's spelling or transformers' (spec 1.1).

    Raises ConfigError naming the key if one is missing, out of range, not supported, or unknown;
    with `allow_unknown` unknown keys are listed in `ModelPlan.unknown_keys` instead.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"A model config is a JSON object, got {type(config).__name__}.")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type is {_shown(model_type)}; gemcut runs {', '.join(MODEL_TYPES)}.")
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ConfigError(
            f"The checkpoint is quantised ({_shown(method)}); gemcut loads bf16, fp16 and fp32 weights. "
            "Use the unquantised checkpoint."
        )
    unknown: list[str] = []
    text_only = model_type.endswith("_text")
    unified = model_type.startswith("gemma4_unified")
    vision = patch_embedder = audio = None
    default_image_tokens = 280
    if text_only:
        text_keys = top = _Keys(config, "")
    else:
        top = _Keys(config, "")
        if not top.has("text_config"):
            raise ConfigError("text_config is missing from the config.")
        text_keys = _Keys(top.mapping("text_config"), "text_config.")
        text_keys.must_be("model_type", f"{model_type}_text")
        if top.has("vision_config"):
            keys = _Keys(top.mapping("vision_config"), "vision_config.")
            if unified:
                patch_embedder = _parse_patch_embedder(keys)
            else:
                vision = _parse_vision(keys)
            unknown += keys.unread(RESTATED["patch_embedder" if unified else "vision"])
        if top.has("audio_config"):
            keys = _Keys(top.mapping("audio_config"), "audio_config.")
            audio = _parse_frames(keys) if unified else _parse_audio(keys)
            unknown += keys.unread(RESTATED["frames"] if unified else frozenset())
        default_image_tokens = top.whole("vision_soft_tokens_per_image", 280)
        if default_image_tokens not in SOFT_TOKEN_BUDGETS:
            raise ConfigError(
                f"vision_soft_tokens_per_image is {default_image_tokens}; "
                f"the processor admits {', '.join(map(str, SOFT_TOKEN_BUDGETS))}."
            )
        top.must_be("tie_word_embeddings", True)
        top.read.add("model_type")
    text = _parse_text(text_keys, unified)
    ids = _parse_ids(top, text_keys, text.vocab)
    unknown += text_keys.unread()
    if top is not text_keys:
        unknown += top.unread(RESTATED["top"])
    if unknown and not allow_unknown:
        raise ConfigError(
            f"The config has keys that gemcut does not know: {', '.join(sorted(unknown))}. They may change "
            "what the model computes. Pass --allow-unknown-config to go on without them."
        )
    return ModelPlan(
        model_type=model_type,
        text=text,
        vision=vision,
        patch_embedder=patch_embedder,
        audio=audio,
        ids=ids,
        text_prefix="model." if text_only else "model.language_model.",
        default_image_tokens=default_image_tokens,
        unknown_keys=tuple(sorted(unknown)),
    )


def _parse_text(keys: _Keys, unified: bool) -> TextPlan:
    keys.read.add("model_type")
    keys.must_be("hidden_activation", "gelu_pytorch_tanh")
    keys.must_be("attention_bias", False, None)
    keys.must_be("tie_word_embeddings", True)
    if keys.get("use_bidirectional_attention") == "all":
        raise ConfigError(
            'use_bidirectional_attention is "all": an encoder, which cannot generate. gemcut runs decoders.'
        )
    keys.must_be("use_bidirectional_attention", None, "vision")
    count = keys.whole("num_hidden_layers", most=MOST_LAYERS)
    kinds = _layer_kinds(keys, count)
    heads = keys.whole("num_attention_heads")
    k_eq_v = keys.flag("attention_k_eq_v")
    shapes = _layer_shapes(keys, kinds, k_eq_v)
    shared = keys.whole("num_kv_shared_layers", 0, least=0)
    sources = _kv_sources(kinds, shared)
    width = keys.whole("intermediate_size")
    wide = keys.flag("use_double_wide_mlp")
    window = keys.whole("sliding_window", 1024 if unified else 512)
    ropes = _ropes(keys)
    experts = _parse_experts(keys)
    layers = []
    for i, kind in enumerate(kinds):
        head_dim, kv_heads = shapes[i]
        if heads % kv_heads:
            raise ConfigError(f"Layer {i}: {heads} query heads cannot share {kv_heads} KV heads evenly.")
        theta, factor = ropes[kind]
        if head_dim % 2:
            raise ConfigError(f"Layer {i}: head size {head_dim} is odd; rotary embedding needs pairs.")
        layers.append(
            LayerPlan(
                index=i,
                kind=kind,
                q_heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                k_eq_v=k_eq_v and kind == "full",
                kv_layer=sources[i],
                window=window if kind == "sliding" else None,
                ff_width=2 * width if wide and sources[i] != i else width,
                rope=Rope(theta=theta, head_dim=head_dim, live_angles=int(factor * head_dim // 2)),
                experts=experts,
            )
        )
    ple_width = keys.whole("hidden_size_per_layer_input", 0 if unified else 256, least=0)
    ple_vocab = keys.whole("vocab_size_per_layer_input", 262144, least=0)
    return TextPlan(
        hidden=keys.whole("hidden_size"),
        vocab=keys.whole("vocab_size", 262144),
        layers=tuple(layers),
        eps=keys.number("rms_norm_eps", 1e-6),
        softcap=keys.number("final_logit_softcapping") if keys.has("final_logit_softcapping") else None,
        max_positions=keys.whole("max_position_embeddings", 262144 if unified else 131072),
        # Absent means "vision" in the unified classes and no bidirectional attention in the others.
        bidirectional_vision=keys.values.get("use_bidirectional_attention", "vision" if unified else None)
        == "vision",
        per_layer_input=PerLayerInputPlan(width=ple_width, vocab=ple_vocab) if ple_width else None,
    )


def _layer_kinds(keys: _Keys, count: int) -> list[LayerKind]:
    names: dict[str, LayerKind] = {"sliding_attention": "sliding", "full_attention": "full"}
    listed = keys.get("layer_types")
    if listed is None:  # transformers' default: five sliding, one full
        kinds: list[LayerKind] = ["full" if (i + 1) % 6 == 0 else "sliding" for i in range(count)]
    else:
        if not isinstance(listed, list) or any(name not in list(names) for name in listed):
            raise ConfigError(
                f"{keys.where}layer_types must list {' and '.join(names)}, got {listed!r:.200}."
            )
        kinds = [names[name] for name in listed]
    if len(kinds) != count:
        raise ConfigError(
            f"{keys.where}layer_types lists {len(kinds)} layers, num_hidden_layers says {count}."
        )
    kinds[-1] = "full"  # forced whatever the list says (spec 1.1)
    return kinds


def _layer_shapes(keys: _Keys, kinds: list[LayerKind], k_eq_v: bool) -> list[tuple[int, int]]:
    """(head_dim, kv_heads) of every layer, from either spelling of spec 1.1."""
    head_dim = keys.whole("head_dim", 256)
    kv_heads = keys.whole("num_key_value_heads", 4)
    keys.read.update({"global_head_dim", "num_global_key_value_heads", "per_layer_config"})
    if keys.values.get("per_layer_config") is not None:
        return _per_layer_shapes(keys, len(kinds), head_dim, kv_heads)
    full_dim = keys.whole("global_head_dim", 512)
    full_heads = keys.whole("num_global_key_value_heads", kv_heads) if k_eq_v else kv_heads
    return [(full_dim, full_heads) if kind == "full" else (head_dim, kv_heads) for kind in kinds]


def _per_layer_shapes(keys: _Keys, count: int, head_dim: int, kv_heads: int) -> list[tuple[int, int]]:
    shapes = [(head_dim, kv_heads)] * count
    for index, entry in keys.mapping("per_layer_config").items():
        where = f"{keys.where}per_layer_config.{index}"
        if not re.fullmatch("[0-9]{1,4}", str(index)) or int(index) >= count:
            raise ConfigError(f"{where}: there are layers 0 to {count - 1}.")
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where} must be an object, got {type(entry).__name__}.")
        layer = _Keys(entry, f"{where}.")
        shapes[int(index)] = (layer.whole("head_dim", head_dim), layer.whole("num_key_value_heads", kv_heads))
        if rest := layer.unread():
            raise ConfigError(f"gemcut does not know the per-layer setting {', '.join(rest)}.")
    return shapes


def _kv_sources(kinds: list[LayerKind], shared: int) -> list[int]:
    """Which layer's K and V each layer reads: its own, or the last own-KV layer of its kind (spec 2.3)."""
    first_shared = len(kinds) - shared
    if first_shared < 1:
        raise ConfigError(f"num_kv_shared_layers is {shared}, but there are only {len(kinds)} layers.")
    last = {kind: i for i, kind in enumerate(kinds[:first_shared])}
    if missing := set(kinds[first_shared:]) - set(last):
        raise ConfigError(f"No layer before {first_shared} provides K and V for the shared {missing} layers.")
    return [i if i < first_shared else last[kind] for i, kind in enumerate(kinds)]


def _ropes(keys: _Keys) -> dict[str, tuple[float, float]]:
    """kind -> (theta, share of the head's angles that turn)."""
    parameters = keys.mapping("rope_parameters")
    out = {"sliding": (1e4, 1.0), "full": (1e6, 0.25)}
    for name, kind, rope_type in (
        ("sliding_attention", "sliding", "default"),
        ("full_attention", "full", "proportional"),
    ):
        if name not in parameters:
            if parameters:
                raise ConfigError(f"{keys.where}rope_parameters lacks {name}.")
            continue
        where = f"{keys.where}rope_parameters."
        rope = _Keys(_Keys(parameters, where).mapping(name), f"{where}{name}.")
        rope.must_be("rope_type", rope_type)
        theta, factor = out[kind]
        theta = rope.number("rope_theta", theta)
        factor = rope.number("partial_rotary_factor", factor)
        if factor > 1 or (kind == "sliding" and factor != 1):
            raise ConfigError(f"{rope.where}partial_rotary_factor cannot be {factor}.")
        if rest := rope.unread():
            raise ConfigError(f"gemcut does not know the rotary setting {', '.join(rest)}.")
        out[kind] = (theta, factor)
    return out


def _parse_experts(keys: _Keys) -> ExpertsPlan | None:
    keys.read.update({"num_experts", "top_k_experts", "moe_intermediate_size"})
    if not keys.flag("enable_moe_block"):
        return None
    count, top_k = keys.whole("num_experts"), keys.whole("top_k_experts")
    if top_k > count:
        raise ConfigError(f"{keys.where}top_k_experts is {top_k}, but there are {count} experts.")
    return ExpertsPlan(count=count, top_k=top_k, width=keys.whole("moe_intermediate_size"))


def _parse_vision(keys: _Keys) -> VisionPlan:
    keys.must_be("model_type", "gemma4_vision")
    keys.must_be("hidden_activation", "gelu_pytorch_tanh")
    keys.must_be("attention_bias", False, None)
    keys.must_be("patch_size", PATCH)
    keys.must_be("pooling_kernel_size", POOL)
    # "default" in hub files means the axial scheme of spec 4.2
    rope = _Keys(keys.mapping("rope_parameters"), f"{keys.where}rope_parameters.")
    rope.must_be("rope_type", "default", "axial")
    theta = rope.number("rope_theta", 100.0)
    if rest := rope.unread():
        raise ConfigError(f"gemcut does not know the rotary setting {', '.join(rest)}.")
    heads, head_dim = keys.whole("num_attention_heads", 12), keys.whole("head_dim", 64)
    kv_heads = keys.whole("num_key_value_heads", 12)
    if kv_heads != heads:
        raise ConfigError(
            f"{keys.where}num_attention_heads is {heads} and num_key_value_heads {kv_heads}; the tower has a "
            "KV head for each query head."
        )
    if head_dim % 4:
        raise ConfigError(
            f"{keys.where}head_dim is {head_dim}; two-dimensional rotation needs a multiple of 4."
        )
    return VisionPlan(
        hidden=keys.whole("hidden_size", 768),
        ff_width=keys.whole("intermediate_size", 3072),
        layers=keys.whole("num_hidden_layers", 16, most=MOST_LAYERS),
        heads=heads,
        head_dim=head_dim,
        eps=keys.number("rms_norm_eps", 1e-6),
        positions=keys.whole("position_embedding_size", 10240),
        rope_theta=theta,
        standardize=keys.flag("standardize"),
        clipped=keys.flag("use_clipped_linears"),
    )


def _parse_patch_embedder(keys: _Keys) -> PatchEmbedderPlan:
    keys.must_be("model_type", "gemma4_unified_vision")
    keys.must_be("patch_size", PATCH)
    keys.must_be("pooling_kernel_size", POOL)
    return PatchEmbedderPlan(
        hidden=keys.whole("mm_embed_dim", 3840),
        patch_values=3 * (PATCH * POOL) ** 2,
        positions=keys.whole("mm_posemb_size", 1120),
        output=keys.whole("output_proj_dims", 3840),
        eps=keys.number("rms_norm_eps", 1e-6),
    )


def _parse_audio(keys: _Keys) -> AudioPlan:
    keys.must_be("model_type", "gemma4_audio")
    keys.must_be("hidden_act", "silu")
    # Scalars of the maths in spec 5.2: gemcut has the one set of values that every checkpoint has.
    for key, value in (
        ("residual_weight", 0.5),
        ("attention_chunk_size", 12),
        ("attention_context_left", 13),
        ("attention_context_right", 0),
        ("attention_logit_cap", 50.0),
        ("attention_invalid_logits_value", -1e9),
        ("gradient_clipping", 1e10),
    ):
        keys.must_be(key, value)
    channels = keys.get("subsampling_conv_channels", [128, 32])
    if not isinstance(channels, list | tuple) or [type(c) is int and c > 0 for c in channels] != [True] * 2:
        raise ConfigError(
            f"{keys.where}subsampling_conv_channels must be two whole numbers, got {_shown(channels)}."
        )
    hidden, heads = keys.whole("hidden_size", 1024), keys.whole("num_attention_heads", 8)
    if hidden % heads:
        raise ConfigError(f"{keys.where}num_attention_heads is {heads}, which does not divide {hidden}.")
    return AudioPlan(
        hidden=hidden,
        layers=keys.whole("num_hidden_layers", 12, most=MOST_LAYERS),
        heads=heads,
        ff_width=4 * hidden,
        channels=(channels[0], channels[1]),
        kernel=keys.whole("conv_kernel_size", 5),
        output=keys.whole("output_proj_dims", 1536),
        clipped=keys.flag("use_clipped_linears", True),
        eps=keys.number("rms_norm_eps", 1e-6),
    )


def _parse_frames(keys: _Keys) -> AudioPlan:
    keys.must_be("model_type", "gemma4_unified_audio")
    width = keys.whole("audio_embed_dim", 640)
    eps = keys.number("rms_norm_eps", 1e-6)
    return AudioPlan(
        hidden=width,
        layers=0,
        heads=0,
        ff_width=0,
        channels=(0, 0),
        kernel=0,
        output=width,
        clipped=False,
        eps=eps,
    )


def _parse_ids(top: _Keys, text: _Keys, vocab: int) -> TokenIds:
    top.read.update({"pad_token_id", "bos_token_id"})  # the top level may repeat the text config's
    eos = top.get("eos_token_id", text.get("eos_token_id", 1))
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    ids = TokenIds(
        pad=text.whole("pad_token_id", 0, least=0),
        bos=text.token("bos_token_id"),
        eos=eos,
        image=top.token("image_token_id"),
        boi=top.token("boi_token_id"),
        eoi=top.token("eoi_token_id"),
        audio=top.token("audio_token_id"),
        boa=top.token("boa_token_id"),
        eoa=top.token("eoa_token_index"),
        video=top.token("video_token_id"),
    )
    # Text-only fine-tunes with a cut vocabulary keep the media ids; those are then unusable, not wrong.
    named = {"pad": ids.pad} | ({} if ids.bos is None else {"bos": ids.bos})
    named |= {f"eos[{i}]": token for i, token in enumerate(eos)}
    for name, token in named.items():
        if type(token) is not int or not 0 <= token < vocab:
            raise ConfigError(f"Token id {name} is {_shown(token)}, outside the vocabulary of {vocab}.")
    return ids
