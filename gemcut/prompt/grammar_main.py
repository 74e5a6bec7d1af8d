"""`python -m gemcut.prompt.grammar_main`: tries grammars before the engine's process meets them.

A trial is what an engine would do with the grammar: compile it, and compute masks along a random walk.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from gemcut.prompt.grammar import HELLO, LIMITS, TRIED, Vocabulary, first_line
from gemcut.worker_pool import Buffer, ChildLimits, Handler, serve

MAX_STEPS = 64
MAX_WALK_S = 0.1
SLOW_STEP_S = 0.25  # of CPU; a mask that takes longer would hold up every request of the engine
_PAGE = resource.getpagesize()


class SentVocabulary(Vocabulary):
    """A vocabulary out of a hello frame. It tokenizes greedily: for a trial it need not be as the model's."""

    def __init__(self, frame: memoryview) -> None:
        num_tokens, num_special, num_ends = HELLO.unpack_from(frame)
        count = num_tokens + num_special + num_ends
        numbers = np.frombuffer(frame, "<u4", count, HELLO.size).tolist()
        blob = bytes(frame[HELLO.size + 4 * count :])
        special, ends = numbers[:num_special], numbers[num_special : num_special + num_ends]
        tokens, at = [], 0
        for length in numbers[num_special + num_ends :]:
            tokens.append(blob[at : at + length])
            at += length
        super().__init__(num_tokens, tokens, special, ends)
        controls = set(special)
        self._ids = {token: i for i, token in enumerate(tokens) if token and i not in controls}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids, at = [], 0
        while at < len(data):
            for length in range(min(self._longest, len(data) - at), 0, -1):
                token = self._ids.get(data[at : at + length])
                if token is not None:
                    ids.append(token)
                    at += length
                    break
            else:
                return []
        return ids


class Trial:
    """Answers frames: a grammar in, what came of it out."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)

    def answer(self, frame: memoryview) -> Sequence[Buffer]:
        before = _resident()
        matcher = LLMatcher(self._tokenizer, str(frame, "utf-8"), log_level=0, limits=LIMITS)
        slowest, problem = 0.0, ""
        if matcher.is_error():
            problem = first_line(matcher.get_error())
        else:
            slowest, problem = self._walk(matcher)
        grown = max(0, _resident() - before)
        return TRIED.pack(slowest, grown), problem.encode()

    def _walk(self, matcher: LLMatcher) -> tuple[float, str]:
        """The slowest step of a random walk, and what is wrong. What goes wrong behind the first token is
        no reason to refuse: a model does not walk at random."""
        dice, slowest, begun = Random(0), 0.0, time.monotonic()
        for step in range(MAX_STEPS):
            started = time.process_time()
            matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            slowest = max(slowest, time.process_time() - started)
            if slowest > SLOW_STEP_S:
                return slowest, f"a single token takes {slowest:.2f} s to find, more than {SLOW_STEP_S} s"
            words = np.flatnonzero(self._words)
            if matcher.is_error() or not words.size:
                reason = first_line(matcher.get_error()) if matcher.is_error() else ""
                if not reason or reason.startswith("NoExtension"):
                    reason = "no text satisfies it"
                return slowest, reason if step == 0 else ""
            word = int(
                dice.choice(words)
            )  # no need to be fair: unpacking 262,144 bits costs more than the mask
            bits = [bit for bit in range(32) if self._words[word] >> bit & 1]
            if not matcher.consume_token(32 * word + dice.choice(bits)) or matcher.is_stopped():
                break
            if time.monotonic() - begun > MAX_WALK_S:
                break
        return slowest, ""


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def start(hello: memoryview) -> Handler:
    vocabulary = SentVocabulary(hello)
    return Trial(vocabulary.build()).answer


if __name__ == "__main__":
    # The engine's threads have stacks of 8 MB: what fits into an eighth here will fit there.
    serve(start, ChildLimits(growth_bytes=3 << 30, cpu_s=10.0, stack_bytes=1 << 20))
