"""Segments -> ids, with a checkpoint's tokenizer.json.

Enters: segments (or raw text) and the number of soft tokens of each medium. Leaves: a `Prompt`.
It must not know the chat template, and needs neither torch nor transformers.

How control tokens stay out of text: when the file is loaded, every control token is given a secret
spelling (random, never leaves the process), in the vocabulary, the merges and the added tokens. A prompt is
spelled with the secret names and encoded in one pass, so the texts between are treated exactly as the
plain library treats them, while the letters `<|turn>` are letters like any others: no path through the
tokenizer, not even a whole-word hit in the vocabulary, leads from them to the control id.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tokenizers

from gemcut.data import Control, Prompt, Segment, Slot, Span, Text
from gemcut.errors import CheckpointError, InvalidRequest
from gemcut.prompt.detokenize import Detokenizer, check_decoder, token_bytes

CONTROL = re.compile(r"<\|.+>|<.+\|>|<(bos|eos|pad|unk|mask)>", re.DOTALL)
# what the template writes and the engine stops at; without them this is no Gemma 4 tokenizer
REQUIRED = (
    *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>'),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaIds:
    """Token ids of the media, from the checkpoint's config. None: the model has no such input."""

    image: int | None = None
    boi: int | None = None
    eoi: int | None = None
    audio: int | None = None
    boa: int | None = None
    eoa: int | None = None
    video: int | None = None


