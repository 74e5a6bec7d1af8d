"""The demo's tokenizer: byte-level BPE, Gemma 4's special tokens in front, each capital and digit a token."""

import functools
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from gemcut.demo.questions import PHRASES, phrase, plural, with_article
from gemcut.demo.scenes import BACKGROUNDS, COLOR_NAMES, SHAPES

SPECIALS = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>",
    "<|think|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
    '<|"|>', "<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio>", "<audio|>", "<|audio|>",
]  # fmt: skip
SPECIAL_ID = {token: index for index, token in enumerate(SPECIALS)}
VOCABULARY = 512
_NAMES = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>", "sot_token": "<|turn>", "eot_token": "<turn|>",
    "soc_token": "<|channel>", "eoc_token": "<channel|>", "think_token": "<|think|>", "escape_token": '<|"|>',
    "stc_token": "<|tool_call>", "etc_token": "<tool_call|>", "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>", "std_token": "<|tool>", "etd_token": "<tool|>",
    "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>",
}  # fmt: skip


def _corpus() -> list[str]:
    """Every phrase with every noun: the words that should become single tokens."""
    rng = random.Random(0)
    lines = ["user", "model", "thought", "system", "yes", "no", "first", "second"] * 40
    for _ in range(30):
        for key in PHRASES:
            color, shape = rng.choice(COLOR_NAMES), rng.choice(SHAPES)
            name = f"{color} {shape}"
            lines.append(
                phrase(rng, key, item=name, an_item=with_article(name), shape=shape, shapes=plural(shape),
                hue=color,
                       nth=rng.choice(["first", "second"]), text="", a="", b="")
            )  # fmt: skip
    for color in BACKGROUNDS:
        for shape in SHAPES:
            name = f"{color} {shape}"
            lines += [
                name,
                f"{with_article(name)}, {name} and {with_article(name)} on {with_article(color)} background.",
            ]
            lines.append(f"{color} {plural(shape)},")
    lines += [f"{with_article(color)} sign that says " for color in COLOR_NAMES] * 6
    lines += [
        "top left",
        "top right",
        "bottom left",
        "bottom right",
        "center",
        "top",
        "bottom",
        "left",
        "right",
    ] * 20
    return lines


def build() -> Tokenizer:
    """Train the tokenizer (deterministic, under a second)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated"),  # reading is spelling: a letter, a token
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    assert all(tokenizer.token_to_id(token) == index for token, index in SPECIAL_ID.items())
    return tokenizer


def save(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "padding_side": "left", **_NAMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class Encoder:
    """Text to ids with a memory, since the phrases of the chats repeat."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer or build()
        self._cached = functools.lru_cache(maxsize=60_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def __call__(self, text: str) -> tuple[int, ...]:
        return self._cached(text)
