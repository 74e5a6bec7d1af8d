"""Structured output: a schema, regex, list of choices or Lark grammar -> which token ids may come next.

Enters: `StructuredOutputs`, later the sampled ids of each answer. Leaves: bitmasks over the vocabulary. The
automata are llguidance's. The other end of the trial compilation is `grammar_main`.

A grammar comes from a stranger, and the library can be made to overflow its stack, or to compute for minutes
within its own limits. So each new one is compiled first in a process that can be killed; only what comes back
from there in time is compiled here, in the caller's thread and without the GIL.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import llguidance
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from gemcut.errors import GemcutError, InvalidRequest
from gemcut.prompt.tokenizer import Tokenizer
from gemcut.sampling import StructuredOutputs
from gemcut.worker_pool import Buffer, WorkerDied, WorkerOverran, WorkerPool

CHILD = "gemcut.prompt.grammar_main"

# llguidance's defaults, less where they admit steps of seconds: the fuel for building a lexer is a tenth (a
# step of `((a{1000}){1000}){1000}` then gives up after 0.1 s, not 1 s; 5,000 strings of 17 letters to choose
# from are still served), the states of one are 50,000 (some 50 MB). Errors in full would carry the schema.
LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    step_lexer_fuel=200_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
# Without a bound, a model that once prefers a space can write spaces to the end of its budget.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"

# Hello: HELLO, special ids, ids that end an answer, lengths of the tokens (uint32 each), the tokens' bytes.
# A job is the grammar's text. Its answer is TRIED and the error's text, empty if there is none.
HELLO = struct.Struct("<III")  # counts: tokens, special ids, end ids
TRIED = struct.Struct("<dQ")  # seconds of the slowest step, bytes that the process grew by

Phase = Literal["opening", "thought", "content"]


class Vocabulary:
    """What llguidance has to know of a tokenizer, in the shape that it asks for by these names.

    Special tokens are never taken for the text of their spelling.
    """

    is_tokenizer_wrapper = True

    def __init__(
        self, num_logits: int, tokens: Sequence[bytes], special: Sequence[int], ends: Sequence[int]
    ) -> None:
        self.ends = list(ends)
        # one entry for each logit, empty where there is no token: `n_vocab` would not lengthen the list
        self.tokens = [*tokens, *[b""] * (num_logits - len(tokens))]
        self.special_token_ids = list(special)
        self.eos_token_id = self.ends[0]
        self.bos_token_id = None

    def build(self) -> LLTokenizer:
        """Seconds for 262,144 tokens, with the GIL held."""
        return LLTokenizer(self, eos_token=self.ends)  # type: ignore[arg-type]

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of text that the grammar leaves no choice about."""
        raise NotImplementedError

    def hello(self) -> list[Buffer]:
        """The frame that a process is greeted with."""
        counts = len(self.tokens), len(self.special_token_ids), len(self.ends)
        lengths = [len(token) for token in self.tokens]
        numbers = np.array([*self.special_token_ids, *self.ends, *lengths], dtype="<u4")
        return [HELLO.pack(*counts), numbers.tobytes(), b"".join(self.tokens)]


class _TokenizerVocabulary(Vocabulary):
    """The vocabulary of a checkpoint, which tokenizes as its tokenizer does."""

    def __init__(self, tokenizer: Tokenizer, num_logits: int, ends: Sequence[int]) -> None:
        tokens = tokenizer.spellings()
        if None in tokens:
            raise InvalidRequest(
                "This checkpoint's tokenizer cuts spaces off the start of a reply; structured output is not "
                "supported with it.",
                "structured_outputs",
            )
        known = [token or b"" for token in tokens[:num_logits]]
        super().__init__(num_logits, known, sorted(tokenizer.controls.values()), ends)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode_text(text if isinstance(text, str) else text.decode())


@dataclass(frozen=True, eq=False, slots=True)
class Grammar:
    """A compiled grammar. `cost_bytes`: about what it holds in memory."""

    prototype: LLMatcher
    cost_bytes: int


