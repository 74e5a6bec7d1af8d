"""ModelPlan -> the exact names and shapes of its checkpoint's tensors (spec 8.1, 8.2)."""

from __future__ import annotations

import math
import re

from gemcut.plan.facts import AudioPlan, LayerPlan, ModelPlan, PatchEmbedderPlan, TextPlan, VisionPlan

Shapes = dict[str, tuple[int, ...]]

CLIP_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def tensor_shapes(plan: ModelPlan) -> Shapes:
    """Every tensor that a checkpoint of this plan must hold, in transformers' names. The head is tied."""
    shapes = _text(plan.text, plan.text_prefix)
    hidden = plan.text.hidden
    if plan.vision is not None:
        shapes |= _vision(plan.vision)
        shapes["model.embed_vision.embedding_projection.weight"] = (hidden, plan.vision.hidden)
    if plan.patch_embedder is not None:
        shapes |= _patch_embedder(plan.patch_embedder, hidden)
    if plan.audio is not None:
        if plan.audio.layers:
            shapes |= _audio(plan.audio)
        shapes["model.embed_audio.embedding_projection.weight"] = (hidden, plan.audio.output)
    return shapes


def parameter_count(plan: ModelPlan) -> int:
    """Values in all tensors, the tied head once (spec 8.2, column "transformers instance")."""
    return sum(math.prod(shape) for shape in tensor_shapes(plan).values())


def is_dead_tensor(plan: ModelPlan, name: str) -> bool:
    """K/V tensors of KV-shared layers: E2B and E4B files hold them, no forward reads them (spec 8.2)."""
    found = re.fullmatch(
        re.escape(plan.text_prefix) + r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.weight", name
    )
    if found is None or int(found[1]) >= len(plan.text.layers):
        return False
    return not plan.text.layers[int(found[1])].owns_kv


def canonical_name(plan: ModelPlan, name: str) -> str:
    """The name of `tensor_shapes` for a name on disk: the 12B's embedder has two spellings (spec 8.1)."""
    if plan.patch_embedder is None:
        return name
    if name == "model.embed_vision.embedding_projection.weight":
        return "model.embed_vision.multimodal_embedder.embedding_projection.weight"
    if name.startswith("model.vision_embedder."):
        return "model.embed_vision." + name.removeprefix("model.vision_embedder.")
    return name


def _text(text: TextPlan, prefix: str) -> Shapes:
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (text.vocab, text.hidden),
        f"{prefix}norm.weight": (text.hidden,),
    }
    for layer in text.layers:
        shapes |= _decoder_layer(text, layer, f"{prefix}layers.{layer.index}.")
    if text.per_layer_input is not None:
        width, total = text.per_layer_input.width, text.per_layer_input.width * len(text.layers)
        shapes |= {
            f"{prefix}embed_tokens_per_layer.weight": (text.per_layer_input.vocab, total),
            f"{prefix}per_layer_model_projection.weight": (total, text.hidden),
            f"{prefix}per_layer_projection_norm.weight": (width,),
        }
    return shapes


def _decoder_layer(text: TextPlan, layer: LayerPlan, at: str) -> Shapes:
    hidden, head = text.hidden, layer.head_dim
    q_rows, kv_rows = layer.q_heads * head, layer.kv_heads * head
    shapes: Shapes = {
        f"{at}input_layernorm.weight": (hidden,),
        f"{at}post_attention_layernorm.weight": (hidden,),
        f"{at}pre_feedforward_layernorm.weight": (hidden,),
        f"{at}post_feedforward_layernorm.weight": (hidden,),
        f"{at}layer_scalar": (1,),
        f"{at}self_attn.q_proj.weight": (q_rows, hidden),
        f"{at}self_attn.q_norm.weight": (head,),
        f"{at}self_attn.o_proj.weight": (hidden, q_rows),
        f"{at}mlp.gate_proj.weight": (layer.ff_width, hidden),
        f"{at}mlp.up_proj.weight": (layer.ff_width, hidden),
        f"{at}mlp.down_proj.weight": (hidden, layer.ff_width),
    }
    if layer.owns_kv:
        shapes[f"{at}self_attn.k_proj.weight"] = (kv_rows, hidden)
        shapes[f"{at}self_attn.k_norm.weight"] = (head,)
        if not layer.k_eq_v:
            shapes[f"{at}self_attn.v_proj.weight"] = (kv_rows, hidden)
    if layer.experts is not None:
        experts, width = layer.experts.count, layer.experts.width
        shapes |= {
            f"{at}router.proj.weight": (experts, hidden),
            f"{at}router.scale": (hidden,),
            f"{at}router.per_expert_scale": (experts,),
            f"{at}experts.gate_up_proj": (experts, 2 * width, hidden),
            f"{at}experts.down_proj": (experts, hidden, width),
            f"{at}post_feedforward_layernorm_1.weight": (hidden,),
            f"{at}post_feedforward_layernorm_2.weight": (hidden,),
            f"{at}pre_feedforward_layernorm_2.weight": (hidden,),
        }
    if text.per_layer_input is not None:
        width = text.per_layer_input.width
        shapes |= {
            f"{at}per_layer_input_gate.weight": (width, hidden),
            f"{at}per_layer_projection.weight": (hidden, width),
            f"{at}post_per_layer_input_norm.weight": (hidden,),
        }
    return shapes