class Tokenizer:
    """The tokenizer of one checkpoint folder. Safe to use from several threads."""

    def __init__(self, folder: str | Path, media: MediaIds | None = None) -> None:
        self.path = Path(folder) / "tokenizer.json"
        self.media = media or MediaIds()
        spec = _read(self.path)
        self._tokens = _tokens_by_id(spec, self.path)
        ids = {token: i for i, token in enumerate(self._tokens) if token is not None}
        self._check_media()
        self._controls = {token: ids[token] for token in _control_tokens(spec, self._tokens, self.media)}
        missing = [token for token in REQUIRED if token not in self._controls]
        if missing:
            raise CheckpointError(
                f"{self.path} lacks the control tokens {' '.join(missing)}. "
                "Use the tokenizer of a Gemma 4 checkpoint."
            )
        self._control_ids = frozenset(self._controls.values())
        self._decoder_spec = spec.get("decoder")
        self._decoder = check_decoder(self._decoder_spec, self.path)
        # 128 random bits in letters and digits, which no normalizer changes; `<` and `>` so that words
        # next to it end where they end next to the true spelling
        self._secret = f"gemcut{secrets.token_hex(16)}"
        self._spellings = {token: f"<{self._secret}x{i}>" for token, i in self._controls.items()}
        self._encoder = _build(_with_secret_controls(spec, self._spellings), self.path)
        moved = [t for t, name in self._spellings.items() if self._encoder.token_to_id(name) != ids[t]]
        if moved:
            raise CheckpointError(f"{self.path}: the ids of {' '.join(moved)} do not follow the vocabulary.")

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id. The model's logits may be wider."""
        return len(self._tokens)

    @property
    def controls(self) -> Mapping[str, int]:
        """The control tokens: spelling -> id."""
        return self._controls

    def control_id(self, token: str) -> int:
        """The id of a control token by its spelling."""
        try:
            return self._controls[token]
        except KeyError:
            raise CheckpointError(f"{self.path} has no control token {token!r}.") from None

    def spellings(self) -> list[bytes | None]:
        """By id, the bytes that a token stands for; empty where the vocabulary has a hole. A control has
        its spelling. None for a token whose bytes depend on where it stands."""
        return [self.spelling(i) for i in range(len(self._tokens))]

    def spelling(self, token_id: int) -> bytes | None:
        """The entry of `spellings` for one id, which must be below `vocab_size`."""
        token = self._tokens[token_id]
        if token is None:
            return b""
        return token.encode() if token_id in self._control_ids else token_bytes(self._decoder_spec, token)

    def encode_text(self, text: str) -> list[int]:
        """Ids of literal text. Control tokens are never found in it."""
        return self._encode([Text(text)])

    def encode_raw(self, text: str, add_bos: bool = True) -> Prompt:
        """A prompt without a chat template: one `<bos>`, then the text."""
        segments: list[Segment] = [Text(text)]
        return self.encode([Control("<bos>"), *segments] if add_bos else segments)

    def encode(self, segments: Iterable[Segment], soft_tokens: Sequence[int] = ()) -> Prompt:
        """Encode segments. `soft_tokens[i]` is the number of soft tokens of the medium with index i."""
        segments = list(segments)
        slots = [segment for segment in segments if isinstance(segment, Slot)]
        if sorted(slot.index for slot in slots) != list(range(len(soft_tokens))):
            raise InvalidRequest(
                f"The prompt has {len(slots)} media slots, but sizes of {len(soft_tokens)} media were given."
            )
        brackets = {slot.index: self._brackets(slot) for slot in slots}
        ids = self._encode(segments)
        if not slots:
            return Prompt(tuple(ids))
        structure = iter(segment for segment in segments if not isinstance(segment, Text))
        expanded: list[int] = []
        spans: list[Span] = []
        for token_id in ids:
            segment = next(structure) if token_id in self._control_ids else None
            if not isinstance(segment, Slot):
                expanded.append(token_id)
                continue
            opening, placeholder, closing = brackets[segment.index]
            count = soft_tokens[segment.index]
            if count < 1:
                raise InvalidRequest(f"Medium {segment.index} ({segment.kind}) has no soft tokens.")
            start = len(expanded) + 1
            expanded += [opening, *[placeholder] * count, closing]
            spans.append(Span(segment.kind, segment.index, start, start + count))
        return Prompt(tuple(expanded), tuple(spans))

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental detokenizer for one reply."""
        return Detokenizer(self._tokens, self._control_ids, self._decoder)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Ids as one string, control tokens spelled."""
        stream = self.detokenizer()
        pieces = [piece for token_id in token_ids for piece in stream.push(token_id)] + stream.flush()
        return "".join(piece.text if isinstance(piece, Text) else piece.token for piece in pieces)

    def _encode(self, segments: Sequence[Segment]) -> list[int]:
        """Ids with one control id per control and per slot, in order, and none from text."""
        spelled: list[str] = []
        expected: list[int] = []
        for segment in segments:
            if isinstance(segment, Text):
                spelled.append(_checked_text(segment.text, self._secret))
                continue
            if isinstance(segment, Control):
                expected.append(self.control_id(segment.token))
            else:
                expected.append(self._brackets(segment)[1])
            spelled.append(self._spellings[self._tokens[expected[-1]] or ""])
        ids = self._encoder.encode("".join(spelled), add_special_tokens=False).ids
        if [i for i in ids if i in self._control_ids] != expected:
            # only `<unk>` can get here: a tokenizer without byte fallback, and a character it lacks
            raise InvalidRequest("The text has a character that this model's tokenizer cannot encode.")
        return ids

    def _brackets(self, slot: Slot) -> tuple[int, int, int]:
        """Opening, placeholder and closing ids of a medium (spec 4.5)."""
        if slot.kind == "video":
            raise InvalidRequest("Video input is not supported yet. Send frames as pictures.")
        ids = self.media
        triple = (ids.boi, ids.image, ids.eoi) if slot.kind == "image" else (ids.boa, ids.audio, ids.eoa)
        opening, placeholder, closing = triple
        if opening is None or placeholder is None or closing is None:
            raise InvalidRequest(f"This model takes no {slot.kind} input.")
        return opening, placeholder, closing

    def _check_media(self) -> None:
        for field in fields(self.media):
            token_id = getattr(self.media, field.name)
            if token_id is None or (0 <= token_id < len(self._tokens) and self._tokens[token_id] is not None):
                continue
            if field.name != "video":  # `<|video|>` may be missing from the files (spec 6.1)
                raise CheckpointError(
                    f"{self.path} has no token {token_id}, which config.json gives as the {field.name} token."
                )


