"""Tiny random Gemma 4 models of transformers, a byte-level tokenizer and picture inputs (spec 9).

Everything is made from a seed: no network, no torchvision, no processor classes. The models are the
references of the parity tests, so every value that a default initialisation leaves at 0, 1 or
infinity (norm weights, clip bounds, layer scalars, router scales) is randomised: otherwise an error
in it would be invisible.

    model = make_model("moe")                                   # fp32, eager attention and experts
    model.save_pretrained(folder); make_tokenizer().save_pretrained(folder)
    logits = model(**image_inputs("moe", picture(), PROMPT)).logits
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

# fmt: off
SPECIALS = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>",
    "<|think|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>', "<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio>", "<audio|>",
    "<|audio|>",
]
# fmt: on
SPECIAL_IDS = {token: i for i, token in enumerate(SPECIALS)}
VOCAB = 320  # 24 specials and 256 byte symbols; the rest is unused

PROMPT = "<bos><|turn>user\nhi <|image|> what?<turn|>\n<|turn>model\n"

SLIDING, FULL = "sliding_attention", "full_attention"
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "rms_norm_eps": 1e-6,
    "sliding_window": 8,  # shorter than the 60 soft tokens of picture(): the window cuts a block
    "max_position_embeddings": 512,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_BIG: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING] * 5 + [FULL],
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "use_bidirectional_attention": "vision",
}
_EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24}
_SHARING = {
    "num_hidden_layers": 8,
    "num_key_value_heads": 1,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
}
# Text settings of a small twin of each size: 31B, 26B-A4B, E2B, 12B.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {**_BIG, "hidden_size_per_layer_input": 0},
    "moe": {**_BIG, "hidden_size_per_layer_input": 0, **_EXPERTS},
    "ple": _SHARING,
    "unified": _BIG,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "output_proj_dims": 40,
    "subsampling_conv_channels": [128, 32],
}
IDS: dict[str, Any] = {
    "boi_token_id": SPECIAL_IDS["<|image>"],
    "eoi_token_id": SPECIAL_IDS["<image|>"],
    "image_token_id": SPECIAL_IDS["<|image|>"],
    "video_token_id": SPECIAL_IDS["<|video|>"],
    "boa_token_id": SPECIAL_IDS["<|audio>"],
    "eoa_token_index": SPECIAL_IDS["<audio|>"],
    "audio_token_id": SPECIAL_IDS["<|audio|>"],
}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE without merges: any text round-trips, one token a byte."""
    vocab = dict(SPECIAL_IDS)
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        # the names that the Gemma 4 processors look up
        extra_special_tokens={
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "sot_token": "<|turn>",
            "eot_token": "<turn|>",
            "soc_token": "<|channel>",
            "eoc_token": "<channel|>",
            "think_token": "<|think|>",
            "escape_token": '<|"|>',
            "stc_token": "<|tool_call>",
            "etc_token": "<tool_call|>",
            "str_token": "<|tool_response>",
            "etr_token": "<tool_response|>",
            "std_token": "<|tool>",
            "etd_token": "<tool|>",
        },
    )


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.08) -> None:
    """Fill every parameter and buffer that a checkpoint holds with seeded values of a lively scale."""
    generator = torch.Generator().manual_seed(seed)
    fixed = ("inv_freq", "embed_scale", "softcap", "inv_timescales")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point() or any(word in name for word in fixed):
            continue
        leaf = name.rsplit(".", 1)[-1]
        noise = torch.randn(value.shape, generator=generator)
        if leaf in ("input_min", "output_min"):
            value.copy_(-2.0 - noise.abs())
        elif leaf in ("input_max", "output_max"):
            value.copy_(2.0 + noise.abs())
        elif leaf == "layer_scalar":
            value.copy_(0.6 + 0.1 * noise)
        elif leaf in ("std_scale", "scale", "per_expert_scale") or "norm" in name:
            value.copy_(1.0 + 0.2 * noise)
        elif leaf in ("std_bias", "per_dim_scale"):
            value.copy_(0.3 * noise)
        else:
            value.copy_(std * noise)


