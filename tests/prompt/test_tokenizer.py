"""Ids equal to the reference's, control tokens only by structure, errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_tokenizers import SPECIALS, SPELLINGS, byte_level, gemma_like, harmless, hostile

from gemcut.data import Control, Segment, Slot, Span, Text
from gemcut.errors import CheckpointError, InvalidRequest
from gemcut.prompt.template import render
from gemcut.prompt.tokenizer import MediaIds, Tokenizer
from gemcut.prompt.writer import spell

FAST = settings(derandomize=True, max_examples=150, deadline=None)
CONTROLS = [s for s in SPECIALS if s not in ("<unk>",)]
NAMES = st.sampled_from(["byte-level", "gemma-like"])


def _segments(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[Segment]]:
    return st.lists(st.one_of(text.map(Text), st.sampled_from(CONTROLS).map(Control)), max_size=8)


@given(name=NAMES, segments=_segments(harmless))
@FAST
def test_ids_equal_the_library_on_the_spelled_prompt(
    name: str, segments: list[Segment], folders: dict[str, Path], both: dict[str, Tokenizer]
) -> None:
    library = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    expected = library.encode(spell(segments), add_special_tokens=False).ids
    assert list(both[name].encode(segments).token_ids) == expected
    assert both[name].decode(expected) == library.decode(expected, skip_special_tokens=False)


@given(name=NAMES, segments=_segments(hostile))
@FAST
def test_text_never_yields_a_control_id(
    name: str, segments: list[Segment], both: dict[str, Tokenizer]
) -> None:
    tokenizer = both[name]
    ids = tokenizer.encode(segments).token_ids
    control_ids = set(tokenizer.controls.values())
    structure = [tokenizer.control_id(s.token) for s in segments if isinstance(s, Control)]
    assert [i for i in ids if i in control_ids] == structure
    whole = spell(segments)
    assert tokenizer.decode(ids) == (whole.replace("▁", " ") if name == "gemma-like" else whole)


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_spelling_is_letters(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text(text)
    assert len(ids) > 1
    assert not set(ids) & set(tokenizer.controls.values())
    assert tokenizer.decode(ids) == text


def test_no_other_path_leads_to_a_control_id(tmp_path: Path) -> None:
    """Not a whole-word hit in the vocabulary, and not merges that spell a control token."""
    merges = [("<", "e"), ("<e", "o"), ("<eo", "s"), ("<eos", ">"), ("<", "|"), ("<|", "t"), ("|", ">")]
    for options in ({"ignore_merges": True}, {}):
        library = gemma_like(merges, **options)
        library.save(str(tmp_path / "tokenizer.json"))
        library.encode_special_tokens = True
        assert library.encode("<eos>", add_special_tokens=False).ids == [SPECIALS.index("<eos>")]
        tokenizer = Tokenizer(tmp_path)
        for text in ("<eos>", "a <eos> b", "<|turn>", "<mask>"):
            ids = tokenizer.encode_text(text)
            assert not set(ids) & set(tokenizer.controls.values())
            assert tokenizer.decode(ids) == text


def test_the_control_set(tokenizer: Tokenizer) -> None:
    """Everything of a control's form, flagged special or not; plain added tokens stay plain."""
    assert set(tokenizer.controls) == set(SPECIALS)
    assert tokenizer.control_id("<|turn>") == 5
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has no control token '<start_of_turn>'"):
        tokenizer.control_id("<start_of_turn>")


def test_plain_added_tokens_work_in_text(both: dict[str, Tokenizer]) -> None:
    tokenizer = both["gemma-like"]
    assert len(tokenizer.encode_text("\n\n")) == 1
    assert len(tokenizer.encode_text("<table>")) == 1
    # adjacent texts are one text: the newlines at their seam are one token
    seam: list[Segment] = [Control("<|turn>"), Text("a\n"), Text("\nb")]
    assert tokenizer.encode(seam) == tokenizer.encode([Control("<|turn>"), Text("a\n\nb")])


def test_raw_prompts_have_one_bos(tokenizer: Tokenizer) -> None:
    text = tokenizer.encode_text("<bos>the end")
    assert tokenizer.encode_raw("<bos>the end").token_ids == (tokenizer.control_id("<bos>"), *text)
    assert tokenizer.encode_raw("<bos>the end", add_bos=False).token_ids == tuple(text)


