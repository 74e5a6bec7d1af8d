"""The pieces add up to what the library decodes at once, and none ends inside a character."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_tokenizers import SPECIALS, gemma_like, hostile
from tokenizers import decoders

from gemcut.data import Control, Text
from gemcut.prompt.detokenize import Detokenizer
from gemcut.prompt.tokenizer import Tokenizer

FAST = settings(derandomize=True, max_examples=200, deadline=None)
NAMES = st.sampled_from(["byte-level", "gemma-like"])
# Bytes that make, break and almost make characters: as ids they are found by what they decode to.
BYTES = [0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xA9, 0xFF, 0x80, 0xED, 0xA0, 0x41]


def _byte_ids(tokenizer: Tokenizer, name: str) -> list[int]:
    if name == "gemma-like":
        first = len(SPECIALS) + 9
        return [first + byte for byte in BYTES]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(b if b in printable else 0x100 + others.index(b)) for b in BYTES]
    return [len(SPECIALS) + alphabet.index(letter) for letter in letters]


def _stream(tokenizer: Tokenizer, ids: list[int]) -> list[list[Text | Control]]:
    stream = tokenizer.detokenizer()
    return [*(stream.push(i) for i in ids), stream.flush()]


def _spell(steps: list[list[Text | Control]]) -> str:
    return "".join(p.text if isinstance(p, Text) else p.token for step in steps for p in step)


@given(name=NAMES, data=st.data())
@FAST
def test_any_ids_decode_as_the_library_decodes_them(
    name: str, data: st.DataObject, folders: dict[str, Path], both: dict[str, Tokenizer]
) -> None:
    tokenizer = both[name]
    some = st.one_of(
        st.sampled_from(_byte_ids(tokenizer, name)),
        st.integers(0, tokenizer.vocab_size + 3),
        st.integers(0, len(SPECIALS) - 1),
    )
    ids = data.draw(st.lists(some, max_size=24))
    library = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    steps = _stream(tokenizer, ids)
    assert _spell(steps) == library.decode(ids, skip_special_tokens=False)
    for step in steps:
        assert len(step) <= 2
        assert all(isinstance(piece, Control) or piece.text for piece in step)
    controls = [p.token for step in steps for p in step if isinstance(p, Control)]
    assert controls == [SPECIALS[i] for i in ids if i < len(SPECIALS)]


@given(name=NAMES, text=hostile)
@FAST
def test_text_comes_back_in_whole_characters(name: str, text: str, both: dict[str, Tokenizer]) -> None:
    steps = _stream(both[name], both[name].encode_text(text))
    expected = text.replace("▁", " ") if name == "gemma-like" else text
    assert _spell(steps) == expected
    assert not any(isinstance(piece, Control) for step in steps for piece in step)
    assert ("\ufffd" in _spell(steps)) == ("\ufffd" in text)


def test_a_character_waits_for_its_last_byte(both: dict[str, Tokenizer]) -> None:
    tokenizer = both["byte-level"]
    ids = tokenizer.encode_text("a€b")
    assert _stream(tokenizer, ids) == [[Text("a")], [], [], [Text("€")], [Text("b")], []]
    # the second byte cannot continue the first: the first is given up as soon as that is known
    broken = [ids[1], ids[0]]
    assert _stream(tokenizer, broken) == [[], [Text("\ufffda")], []]
    assert _stream(tokenizer, ids[1:3]) == [[], [], [Text("\ufffd")]]


def test_a_run_of_byte_tokens_is_decoded_as_one(both: dict[str, Tokenizer]) -> None:
    tokenizer = both["gemma-like"]
    ids = tokenizer.encode_text("a𓀀 b")
    assert _stream(tokenizer, ids)[:6] == [[Text("a")], [], [], [], [], [Text("𓀀 ")]]
    assert _stream(tokenizer, ids[1:5])[-1] == [Text("𓀀")]
    assert _stream(tokenizer, ids[1:4])[-1] == [Text("\ufffd" * 3)]
    turn = tokenizer.control_id("<turn|>")
    assert _stream(tokenizer, [*ids[1:5], turn])[-2:] == [[Text("𓀀"), Control("<turn|>")], []]


def test_letters_are_not_a_control(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_text("<|channel>"), tokenizer.control_id("<|channel>")]
    pieces = [piece for step in _stream(tokenizer, ids) for piece in step]
    assert [piece for piece in pieces if isinstance(piece, Control)] == [Control("<|channel>")]
    assert _spell([pieces]) == "<|channel><|channel>"


def test_a_leading_space_is_stripped_once(tmp_path: Path) -> None:
    """As Llama-like files ask for."""
    library = gemma_like()
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for text in (" the and", "  a", "a b", " ", ""):
        ids = tokenizer.encode_text(text)
        for start in ([], [tokenizer.control_id("<|turn>")]):
            expected = library.decode(start + ids, skip_special_tokens=False)
            assert _spell(_stream(tokenizer, start + ids)) == expected


@pytest.mark.parametrize("kind", ["text", "broken bytes"])
def test_cost_per_token_does_not_grow(kind: str, tokenizer: Tokenizer, folder: Path) -> None:
    name = "gemma-like" if "gemma-like" in folder.name else "byte-level"
    ids = tokenizer.encode_text("the and ") if kind == "text" else [_byte_ids(tokenizer, name)[0]]
    ids = (ids * 40_000)[:40_000]

    def seconds(count: int) -> float:
        stream: Detokenizer = tokenizer.detokenizer()
        start = time.process_time()
        for token_id in ids[:count]:
            stream.push(token_id)
        stream.flush()
        return time.process_time() - start

    assert seconds(40_000) < 40 * max(min(seconds(4_000) for _ in range(3)), 1e-4)  # 10 times is linear
