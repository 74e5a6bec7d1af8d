"""What a reply answers, and whether that is right: the rules that the authors of each benchmark published.

A rule is followed where it looks odd, too: a score under another rule could not be set beside theirs. On the
replies in the authors' repositories these agree with theirs wherever nothing is drawn: MMMU on 1,750 of two
models, MMMU-Pro on 6,862 of GPT-4o in all its forms.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.2, .2
)


def listed(options: object) -> list[str]:
    """Options of a question, in whichever form a data set keeps them: a list, or a list's text."""
    if isinstance(options, str):
        options = ast.literal_eval(options) if options.strip() else []
    return [str(option) for option in options]  # type: ignore[union-attr]


def guess(choices: Sequence[str], seed: str) -> str:
    """The authors draw an answer where they find none; here the draw is the question's own."""
    return random.Random(seed).choice(choices)


# ---- MMMU


def mmmu_choice(text: str, options: Sequence[str]) -> str | None:
    """The letter that a reply chooses, by MMMU's rule; None where it would be drawn.

    The last one of `(A)`, else of ` A `, else, in replies of more than five words, of the options' texts.
    """
    text = _bare(text)
    choices = LETTERS[: len(options)]
    return (
        _last(choices, text, "({})".format)
        or _last(choices, text, " {} ".format)
        or _by_content(text, options)
    )


def mmmu_pro_choice(text: str, options: Sequence[str]) -> str | None:
    """The letter that a reply chooses, by MMMU-Pro's rule; None where it would be drawn.

    What follows the last `Answer:`, if it holds one of the letters only; else as in MMMU, with `A ` and `A.`
    for ` A `.
    """
    choices = LETTERS[: len(options)]
    _, marker, answer = text.rpartition("Answer:")
    if marker:
        held = [letter for letter in choices if letter in answer]
        if len(held) == 1:
            return held[0]
    text = _bare(text)
    if (bracketed := _last(choices, text, "({})".format)) is not None:
        return bracketed
    for form in ("{} ", "{}."):
        held = [letter for letter in choices if form.format(letter) in text]
        if held:
            # found by one form, the last of them is chosen by another
            return max(held, key=lambda letter: text.rfind(f" {letter} "))
    return _by_content(text, options)


def _bare(text: str) -> str:
    for mark in ",.!?;:'":
        text = text.strip(mark)
    return f" {text} "


def _last(choices: Sequence[str], text: str, spell: Callable[[str], str]) -> str | None:
    """The choice whose spelling comes last in the text, None if none is there."""
    held = [choice for choice in choices if spell(choice) in text]
    return max(held, key=lambda choice: text.rfind(spell(choice)), default=None)


def _by_content(text: str, options: Sequence[str]) -> str | None:
    if len(text.split()) <= 5:
        return None
    contents: Mapping[str, str] = dict(zip(LETTERS, (option.lower() for option in options), strict=False))
    return _last(tuple(contents), text.lower(), contents.__getitem__)


def mmmu_open(text: str) -> list[str | float]:
    """What an open reply may mean, by MMMU's rule: the ends of its key phrases, and numbers in these."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        # the last line may be an equation
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        # an empty tail gives way to any later one
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            phrases.append(shortest)
    phrases = phrases or [text]
    numbers = [found for phrase in phrases for pattern in _NUMBERS for found in pattern.findall(phrase)]
    return list(dict.fromkeys(value for part in (*phrases, *numbers) for value in _normal(part)))


def mmmu_open_right(read: Sequence[str | float], answers: Sequence[str]) -> bool:
    """Whether a number is one of the answers, or a phrase holds one."""
    wanted = [value for answer in answers for value in _normal(answer)]
    return any(
        any(answer in value for answer in wanted if isinstance(answer, str))
        if isinstance(value, str)
        else value in wanted
        for value in read
    )


def _normal(text: str) -> list[str | float]:
    """A number, rounded to two places, or lower case; a single letter never matches within a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# ---- other choices


def mmlu_pro_choice(text: str) -> str | None:
    """The letter of `answer is (A)`, else of `Answer: A`, else the last letter that stands alone."""
    text = text.replace("**", "")
    for pattern in (r"answer is \(?([A-J])\)?", r".*[aA]nswer:\s*([A-J])"):
        if found := re.search(pattern, text):
            return found[1]
    found = re.search(r"\b[A-J]\b(?!.*\b[A-J]\b)", text, re.DOTALL)
    return found[0] if found else None


def gpqa_choice(text: str) -> str | None:
    """The letter of the first `Answer: A`."""
    found = re.search(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?", text)
    return found[1] if found else None


# ---- numbers and texts


def last_number(text: str) -> str | None:
    """The last number behind the last `Answer`, without needless zeros; None without that word."""
    _, marker, answer = text.rpartition("Answer")
    numbers = re.findall(r"\d+\.?\d*", answer.replace(",", "")) if marker else []
    if not numbers:
        return None
    number = numbers[-1].rstrip(".")
    return number.rstrip("0").rstrip(".") if "." in number else number


def anls(text: str, answers: Sequence[str]) -> float:
    """DocVQA's similarity of a reply and the nearest answer, 0 to 1; below one half it counts nothing."""
    read = " ".join(text.strip().lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(answer.strip().lower().split())
        longest = max(len(read), len(wanted))
        best = max(best, 1.0 - edits(read, wanted) / longest if longest else 1.0)
    return best if best >= 0.5 else 0.0


def edits(first: str, second: str) -> int:
    """Insertions, deletions and replacements that turn one text into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