class Grammars:
    """Compiles the grammars of one checkpoint and remembers the latest. Safe to use from several threads.

    num_logits: width of the model's logits. ends: ids that end an answer; they are what a complete grammar
    admits. suppressed: ids that never come. deadline_s: for a trial compilation. max_entries, max_bytes: of
    what is remembered.
    Nothing is built or started before the first grammar, unless `prepare` is called.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_logits: int,
        ends: Sequence[int],
        *,
        suppressed: Iterable[int] = (),
        deadline_s: float = 2.0,
        max_entries: int = 256,
        max_bytes: int = 256 << 20,
    ) -> None:
        # `<|tool_response>` ends a reply that calls tools; behind text it would be a strange end
        calls = tokenizer.control_id("<|tool_response>")
        self._ends = tuple(i for i in ends if i != calls)
        self._tokenizer, self._num_logits = tokenizer, num_logits
        self._deadline_s, self._max_entries, self._max_bytes = deadline_s, max_entries, max_bytes
        self.num_words = -(-num_logits // 32)
        self._possible = self._bits(range(num_logits)) & ~self._bits(suppressed)
        self.opening_id, self.closing_id = (
            tokenizer.control_id("<|channel>"),
            tokenizer.control_id("<channel|>"),
        )
        self._open_mask, self._close_mask = self._bits([self.opening_id]), self._bits([self.closing_id])
        self.end_mask = self._bits(self._ends) & self._possible
        self.thought_mask = self.end_mask  # made with the vocabulary
        self._built: tuple[LLTokenizer, WorkerPool, LLExecutor] | None = None
        self._build_lock = threading.Lock()
        self._closed = False
        self._lock = threading.Lock()
        self._compiled: OrderedDict[bytes, Grammar] = OrderedDict()
        self._bytes = 0
        self.num_compiled = 0

    def prepare(self) -> None:
        """Read the vocabulary now: with 262,144 tokens it takes seconds, in which no other thread runs.

        The process of the trials reads it as well, after the return and beside whatever comes then. Raises
        InvalidRequest if structured output is not supported with this tokenizer.
        """
        _, pool, _ = self._build()
        pool.submit([LLMatcher.grammar_from_regex("a").encode()])

    def close(self) -> None:
        """End the process of the trials. May be called again."""
        with self._build_lock:
            self._closed = True
            if self._built is not None:
                self._built[1].close()

    def compile(self, wanted: StructuredOutputs) -> Grammar:
        """The grammar of a request. Blocks, for up to twice the deadline.

        Raises InvalidRequest naming the field: not a grammar, not supported, too large or too slow;
        Overloaded if too many wait for their trial.
        """
        known = self.known(wanted)
        if known is not None:
            return known
        kind, text = wanted.source()
        param = f"structured_outputs.{kind}"
        if not self.end_mask.any():
            raise InvalidRequest("This checkpoint names no token that could end a structured answer.", param)
        key = _key(wanted)
        grammar = self._compile(_translate(kind, text, param), len(text), kind, param)
        with self._lock:
            self.num_compiled += 1
            if key not in self._compiled:
                self._compiled[key] = grammar
                self._bytes += grammar.cost_bytes
            while self._compiled and (
                len(self._compiled) > self._max_entries or self._bytes > self._max_bytes
            ):
                self._bytes -= self._compiled.popitem(last=False)[1].cost_bytes
        return grammar

    def known(self, wanted: StructuredOutputs) -> Grammar | None:
        """The grammar if it is remembered. Does not block."""
        key = _key(wanted)
        with self._lock:
            grammar = self._compiled.get(key)
            if grammar is not None:
                self._compiled.move_to_end(key)
            return grammar

    def begin(
        self, grammar: Grammar | None, phase: Phase = "content", max_thought_tokens: int | None = None
    ) -> GrammarState:
        """The state of a new answer.

        grammar: None if only the thought is ruled. phase: "content" if the grammar rules from the first token
        on; "opening" if the model may think first; "thought" if the prompt ends within a thought.
        max_thought_tokens: then the thought is closed; None for no bound.
        """
        self._build()  # `thought_mask` is made of the vocabulary
        matcher = None if grammar is None else grammar.prototype.deep_copy()
        return GrammarState(self, matcher, phase, max_thought_tokens)

    def masks(self, states: Mapping[int, GrammarState]) -> dict[int, np.ndarray]:
        """The masks of several rows, computed side by side: key -> int32 words, low bit first."""
        ruled = [state.matcher for state in states.values() if state.matcher and state.phase != "thought"]
        words = np.zeros((len(ruled), self.num_words), dtype=np.int32)
        if len(ruled) > 1:
            _, _, executor = self._build()
            executor.unsafe_compute_mask_ptr(
                [(matcher, i) for i, matcher in enumerate(ruled)],
                words.ctypes.data,
                words.strides[0],
                len(ruled),
            )
        elif ruled:
            ruled[0].unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        rows = iter(words)
        return {key: self._mask(state, rows) for key, state in states.items()}

    def _mask(self, state: GrammarState, rows: Iterator[np.ndarray]) -> np.ndarray:
        """The mask of a state; what its matcher admits is the next of the rows."""
        if state.phase == "thought":
            return (self._close_mask if state.thought_left == 0 else self.thought_mask).copy()
        if state.matcher is None:
            return self._possible.copy()
        words = next(rows)
        words &= self._possible
        if state.error is not None:
            pass  # it stays as it is
        elif state.matcher.is_error():
            state.error = f"The grammar cannot go on: {first_line(state.matcher.get_error())}."
        elif not words.any():
            state.error = "The grammar admits no token here that the model can write."
        if state.error is not None:
            return self.end_mask.copy()  # something must be drawn; the answer has failed
        if state.phase == "opening":
            words |= self._open_mask
        return words

    def _compile(self, text: str, size: int, kind: str, param: str) -> Grammar:
        tokenizer, pool, _ = self._build()
        what = f"The {kind.replace('_', ' ')} of {size:,} characters"
        try:
            tried = pool.submit([text.encode()]).result()
        except WorkerOverran:
            raise InvalidRequest(
                f"{what} takes longer than {self._deadline_s:g} s to compile. Simplify it.", param
            ) from None
        except WorkerDied as error:
            raise InvalidRequest(
                f"{what} ended the process that compiled it ({error.cause}): it is nested too deeply, or too "
                "large. Simplify it.",
                param,
            ) from None
        _, grown = TRIED.unpack_from(tried)
        problem = bytes(tried[TRIED.size :]).decode()
        if problem:
            raise InvalidRequest(f"{what} cannot be used: {problem}", param)
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidRequest(f"{what} cannot be used: {first_line(matcher.get_error())}", param)
        # what the process grew by misses memory that it had at hand
        return Grammar(matcher, max(grown, (64 << 10) + 8 * size))

    def _build(self) -> tuple[LLTokenizer, WorkerPool, LLExecutor]:
        if self._built is None:
            with self._build_lock:
                if self._closed:
                    raise GemcutError("The engine was closed: it compiles no more grammars.")
                if self._built is None:
                    vocabulary = _TokenizerVocabulary(self._tokenizer, self._num_logits, self._ends)
                    # a thought is text of any kind: it cannot end the answer, nor open a call or a thought
                    text = [i for i, token in enumerate(vocabulary.tokens) if token]
                    controls = self._bits(vocabulary.special_token_ids)
                    free = self._bits(text) & self._possible & ~controls
                    self.thought_mask = free | self._close_mask
                    # one process: a compilation takes milliseconds, and each holds a vocabulary
                    pool = WorkerPool(
                        CHILD, count=1, deadline_s=self._deadline_s, hello=vocabulary.hello(), max_waiting=64
                    )
                    executor = LLExecutor(num_threads=min(8, os.cpu_count() or 1))
                    self._built = vocabulary.build(), pool, executor
        return self._built

    def _bits(self, ids: Iterable[int]) -> np.ndarray:
        flags = np.zeros(self.num_words * 32, dtype=np.uint8)
        flags[[i for i in ids if 0 <= i < self._num_logits]] = 1
        return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)


class GrammarState:
    """Where one answer stands in its grammar.

    matcher: None if the content is free. thought_left: tokens that a thought may still take, None for any
    number. error: why the answer cannot go on; it stays.
    """

    __slots__ = ("_grammars", "error", "matcher", "phase", "thought_left")

    def __init__(
        self, grammars: Grammars, matcher: LLMatcher | None, phase: Phase, thought_left: int | None
    ) -> None:
        self._grammars, self.matcher = grammars, matcher
        self.phase: Phase = phase
        self.thought_left = thought_left
        self.error: str | None = None

    def mask(self) -> np.ndarray:
        """The ids that may come next."""
        return self._grammars.masks({0: self})[0]

    def take(self, token_id: int) -> str | None:
        """Go on by a sampled token. Returns the error, if there is one."""
        if self.error is not None:
            return self.error
        if self.phase == "thought":
            if token_id == self._grammars.closing_id:
                self.phase = "content"
            elif self.thought_left:
                self.thought_left -= 1
            return None
        if token_id == self._grammars.opening_id and (self.phase == "opening" or self.matcher is None):
            self.phase = "thought"
            return None
        self.phase = "content"
        if self.matcher is not None and not self.matcher.consume_token(token_id):
            reason = first_line(self.matcher.get_error())
            self.error = f"The grammar refuses the token {token_id} that was drawn: {reason}."
        return self.error


def _key(wanted: StructuredOutputs) -> bytes:
    return hashlib.sha256("\n".join(wanted.source()).encode()).digest()


def _translate(kind: str, text: str, param: str) -> str:
    """The request's grammar in llguidance's own format."""
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(text)
    if kind == "choice":
        return llguidance.grammar_from("choice", text)
    try:
        return LLMatcher.grammar_from_json_schema(
            text, overrides={"lenient": False, "whitespace_pattern": WHITESPACE}
        )
    except ValueError as error:
        raise InvalidRequest(f"The JSON schema cannot be read: {first_line(str(error))}.", param) from error


def first_line(error: str) -> str:
    """An error of the library in one short line."""
    lines = [line.strip() for line in error.splitlines()]
    return next((line[:300] for line in lines if line and not line.startswith("<")), "no reason was given")