def make_config(kind: str, *, text_only: bool = False) -> Any:
    """The transformers config of a tiny model. `text_only`: the decoder's own config (not for unified)."""
    text = {**TEXT, **KINDS[kind]}
    if text_only:
        return transformers.Gemma4TextConfig(**text)
    if kind == "unified":
        return transformers.Gemma4UnifiedConfig(
            text_config=text,
            audio_config={"audio_embed_dim": 640},
            vision_config={
                "patch_size": 16,
                "pooling_kernel_size": 3,
                "mm_embed_dim": 48,
                "mm_posemb_size": 64,
                "output_proj_dims": 48,
            },
            **IDS,
        )
    small = kind == "ple"
    return transformers.Gemma4Config(
        text_config=text,
        vision_config={**VISION, "standardize": not small, "use_clipped_linears": small},
        audio_config=dict(AUDIO) if small else None,
        **IDS,
    )


def make_model(
    kind: str,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    experts: str = "eager",
    seed: int = 0,
    *,
    text_only: bool = False,
) -> Any:
    """A tiny random model in eval mode. `text_only` makes Gemma4ForCausalLM: no towers, prefix `model.`.

    Judge a flash-style kernel in bf16 with attn="sdpa": eager rounds scores to bf16 (spec 10.5).
    """
    if text_only:
        model_class = transformers.Gemma4ForCausalLM
    elif kind == "unified":
        model_class = transformers.Gemma4UnifiedForConditionalGeneration
    else:
        model_class = transformers.Gemma4ForConditionalGeneration
    torch.manual_seed(seed)
    config = make_config(kind, text_only=text_only)
    model: Any = model_class._from_config(config, attn_implementation=attn, dtype=torch.float32)
    randomise(model, seed)
    # .to(bf16) would round the rotary frequencies, which from_pretrained keeps in fp32
    frequencies = {name: value.clone() for name, value in model.named_buffers() if "inv_freq" in name}
    model = model.to(dtype).eval()
    for name, value in model.named_buffers():
        if name in frequencies:
            value.data = frequencies[name]
    if kind == "moe":
        model.set_experts_implementation(experts)
    return model


def picture(height: int = 200, width: int = 300, seed: int = 0) -> Image.Image:
    """RGB noise. 200 x 300 at a budget of 70 becomes 288 x 480, that is 60 soft tokens."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def image_inputs(kind: str, image: Image.Image, prompt: str, budget: int = 70) -> dict[str, torch.Tensor]:
    """What a Gemma 4 processor would return for a prompt that holds one `<|image|>`.

    input_ids, attention_mask, mm_token_type_ids [1, T]; pixel_values [1, 9 * budget, 768] in [0, 1] and
    image_position_ids [1, 9 * budget, 2], for the unified kind [1, budget, 6912] and [1, budget, 2].
    """
    features = Gemma4ImageProcessorPil(max_soft_tokens=budget)(image, return_tensors="pt")
    count = int(features["num_soft_tokens_per_image"][0])
    pixels, positions = features["pixel_values"], features["image_position_ids"]
    if kind == "unified":  # regroup 3 x 3 patches of 16 x 16 pixels into patches of 48 x 48
        patches = int((positions[0, :, 0] >= 0).sum())
        columns = int(positions[0, :, 0].max()) + 1
        rows = patches // columns
        grid = pixels[0, :patches].reshape(rows // 3, 3, columns // 3, 3, 16, 16, 3)
        pixels = torch.zeros(1, budget, 6912)
        pixels[0, :count] = grid.permute(0, 2, 1, 4, 3, 5, 6).reshape(count, -1)
        y, x = torch.meshgrid(torch.arange(rows // 3), torch.arange(columns // 3), indexing="ij")
        positions = torch.full((1, budget, 2), -1)
        positions[0, :count] = torch.stack([x, y], -1).reshape(count, 2)
    text = prompt.replace("<|image|>", "<|image>" + "<|image|>" * count + "<image|>")
    ids = torch.tensor([make_tokenizer()(text, add_special_tokens=False)["input_ids"]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == SPECIAL_IDS["<|image|>"]).long(),
        "pixel_values": pixels,
        "image_position_ids": positions,
    }
