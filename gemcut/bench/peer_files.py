"""What other engines start from: a folder with a model's config and no weights, and prompts in their form.

They read a tokenizer and a processor even for prompts of ids, and turn ids that come with pictures into text
and back. So the tokenizer here has a word of its own for every id, and nothing is lost on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from gemcut.bench.contender import Setup
from gemcut.data import PATCH, POOL, ImagePatches
from gemcut.engine.model_files import ChatPrompt
from gemcut.plan import ModelPlan

# controls that a processor of Gemma 4 asks its tokenizer for, and the key of a config that has their id
CONTROLS = {
    "pad_token": ("<pad>", "pad_token_id"),
    "eos_token": ("<eos>", "eos_token_id"),
    "bos_token": ("<bos>", "bos_token_id"),
    "boi_token": ("<|image>", "boi_token_id"),
    "image_token": ("<|image|>", "image_token_id"),
    "eoi_token": ("<image|>", "eoi_token_id"),
    "boa_token": ("<|audio>", "boa_token_id"),
    "audio_token": ("<|audio|>", "audio_token_id"),
    "eoa_token": ("<audio|>", "eoa_token_index"),
    "video_token": ("<|video|>", "video_token_id"),
}
ARCHITECTURES = {"gemma4": "Gemma4ForConditionalGeneration", "gemma4_text": "Gemma4ForCausalLM"}


def write_folder(setup: Setup, folder: Path) -> None:
    """Write config, tokenizer and processor of the model whose weights are to be random."""
    config = setup.model_config()
    if not config.get("architectures") and config.get("model_type") in ARCHITECTURES:
        config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    plan = setup.files().plan
    ids = _control_ids(config | config.get("text_config", {}))
    _write(folder / "config.json", config)
    tokenizer = _tokenizer(plan.text.vocab, {CONTROLS[name][0]: index for name, index in ids.items()})
    tokenizer.save(str(folder / "tokenizer.json"))
    spellings = {name: CONTROLS[name][0] for name in ids}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **spellings})
    if plan.vision is not None:
        image = {
            "image_processor_type": "Gemma4ImageProcessor",
            "max_soft_tokens": plan.default_image_tokens,
            "patch_size": PATCH,
            "pooling_kernel_size": POOL,
        }
        _write(folder / "preprocessor_config.json", image)
        _write(folder / "processor_config.json", {"processor_class": "Gemma4Processor"})


def _control_ids(config: Mapping[str, Any]) -> dict[str, int]:
    """The ids of those of `CONTROLS` that the config names; of several that end an answer, the first."""
    found = {name: config.get(key) for name, (_, key) in CONTROLS.items()}
    return {
        name: index[0] if isinstance(index, list) else index
        for name, index in found.items()
        if index is not None
    }


def _tokenizer(vocab: int, controls: Mapping[str, int]) -> Tokenizer:
    """The word of id 7 is `t7`; controls, by their spelling, have that. Words are set apart by spaces."""
    words = {f"t{index}": index for index in range(vocab)}
    for spelling, index in controls.items():
        del words[f"t{index}"]
        words[spelling] = index
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(spelling, special=True) for spelling in controls])
    return tokenizer


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


class PeerPrompt(NamedTuple):
    """ids: one image token for each picture, without brackets; the other engine's processor writes the rest.
    pictures: of the size that their processor wants, so that it resizes nothing."""

    ids: list[int]
    pictures: list[Image.Image]


def peer_prompt(plan: ModelPlan, prompt: ChatPrompt) -> PeerPrompt:
    """A prompt of ours for another engine's door."""
    ids: list[int] = []
    done = 0
    for span in prompt.prompt.spans:
        assert plan.ids.image is not None, "a model without an image token has no spans"
        ids += [*prompt.prompt.token_ids[done : span.start - 1], plan.ids.image]
        done = span.stop + 1
    ids += prompt.prompt.token_ids[done:]
    return PeerPrompt(ids, [_picture(patches) for patches in prompt.media])


def _picture(patches: ImagePatches) -> Image.Image:
    """The picture that was cut into patches."""
    tiles = patches.pixels.reshape(patches.rows, patches.columns, PATCH, PATCH, 3)
    return Image.fromarray(
        tiles.transpose(0, 2, 1, 3, 4).reshape(patches.rows * PATCH, patches.columns * PATCH, 3)
    )