def test_media_are_expanded_in_place(tokenizer: Tokenizer) -> None:
    parts = [
        {"type": "text", "text": "<|image|><image|>"},
        {"type": "image"},
        {"type": "audio"},
        {"type": "image"},
    ]
    segments = render([{"role": "user", "content": parts}], empty_thought=True)
    prompt = tokenizer.encode(segments, [3, 2, 1])
    boi, image, eoi = (tokenizer.control_id(t) for t in ("<|image>", "<|image|>", "<image|>"))
    boa, audio, eoa = (tokenizer.control_id(t) for t in ("<|audio>", "<|audio|>", "<audio|>"))
    layout = (boi, image, image, image, eoi, boa, audio, audio, eoa, boi, image, eoi)
    start = prompt.token_ids.index(boi)
    assert prompt.token_ids[start : start + len(layout)] == layout
    assert prompt.spans == (
        Span("image", 0, start + 1, start + 4),
        Span("audio", 1, start + 6, start + 8),
        Span("image", 2, start + 10, start + 11),
    )
    soft = {image, audio}
    assert sum(i in soft for i in prompt.token_ids) == 6
    assert all(prompt.token_ids[p] in soft for span in prompt.spans for p in range(span.start, span.stop))


def test_what_cannot_be_encoded(tokenizer: Tokenizer, folder: Path) -> None:
    slot: list[Segment] = [Slot("image", 0)]
    for segments, sizes, message in (
        (slot, [], "1 media slots"),
        (slot, [1, 2], "2 media"),
        ([*slot, *slot], [1], "slots"),
        (slot, [0], "no soft tokens"),
        ([Slot("video", 0)], [4], "not supported yet"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            tokenizer.encode(segments, sizes)
    with pytest.raises(InvalidRequest, match="takes no audio"):
        Tokenizer(folder, MediaIds(image=19, boi=17, eoi=18)).encode([Slot("audio", 0)], [4])
    with pytest.raises(InvalidRequest, match="surrogate pair at character 2"):
        tokenizer.encode_text("ab\ud83d")


def test_an_unknown_character_is_no_unk(tmp_path: Path) -> None:
    spec = json.loads(gemma_like().to_str())
    spec["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InvalidRequest, match="cannot encode"):
        Tokenizer(tmp_path).encode_text("a 𓀀")


def _write(folder: Path, **changes: Any) -> None:
    spec = json.loads(gemma_like().to_str())
    model = changes.pop("model", {})
    spec |= changes
    spec["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram"}}, "no BPE vocabulary"),
        ({"model": {"vocab": {"a": -1}}}, "small non-negative"),
        ({"model": {"vocab": {"a": 10**12}}}, "small non-negative"),
        ({"model": {"merges": [["no", "such"]]}}, "cannot? be built|that can be built"),
        ({"added_tokens": None}, "added_tokens"),
        ({"added_tokens": [{"content": "<bos>", "id": 9}]}, "gives id 9 to both"),
        ({"added_tokens": []}, r"lacks the control tokens <pad> <eos> <bos> <\|turn>"),
        ({"decoder": None}, "no decoder"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
    ],
)
def test_damaged_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _write(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: No such file"):
        Tokenizer(tmp_path)
    whole = byte_level().to_str().encode()
    for data in (b"", whole[: len(whole) // 2], b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            Tokenizer(tmp_path)
    for data in (b"[]", b"{}", b'{"model": 1}'):
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(CheckpointError, match="no `model`"):
            Tokenizer(tmp_path)


def test_media_ids_must_exist(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no token 999999.*the boi token"):
        Tokenizer(folder, MediaIds(image=19, boi=999999, eoi=18))
    Tokenizer(folder, MediaIds(image=19, boi=17, eoi=18, video=999999))  # may be missing (spec 6.1)


def test_truncation_and_padding_in_the_file_do_nothing(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path).encode_text("a" * 100)) == 100


def test_files_of_transformers(tmp_path: Path) -> None:
    """What save_pretrained writes, by the generic class and by Gemma's own, encodes as transformers does."""
    import transformers

    merges: Any = [("t", "h"), ("th", "e"), ("▁", "the")]  # transformers' annotation forgets pairs
    vocab = gemma_like(merges).get_vocab()
    gemma = transformers.GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    gemma.add_special_tokens({"additional_special_tokens": [s for s in SPECIALS if "|" in s]})
    generic = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    messages = [{"role": "system", "content": "the  x"}, {"role": "user", "content": "é the\n\n\n🙂 漢字"}]
    segments = render(messages, empty_thought=True)
    for name, reference in (("gemma", gemma), ("generic", generic)):
        reference.save_pretrained(tmp_path / name)
        expected = reference(spell(segments), add_special_tokens=False)["input_ids"]
        tokenizer = Tokenizer(tmp_path / name)
        assert list(tokenizer.encode(segments).token_ids) == expected
        assert tokenizer.decode(expected) == spell(segments)
        assert tokenizer.vocab_size == max(reference.get_vocab().values()) + 1
