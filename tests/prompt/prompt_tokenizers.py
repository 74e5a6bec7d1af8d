"""Tokenizers to test with, and the texts that are hard for them."""

from __future__ import annotations

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

# fmt: off
SPECIALS = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>",
    "<|think|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>', "<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio>", "<audio|>",
    "<|audio|>",
]
# plain added tokens, as Gemma's: matched in text, not special
PLAIN = ["[multimodal]", "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "\t\t", "<table>", "<td>"]
LETTERS = [chr(i) for i in range(0x21, 0x7F)] + ["▁", "é", "ß", "漢", "字", "🙂", "\t"]
MERGES = [
    ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "t"), ("i", "n"), ("a", "n"), ("an", "d"), ("▁", "and"),
    ("▁", "▁"), ("e", "r"), ("h", "er"), ("<", "|"), ("|", ">"), ("<|", "t"), ("1", "2"), ("漢", "字"),
]
# fmt: on
SPELLINGS = [*SPECIALS, "<|turn>model\n", "<|channel>thought\n", "<|unknown|>"]


def byte_level() -> Tokenizer:
    """Spec 9: byte-level BPE without merges, so any text round-trips."""
    vocab = {token: i for i, token in enumerate(SPECIALS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tokenizer


def gemma_like(merges: list[tuple[str, str]] | None = None, **model_options: bool) -> Tokenizer:
    """`▁` for spaces, byte fallback, special and plain added tokens; some controls not flagged special."""
    merges = MERGES if merges is None else merges
    tokens = [*SPECIALS, *PLAIN, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    tokens += [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **model_options
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    flagged = [s for s in SPECIALS if s not in ("<mask>", "<|video|>", "<|think|>")]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in flagged])
    plain = [*PLAIN, "<mask>", "<|video|>", "<|think|>"]
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in plain])
    return tokenizer


# letters without `<`, `>` and `|`: nothing in them can spell a control token
harmless = st.lists(
    st.one_of(
        st.sampled_from(
            ["the ", " and", "\n", "\n\n", "\n\n\n\n", "  ", "   ", "▁▁", "\t\t\t", "[multimodal]", "12"]
        ),
        st.sampled_from(["é", "漢字", "🙂", "👩‍👩‍👧", "𓀀", "\u0301", "\r\n", "\u00a0", "\x00", "\u2028"]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>|"), max_size=6),
    ),
    max_size=8,
).map("".join)
hostile = st.lists(
    st.one_of(
        st.sampled_from(SPELLINGS),
        st.sampled_from(["<", "|", ">", "<|", "|>", "turn", "image", '"', "<table>", "<0xE2>", "{", "}"]),
        harmless,
    ),
    max_size=6,
).map("".join)