def _clipped(name: str, rows: int, columns: int, clipped: bool) -> Shapes:
    """A linear of the towers: `.linear.weight`, and four scalar bounds beside it if it is clipped."""
    shapes: Shapes = {f"{name}.linear.weight": (rows, columns)}
    if clipped:
        shapes |= {f"{name}.{bound}": () for bound in CLIP_BOUNDS}
    return shapes


def _vision(vision: VisionPlan) -> Shapes:
    at, hidden, inner = "model.vision_tower.", vision.hidden, vision.heads * vision.head_dim
    shapes: Shapes = {
        f"{at}patch_embedder.input_proj.weight": (hidden, 768),
        f"{at}patch_embedder.position_embedding_table": (2, vision.positions, hidden),
    }
    if vision.standardize:
        shapes |= {f"{at}std_bias": (hidden,), f"{at}std_scale": (hidden,)}
    for i in range(vision.layers):
        layer = f"{at}encoder.layers.{i}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}{norm}_layernorm.weight"] = (hidden,)
        for projection in "qkv":
            shapes |= _clipped(f"{layer}self_attn.{projection}_proj", inner, hidden, vision.clipped)
        shapes |= _clipped(f"{layer}self_attn.o_proj", hidden, inner, vision.clipped)
        shapes |= {f"{layer}self_attn.{x}_norm.weight": (vision.head_dim,) for x in "qk"}
        shapes |= _clipped(f"{layer}mlp.gate_proj", vision.ff_width, hidden, vision.clipped)
        shapes |= _clipped(f"{layer}mlp.up_proj", vision.ff_width, hidden, vision.clipped)
        shapes |= _clipped(f"{layer}mlp.down_proj", hidden, vision.ff_width, vision.clipped)
    return shapes


def _patch_embedder(embedder: PatchEmbedderPlan, hidden: int) -> Shapes:
    at, values, width = "model.embed_vision.", embedder.patch_values, embedder.hidden
    return {
        f"{at}patch_ln1.weight": (values,),
        f"{at}patch_ln1.bias": (values,),
        f"{at}patch_dense.weight": (width, values),
        f"{at}patch_dense.bias": (width,),
        f"{at}patch_ln2.weight": (width,),
        f"{at}patch_ln2.bias": (width,),
        f"{at}pos_embedding": (embedder.positions, 2, width),
        f"{at}pos_norm.weight": (width,),
        f"{at}pos_norm.bias": (width,),
        f"{at}multimodal_embedder.embedding_projection.weight": (hidden, embedder.output),
    }


def _audio(audio: AudioPlan) -> Shapes:
    at, hidden, wide = "model.audio_tower.", audio.hidden, audio.ff_width
    head = hidden // audio.heads
    first, second = audio.channels
    # two stride-2 convolutions leave 32 of 128 mel bins
    subsample = f"{at}subsample_conv_projection."
    shapes: Shapes = {
        f"{subsample}layer0.conv.weight": (first, 1, 3, 3),
        f"{subsample}layer0.norm.weight": (first,),
        f"{subsample}layer1.conv.weight": (second, first, 3, 3),
        f"{subsample}layer1.norm.weight": (second,),
        f"{subsample}input_proj_linear.weight": (hidden, 32 * second),
        f"{at}output_proj.weight": (audio.output, hidden),
        f"{at}output_proj.bias": (audio.output,),
    }
    for i in range(audio.layers):
        layer = f"{at}layers.{i}."
        for feed_forward in ("feed_forward1", "feed_forward2"):
            shapes |= _clipped(f"{layer}{feed_forward}.ffw_layer_1", wide, hidden, audio.clipped)
            shapes |= _clipped(f"{layer}{feed_forward}.ffw_layer_2", hidden, wide, audio.clipped)
            for norm in ("pre", "post"):
                shapes[f"{layer}{feed_forward}.{norm}_layer_norm.weight"] = (hidden,)
        for projection in ("q_proj", "k_proj", "v_proj", "post"):
            shapes |= _clipped(f"{layer}self_attn.{projection}", hidden, hidden, audio.clipped)
        shapes[f"{layer}self_attn.relative_k_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}self_attn.per_dim_scale"] = (head,)
        shapes |= _clipped(f"{layer}lconv1d.linear_start", 2 * hidden, hidden, audio.clipped)
        shapes |= _clipped(f"{layer}lconv1d.linear_end", hidden, hidden, audio.clipped)
        shapes[f"{layer}lconv1d.depthwise_conv1d.weight"] = (hidden, 1, audio.kernel)
        shapes[f"{layer}lconv1d.pre_layer_norm.weight"] = (hidden,)
        shapes[f"{layer}lconv1d.conv_norm.weight"] = (hidden,)
        for norm in ("norm_pre_attn", "norm_post_attn", "norm_out"):
            shapes[f"{layer}{norm}.weight"] = (hidden,)
    return shapes
