"""How the next token is chosen: what a request asks for, and what a checkpoint suggests (spec 6.2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemcut.errors import CheckpointError, InvalidRequest

MAX_LOGPROBS = 20
MAX_GRAMMAR_BYTES = 256 << 10
MAX_CHOICES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """The form that an answer must have; exactly one of these.

    json_schema: a schema, as a mapping or as JSON text. regex: for the whole answer. choice: strings, one of
    which is the answer. grammar: in Lark's notation, as llguidance reads it. json_object: any JSON object.
    Raises InvalidRequest naming the field; whether a grammar is one shows when it is compiled.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.choice, Sequence) and not isinstance(self.choice, str | tuple):
            object.__setattr__(self, "choice", tuple(self.choice))
        if not isinstance(self.json_object, bool):
            raise InvalidRequest(
                f"json_object must be true or false, got {self.json_object!r}.",
                "structured_outputs.json_object",
            )
        given = [
            name for name in ("json_schema", "regex", "choice", "grammar") if getattr(self, name) is not None
        ]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise InvalidRequest(
                "structured_outputs needs exactly one of json_schema, regex, choice, grammar, json_object; "
                f"got {', '.join(given) or 'none'}.",
                "structured_outputs",
            )
        kind = given[0]
        try:
            size = len(self.source()[1].encode())
        except UnicodeEncodeError:
            raise InvalidRequest(
                f"The {kind} has half of a surrogate pair. Send whole characters.",
                f"structured_outputs.{kind}",
            ) from None
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(
                f"The {kind} has {size:,} bytes; at most {MAX_GRAMMAR_BYTES:,} are accepted.",
                f"structured_outputs.{kind}",
            )

    def source(self) -> tuple[str, str]:
        """The name of the field that is set, and its content as text (a schema or a list as JSON)."""
        if self.json_object:
            return "json_object", '{"type":"object"}'
        if self.regex is not None:
            return "regex", _text("regex", self.regex)
        if self.grammar is not None:
            return "grammar", _text("grammar", self.grammar)
        if self.choice is not None:
            return "choice", _choices(self.choice)
        assert self.json_schema is not None, "exactly one field is set"
        return "json_schema", _schema(self.json_schema)