def _read(path: Path) -> dict[str, Any]:
    try:
        spec = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged, it is not valid JSON ({error}). Download it again."
        ) from error
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise CheckpointError(f"{path} has no `model`. It is not a tokenizer.json of the tokenizers library.")
    if spec["model"].get("type", "BPE") != "BPE" or not isinstance(spec["model"].get("vocab"), dict):
        raise CheckpointError(f"{path} holds no BPE vocabulary. Gemma tokenizers are BPE.")
    added = spec.get("added_tokens")
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        for token in added
    ):
        raise CheckpointError(f"{path} has no list of `added_tokens` with content and id.")
    return spec


def _tokens_by_id(spec: Mapping[str, Any], path: Path) -> list[str | None]:
    """Token strings by id, vocabulary and added tokens together. Holes are None."""
    pairs = [*spec["model"]["vocab"].items(), *((t["content"], t["id"]) for t in spec["added_tokens"])]
    largest = max((i for _, i in pairs if type(i) is int), default=-1)
    if any(type(i) is not int or i < 0 for _, i in pairs) or largest > 4 * len(pairs) + 1_000_000:
        raise CheckpointError(f"{path} has token ids that are no small non-negative integers.")
    tokens: list[str | None] = [None] * (largest + 1)
    for token, i in pairs:
        if tokens[i] not in (None, token):
            raise CheckpointError(f"{path} gives id {i} to both {tokens[i]!r} and {token!r}.")
        tokens[i] = token
    return tokens


def _control_tokens(spec: Mapping[str, Any], tokens: Sequence[str | None], media: MediaIds) -> list[str]:
    added = [
        t["content"] for t in spec["added_tokens"] if t.get("special") or CONTROL.fullmatch(t["content"])
    ]
    ids = [getattr(media, field.name) for field in fields(media)]
    placeholders = [tokens[i] for i in ids if i is not None and i < len(tokens)]
    return list(dict.fromkeys([*added, *(token for token in placeholders if token is not None)]))


def _with_secret_controls(spec: Mapping[str, Any], spellings: Mapping[str, str]) -> dict[str, Any]:
    model = dict(spec["model"])
    model["vocab"] = {spellings.get(token, token): i for token, i in model["vocab"].items()}
    model["merges"] = [merge for merge in model.get("merges") or [] if not _touches(merge, spellings)]
    if model.get("unk_token") in spellings:
        model["unk_token"] = spellings[model["unk_token"]]
    in_added = {token["content"] for token in spec["added_tokens"]}
    added = [{**t, "content": spellings.get(t["content"], t["content"])} for t in spec["added_tokens"]]
    added += [
        {"id": i, "content": spellings[token], **dict.fromkeys(_ADDED_FLAGS, False), "special": True}
        for token, i in spec["model"]["vocab"].items()
        if token in spellings and token not in in_added
    ]
    # we never ask for special tokens, and a prompt is never cut or padded here
    off = {"post_processor": None, "truncation": None, "padding": None}
    return {**spec, **off, "model": model, "added_tokens": sorted(added, key=lambda token: token["id"])}


_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def _touches(merge: str | Sequence[str], spellings: Mapping[str, str]) -> bool:
    """Whether a merge rule makes a control token out of letters, or takes one apart."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left + right in spellings or left in spellings or right in spellings


def _build(spec: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer that can be built: {error}.") from error


def _checked_text(text: str, secret: str) -> str:
    if secret in text:
        raise InvalidRequest("The text holds a spelling that is private to this process.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"The text has half of a surrogate pair at character {error.start}. Send whole characters."
            ) from error
    return text
