"""Answers to MATH-Vision: what a reply gives as its answer, and whether it equals the right one.

The rules are those of the authors' `evaluation/evaluate.py`. They compute values with latex2sympy and
Python's eval; here a small reader of LaTeX's arithmetic does, which runs nothing that a model has written. Of
the 48,640 verdicts in their repository, on sixteen sets of replies, it gives 48,635.
"""

from __future__ import annotations

import math
import re

_FLAGS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_GONE = (
    *(" ", "\\,", "\n", "\\text", "\\mbox", "\\left", "\\right", "^{\\circ}", "^\\circ", "{m}^3", "m^3"),
    *("{units}", "units", "{km}", "km", "\\!", "\\$", "$", "\\%"),
)
_TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\[a-zA-Z]+|[-+*/^(){}])")
_MEANT = (
    *(("$", ""), ("\\displaystyle", "")),
    *(("\\cdot", "*"), ("\\times", "*"), ("\\div", "/"), (":", "/")),
)
LONGEST = 200  # characters of an answer that is computed
MOST_BITS = 1 << 14  # of a power of whole numbers; larger ones are left to floats


def read_answer(text: str) -> str:
    """The answer in a reply: of a closing `(A).`, of the last \\boxed{}, or behind `the answer is`."""
    answer = text.strip()
    for letter in "ABCDE":
        if answer.endswith((f" {letter}.", f" ({letter}).")) or answer.startswith(
            (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        ):
            answer = letter
    if _is_number(number := answer.split("is ")[-1].rstrip(".")):
        answer = number
    if "oxed{" not in answer:
        for flag in _FLAGS:
            for spelling in (flag, flag.replace("the", "The")):
                if spelling in answer:
                    answer = answer.split(spelling)[-1].strip().split("\n")[0].split(". ")[0]
    answer = _cleaned(answer.lower().replace("{}", ""))
    for letter in "abcde":
        answer = answer.replace(f"({letter})", letter).replace(f"{{{letter}}}", letter)
    return answer.rstrip(".").lstrip(":").strip()


def equal(first: str, second: str) -> bool:
    """Whether two answers are the same text, or of the same value to two places."""
    first, second = first.lower().strip(), second.lower().strip()
    if not first.replace(" ", "") or not second.replace(" ", ""):
        return False
    if first == second:
        return True
    one, other = _parts(first), _parts(second)
    if len(one) > 1 or len(other) > 1:
        return len(one) == len(other) and all(map(_same_value, one, other))
    return _same_value(first, second)


def _cleaned(answer: str) -> str:
    found = re.findall(r"oxed{(.*)}", answer, re.DOTALL)
    if found:
        answer = found[-1].rsplit("oxed{", 1)[-1]
    close, open_ = answer.find("}"), answer.find("{")
    if close != -1 and (open_ == -1 or close < open_):
        answer = answer[:close]
    answer = answer.split("=")[-1].split("\\approx")[-1]
    answer = answer.replace("∞", "\\infty").replace("+\\infty", "\\infty").replace("\\\\", "\\")
    for unit in _GONE:
        answer = answer.replace(unit, "")
    return answer.replace("tfrac", "frac").replace("dfrac", "frac")


def _parts(answer: str) -> list[str]:
    """The members of a tuple or a list; the answer itself if it is none."""
    if answer[0] + answer[-1] in ("()", "[]") and "," in answer:
        return [answer[0], *answer[1:-1].split(",")]
    return [answer]


def _same_value(first: str, second: str) -> bool:
    if first.strip() == second.strip():
        return True
    one, other = value(first), value(second)
    return one is not None and other is not None and round(one, 2) == round(other, 2)


def value(latex: str) -> float | None:
    """The value of numbers, \\frac, \\sqrt, \\pi, + - * / : ^ and brackets; None for anything else."""
    if len(latex) > LONGEST:
        return None
    for spelling, meant in _MEANT:
        latex = latex.replace(spelling, meant)
    latex = _within_braces(latex).rstrip()
    tokens, position = [], 0
    while position < len(latex):
        found = _TOKEN.match(latex, position)
        if found is None:
            return None
        tokens.append(found[1])
        position = found.end()
    if not tokens:
        return None
    try:
        reader = _Reader(tokens)
        result = float(reader.sum())
        complete = reader.at == len(tokens)
    except (ValueError, ZeroDivisionError, OverflowError, IndexError, RecursionError):
        return None
    return result if complete and math.isfinite(result) else None


def _within_braces(latex: str) -> str:
    """What stands before a brace that closes nothing: behind it the reply goes on."""
    depth = 0
    for position, character in enumerate(latex):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return latex[:position]
    return latex


class _Reader:
    """Recursive descent over tokens; ValueError or IndexError where they form no expression."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0

    def sum(self) -> float:
        result = self.product()
        while self._next() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            result += sign * self.product()
        return result

    def product(self) -> float:
        result = self.power()
        while (token := self._next()) is not None and token not in ("+", "-", ")", "}", "^"):
            if token in ("*", "/"):
                self._take()
                factor = self.power()
                result = result * factor if token == "*" else result / factor
            else:
                result *= self.power()  # 2\pi
        return result

    def power(self) -> float:
        if self._next() in ("+", "-"):
            return -self.power() if self._take() == "-" else self.power()
        base = self.atom()
        if self._next() != "^":
            return base
        self._take()
        exponent = self.power()
        if not isinstance(base, int) or not 0 <= exponent * base.bit_length() <= MOST_BITS:
            base = float(base)
        result = base**exponent
        if isinstance(result, complex):
            raise ValueError("a root of a negative number")
        return result

    def atom(self) -> float:
        token = self._take()
        if token in ("(", "{"):
            result = self.sum()
            if self._take() != {"(": ")", "{": "}"}[token]:
                raise ValueError("a bracket is left open")
            return result
        if token == "\\frac":
            return self._argument() / self._argument()
        if token == "\\sqrt":
            return math.sqrt(self._argument())
        if token == "\\pi":
            return math.pi
        return int(token) if token.isdigit() else float(token)

    def _argument(self) -> float:
        """What a command applies to: a group, or the next digit alone, as in \\frac12."""
        token = self.tokens[self.at]
        if token[0].isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.atom()

    def _next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
