"""Trained parameters to a folder that transformers (and gemcut) load."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gemcut.demo import net, tokenizer
from gemcut.demo.scenes import BUDGET
from gemcut.demo.tokenizer import SPECIAL_ID

STOP_IDS = [SPECIAL_ID["<eos>"], SPECIAL_ID["<turn|>"], SPECIAL_ID["<|tool_response>"]]


def config(size: net.Size) -> dict[str, object]:
    """config.json of a model of this size."""
    text = {
        "model_type": "gemma4_text",
        "vocab_size": tokenizer.VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": len(size.layers),
        "layer_types": ["sliding_attention" if kind == "S" else "full_attention" for kind in size.layers],
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.sliding_heads,
        "head_dim": size.sliding_dim,
        "num_global_key_value_heads": size.full_heads,
        "global_head_dim": size.full_dim,
        "attention_k_eq_v": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": size.window,
        "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": True,
        "num_experts": size.experts,
        "top_k_experts": 2,
        "moe_intermediate_size": size.expert_mlp,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
            },
        },
        "pad_token_id": SPECIAL_ID["<pad>"],
        "eos_token_id": SPECIAL_ID["<eos>"],
        "bos_token_id": SPECIAL_ID["<bos>"],
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "num_key_value_heads": size.vision_heads,
        "head_dim": size.vision_hidden // size.vision_heads,
        "hidden_activation": "gelu_pytorch_tanh",
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": size.positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "standardize": True,
        "use_clipped_linears": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": vision,
        "audio_config": None,
        "vision_soft_tokens_per_image": BUDGET,
        "image_token_id": SPECIAL_ID["<|image|>"],
        "boi_token_id": SPECIAL_ID["<|image>"],
        "eoi_token_id": SPECIAL_ID["<image|>"],
        "video_token_id": SPECIAL_ID["<|video|>"],
        "audio_token_id": SPECIAL_ID["<|audio|>"],
        "boa_token_id": SPECIAL_ID["<|audio>"],
        "eoa_token_index": SPECIAL_ID["<audio|>"],
        "eos_token_id": STOP_IDS,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


GENERATION = {
    "bos_token_id": SPECIAL_ID["<bos>"],
    "pad_token_id": SPECIAL_ID["<pad>"],
    "eos_token_id": STOP_IDS,
    "do_sample": False,
    "max_new_tokens": 96,
}
PROCESSOR = {
    "image_processor_type": "Gemma4ImageProcessor",
    "max_soft_tokens": BUDGET,
    "patch_size": 16,
    "pooling_kernel_size": 3,
}


def write(parameters: net.Parameters, size: net.Size, folder: Path) -> None:
    """Write the folder: weights in bf16, configurations, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in net.shapes(size) if name not in net.HELPERS]
    weights = {name: parameters[name].detach().to("cpu", torch.bfloat16).contiguous() for name in names}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", config(size)),
        ("generation_config.json", GENERATION),
        ("preprocessor_config.json", PROCESSOR),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="state.safetensors of a training")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(load_file(arguments.state), net.Size(), arguments.folder)


if __name__ == "__main__":
    main()