def _text(name: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise InvalidRequest(f"{name} must be text that is not empty.", f"structured_outputs.{name}")
    return text


def _choices(choices: Any) -> str:
    if (
        not isinstance(choices, tuple)
        or not 1 <= len(choices) <= MAX_CHOICES
        or not all(isinstance(text, str) and text for text in choices)
    ):
        raise InvalidRequest(
            f"choice must be a list of 1 to {MAX_CHOICES:,} strings that are not empty.",
            "structured_outputs.choice",
        )
    return json.dumps(choices, ensure_ascii=False)


def _schema(schema: Any) -> str:
    param = "structured_outputs.json_schema"
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(value, Mapping):
            raise InvalidRequest(
                f"json_schema must be an object, or the JSON text of one; it is {type(value).__name__}.",
                param,
            )
        # in the order that was given: it is the order in which properties are written
        return schema if isinstance(schema, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise InvalidRequest("json_schema is nested too deeply. Use $ref.", param) from None
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"json_schema is not JSON: {error}.", param) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's choices. None for temperature, top_k or top_p: the checkpoint's default.

    n: answers to the prompt. temperature: 0 takes the likeliest token. top_k: 0 keeps all.
    min_p: least probability, as a share of the likeliest token's.
    presence_penalty, frequency_penalty: taken off the logits of generated tokens (once, and for each
    time); repetition_penalty divides positive and multiplies negative logits of prompt and answer.
    max_tokens: None for all that the context leaves. min_tokens: before that, nothing ends the answer.
    stop: strings that end it and are not part of it; stop_token_ids: ids that do, beside the model's own.
    logit_bias: id -> addend. allowed_token_ids: nothing else may come.
    logprobs: this many likeliest tokens with each token, of the model's own distribution (before
    penalties and temperature); prompt_logprobs: the same for the prompt.
    seed: the same seed draws the same random numbers whatever else runs; None draws one.
    max_thought_tokens: a thought that goes on for so long is closed; None lets it end by itself.
    structured_outputs: the form that the answer's text must have. It rules the reply behind its thought, if
    the model may think, and leaves no room for tool calls.
    Raises InvalidRequest naming the field that is out of range.
    """

    n: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    max_thought_tokens: int | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str | tuple):
                object.__setattr__(self, name, tuple(value))
            elif not isinstance(value, tuple) and not (value is None and name == "allowed_token_ids"):
                raise InvalidRequest(f"{name} must be a list, got {value!r}.", name)
        _whole(self, "n", 1, 64)
        _number(self, "temperature", 0.0, 100.0)
        _whole(self, "top_k", 0)
        _number(self, "top_p", 0.0, 1.0, open_low=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        _number(self, "repetition_penalty", 0.0, 100.0, open_low=True)
        _whole(self, "max_tokens", 1)
        _whole(self, "min_tokens", 0)
        _whole(self, "logprobs", 0, MAX_LOGPROBS)
        _whole(self, "prompt_logprobs", 0, MAX_LOGPROBS)
        _whole(self, "seed", -(2**63), 2**64 - 1)
        _whole(self, "max_thought_tokens", 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}.", "min_tokens"
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidRequest("stop must hold strings that are not empty.", "stop")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids is empty: no token could ever come.", "allowed_token_ids")
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequest(
                f"logit_bias must map ids to numbers, got {self.logit_bias!r}.", "logit_bias"
            )
        for token, bias in self.logit_bias.items():
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise InvalidRequest(
                    f"logit_bias of token {token} must lie between -100 and 100, got {bias!r}.", "logit_bias"
                )

        if self.structured_outputs is not None or self.max_thought_tokens is not None:
            self._check_ruled()

    def _check_ruled(self) -> None:
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputs):
            kind = type(self.structured_outputs).__name__
            raise InvalidRequest(
                f"structured_outputs must be StructuredOutputs, got {kind}.", "structured_outputs"
            )
        # each of these could leave no token at all: a complete grammar admits nothing but the end, and a
        # thought that is long enough nothing but its own
        rule = "max_thought_tokens" if self.structured_outputs is None else "structured_outputs"
        for name, unset in (("min_tokens", 0), ("ignore_eos", False), ("allowed_token_ids", None)):
            if getattr(self, name) != unset:
                raise InvalidRequest(f"{name} cannot be combined with {rule}.", name)

    def check_ids(self, vocab: int) -> None:
        """Raise InvalidRequest if an id of the request lies outside a vocabulary of this size."""
        named = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": tuple(self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
        }
        for name, ids in named.items():
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                    raise InvalidRequest(f"{name} holds {token!r}; token ids are 0 to {vocab - 1}.", name)


OPEN = frozenset(
    (
        *("temperature", "top_k", "top_p", "max_tokens", "logprobs", "prompt_logprobs", "seed"),
        "max_thought_tokens",
    )
)  # fields of SamplingParams that may be None
COLDEST = 1e-30  # below this a quotient of logits may leave fp32; far above it the likeliest is certain


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSampling:
    """What a runner needs to sample one sequence. The engine puts it into `Seat.sampling`.

    params: every choice resolved, none open. seed: of this sequence. suppressed: ids that never come.
    stop_ids: ids that may not come before `params.min_tokens`.
    """

    params: SamplingParams
    seed: int
    suppressed: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json says. eos: ids that end an answer."""

    temperature: float
    top_k: int
    top_p: float
    eos: tuple[int, ...]
    suppressed: tuple[int, ...] = ()

    @classmethod
    def parse(cls, config: Mapping[str, Any] | None, eos: tuple[int, ...]) -> GenerationDefaults:
        """Read generation_config.json; `eos` is the model config's, used where the file names none.

        Without `do_sample` the answer is greedy, as in transformers.
        """
        config = config or {}
        sampled = config.get("do_sample") is True
        listed = config.get("eos_token_id")
        eos = eos if listed is None else tuple(listed) if isinstance(listed, list) else (listed,)

        def given(name: str, default: Any) -> Any:
            """null says as little as no entry."""
            return default if config.get(name) is None else config[name]

        try:
            checked = SamplingParams(
                temperature=given("temperature", 1.0) if sampled else 0.0,
                top_k=given("top_k", 50) if sampled else 0,  # 50: transformers' own default
                top_p=given("top_p", 1.0) if sampled else 1.0,
            )
        except InvalidRequest as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
        suppressed = given("suppress_tokens", ())
        if not isinstance(suppressed, list | tuple):
            raise CheckpointError(
                f"generation_config.json: suppress_tokens must be a list, got {suppressed!r}."
            )
        for token in (*eos, *suppressed):
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise CheckpointError(f"generation_config.json: {token!r} is no token id.")
        return cls(
            temperature=checked.temperature or 0.0,
            top_k=checked.top_k or 0,
            top_p=1.0 if checked.top_p is None else checked.top_p,
            eos=eos,
            suppressed=tuple(suppressed),
        )

    def fill(self, params: SamplingParams) -> SamplingParams:
        """`params` with the checkpoint's values where the request left them open."""
        temperature = self.temperature if params.temperature is None else params.temperature
        return replace(
            params,
            temperature=temperature if temperature >= COLDEST else 0.0,
            top_k=self.top_k if params.top_k is None else params.top_k,
            top_p=self.top_p if params.top_p is None else params.top_p,
        )


def _whole(params: SamplingParams, name: str, least: int, most: int | None = None) -> None:
    value = getattr(params, name)
    if value is None and name in OPEN:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number, got {value!r}.", name)
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidRequest(f"{name} must be {limit}, got {value}.", name)


def _number(params: SamplingParams, name: str, least: float, most: float, open_low: bool = False) -> None:
    value = getattr(params, name)
    if value is None and name in OPEN:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a number, got {value!r}.", name)
    if not least <= value <= most or (open_low and value == least):
        above = f"above {least:g} and at most {most:g}" if open_low else f"from {least:g} to {most:g}"
        raise InvalidRequest(f"{name} must be {above}, got {value:g}.", name)
