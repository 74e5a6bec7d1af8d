"""What is read out of replies, against cases worked by hand from the authors' rules."""

from __future__ import annotations

import pytest

from gemcut.evaluate import mathvision
from gemcut.evaluate.reading import (
    anls,
    edits,
    gpqa_choice,
    guess,
    last_number,
    listed,
    mmlu_pro_choice,
    mmmu_choice,
    mmmu_open,
    mmmu_open_right,
    mmmu_pro_choice,
)

OPTIONS = ["red wine", "water", "tea", "milk"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("(A) is wrong, so it must be (C).", "C"),  # the last in brackets
        ("Not A but D", "D"),  # the last that stands alone
        ("(A) or rather D", "A"),  # brackets come before bare letters
        ("A) water", None),  # neither form, and too short for contents
        ("It is water, as anyone can see", "B"),  # contents, in more than five words
        ("First tea and then water I would say", "B"),  # the last content
        ("water", None),  # too short for contents
        ("the Answer: none", None),
        ("", None),
    ],
)
def test_mmmu_choices(text: str, letter: str | None) -> None:
    assert mmmu_choice(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(A) is wrong.\nAnswer: C", "C"),  # the last line rules
        ("Answer: B\nNo. Answer: D", "D"),
        ("Answer: $C$", "C"),
        ("Answer: A or B (B)", "B"),  # two letters: the other rules take over
        ("B. water", "B"),
        ("B water", "B"),
        ("It is water, as anyone can see", "B"),
        ("who knows", None),
    ],
)
def test_mmmu_pro_choices(text: str, letter: str | None) -> None:
    assert mmmu_pro_choice(text, OPTIONS) == letter


def test_mmmu_open_replies() -> None:
    # a number with commas, and what looks like one within it
    assert mmmu_open("The answer is 1,234.") == [1234.0, 234.0]
    read = mmmu_open("The mass is 3 kg\nThus the force = 29.43 N")
    assert {"3 kg", "29.43 n", 3.0, 29.43} == set(read)
    # `=` counts in the last line only
    assert "5" not in mmmu_open("x = 5\nso nothing")
    assert mmmu_open("Paris") == ["paris"]
    # of several keys the shortest tail
    assert "b" not in mmmu_open("so it could be the answer 7")
    assert mmmu_open("so it could be the answer 7")[0] == 7.0
    assert mmmu_open("X") == [" x", "x "]


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("374", ["374", "$374"], True),
        ("$374", ["374"], True),  # the number within
        ("It is 374.00 dollars", ["374"], True),
        ("3740", ["374"], False),
        ("0.333", ["0.33"], True),  # two places
        ("the harbor office", ["Harbor"], True),  # the answer within the phrase
        ("harbor", ["Harbor office"], False),
        ("1.2e3", ["1200"], True),
        ("x", ["x"], True),
        ("xylophone", ["x"], False),  # a letter does not match within a word
    ],
)
def test_mmmu_open_answers(text: str, answers: list[str], right: bool) -> None:
    assert mmmu_open_right(mmmu_open(text), answers) == right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("So the answer is (C).", "C"),
        ("The answer is **J**.", "J"),
        ("the answer is A, no, the answer is B", "A"),  # the first of this form
        ("Answer: D", "D"),
        ("I think A or maybe E", "E"),  # the last letter that stands alone
        ("nothing", None),
    ],
)
def test_mmlu_pro_choices(text: str, letter: str | None) -> None:
    assert mmlu_pro_choice(text) == letter


def test_gpqa_choices() -> None:
    assert gpqa_choice("Thinking.\nAnswer: B") == "B"
    assert gpqa_choice("answer: $D$") == "D"
    assert gpqa_choice("B") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4\nAnswer: 7", "7"),
        ("Answer: $1,200.00", "1200"),
        ("Answer: 12. And Answer: 13.", "13"),
        ("7", None),
        ("Answer: none", None),
        ("Answer: 2.50", "2.5"),
        ("Answer: 100", "100"),
    ],
)
def test_last_numbers(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_anls() -> None:
    assert anls("  harbor  Office", ["Harbor Office"]) == 1.0
    assert anls("harbour office", ["Harbor Office"]) == pytest.approx(1 - 1 / 14)
    assert anls("harbor", ["Harbor Office"]) == 0.0  # 6 of 13 alike: below one half
    assert anls("$464", ["x", "$446"]) == 0.5  # two replacements of four
    assert anls("", ["a"]) == 0.0
    assert edits("kitten", "sitting") == 3
    assert edits("", "abc") == 3


def test_options_come_as_lists_or_as_their_text() -> None:
    assert listed("['a', 'b']") == listed(["a", "b"]) == ["a", "b"]
    assert listed("[]") == listed("") == []


def test_a_guess_is_the_items_own() -> None:
    assert guess("ABCD", "item 1") == guess("ABCD", "item 1")
    assert len({guess("ABCD", f"item {i}") for i in range(50)}) == 4


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Thus \boxed{\frac{3}{5}}.", r"\frac{3}{5}"),
        (r"First \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{(B)}", "b"),
        ("So we choose (C).", "c"),
        ("The answer is 42.", "42"),
        ("The correct answer is 7 cm. It follows", "7cm"),
        ("B\nbecause", "b"),
    ],
)
def test_math_vision_answers(text: str, answer: str) -> None:
    assert mathvision.read_answer(text) == answer


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("A", "a", True),
        (r"\frac{3}{5}", "0.6", True),
        (r"\frac12", "0.5", True),
        (r"2\sqrt{3}", "3.4641", True),
        (r"2\pi", "6.28", True),
        ("3^2", "9", True),
        ("-(1-3)", "2", True),
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(1,3)", False),
        ("0.33", "0.34", False),
        ("", "", False),
        ("x+1", "x+2", False),
        ("1/0", "0", False),
        ("9^9^9^9", "1", False),
        ("3: 16", "$3: 16$", True),  # a ratio is a quotient, an option is in dollars
        ("1:4", r"$\frac{1}{4}$", True),
        (r"8+4\sqrt{3}", r"$8+4 \sqrt{3}$", True),
        (r"$\displaystyle \frac{3}{4}$", "0.75", True),
        (r"\frac{7}{32}}.theansweris:\frac{7}{32", "0.22", True),  # a reply that goes on behind its box
        (r"\frac{3^{1008}-1}{3^{1009}}", "1/3", True),
        ("10^400", "10^401", False),  # beyond any float
        ("2^-1", "0.5", True),
        (r"4\pi(3-2\sqrt{2})", "2.16", True),
        ("__import__('os')", "1", False),
        ("((((", "1", False),
    ],
)
def test_math_vision_equality(first: str, second: str, same: bool) -> None:
    assert mathvision.equal(first, second) == same
    assert mathvision.equal(second, first) == same
