"""The benchmarks: which rows make a question, how it is put, and by which rule it is scored.

Questions are put as the authors of each benchmark put them. Pictures stand where the text names them, or
before it. (MMMU-Pro's own scripts hand all pictures over behind the text; here they stand in their places.)

Where prompts, rules and names of columns are from:

mmmu        MMMU-Benchmark/MMMU: mmmu/configs/llava1.5.yaml, utils/data_utils.py, utils/eval_utils.py
mmmu_pro    the same: mmmu-pro/prompts.yaml with its two forms, infer/infer_gpt.py, evaluate.py
mmlu_pro    TIGER-AI-Lab/MMLU-Pro: evaluate_from_api.py; compute_accuracy.py, its second level
gpqa        openai/simple-evals: gpqa_eval.py with its four orders, common.py
gsm8k       openai/simple-evals: mgsm_eval.py, English; columns of openai/gsm8k
mathvision  mathllm/MATH-V: models/GPT4V.py, evaluation/; `decoded_image` as lmms-eval's tasks/mathvision
docvqa      lmms-eval: tasks/docvqa
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.errors import GemcutError
from gemcut.evaluate import mathvision, reading
from gemcut.evaluate.data import Data, Row, picture
from gemcut.evaluate.task import Item, Mark, Reply

_MARKER = re.compile(r"<image (\d)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A data set with its form and its rule.

    read: all items of a data set; folder: where it lies, None for the hub. rule: the mark of a reply. forms:
    the ways in which its authors put a question, if there are several; form: the one that is taken. orders:
    how often a question is asked, each time with its options in another order; None where they have one.
    """

    name: str
    data: Data
    read: Callable[[Benchmark], Iterator[Item]]
    rule: Callable[[Item, str], Mark]
    max_tokens: int
    folder: Path | None = None
    forms: tuple[str, ...] = ()
    form: str | None = None
    orders: int | None = None

    @property
    def choices(self) -> Mapping[str, Any]:
        chosen = {"form": self.form, "orders": self.orders}
        return {name: choice for name, choice in chosen.items() if choice is not None}

    def rows(self, part: str) -> Iterator[Row]:
        return self.data.rows(part, self.folder)

    def items(self) -> Iterator[Item]:
        """Raises GemcutError if a row lacks a column."""
        try:
            yield from self.read(self)
        except (KeyError, ValueError, SyntaxError, TypeError) as error:
            raise GemcutError(
                f"A row of {self.name} is not as {self.data.repo} has them: {type(error).__name__}: {error}."
            ) from error

    def mark(self, item: Item, reply: Reply) -> Mark:
        return self.rule(item, reply.text)


# ---- MMMU, MMMU-Pro


def _mmmu(benchmark: Benchmark) -> Iterator[Item]:
    for row in benchmark.rows("validation"):
        question, options = row["question"], reading.listed(row["options"])
        choices = "".join(
            f"({letter}) {option}\n" for letter, option in zip(reading.LETTERS, options, strict=False)
        )
        if row["question_type"] == "multiple-choice":
            text = f"{question}\n{choices}\nAnswer with the option's letter from the given choices directly."
            target: Mapping[str, Any] = {"letter": row["answer"], "options": options}
        else:
            text = f"{question}\nAnswer the question using a single word or phrase."
            target = {"answers": _answers(row["answer"])}
        yield Item(
            id=row["id"],
            group=re.sub(r"^[a-z]+_|_\d+$", "", row["id"]),  # validation_Art_Theory_7
            messages=_asked(_interleaved(text, row)),
            target=target,
        )


def _mark_mmmu(item: Item, text: str) -> Mark:
    if "letter" in item.target:
        return _chosen(item, reading.mmmu_choice(text, item.target["options"]))
    read = reading.mmmu_open(text)
    return Mark(points=float(reading.mmmu_open_right(read, item.target["answers"])), read=read)


_LAST_LINE = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) "
    "where LETTER is one of options."
)
_MMMU_PRO = {  # by form and part
    ("cot", "standard"): "Answer the preceding multiple choice question. "
    f"{_LAST_LINE} Think step by step before answering.",
    ("cot", "vision"): "Write out the multiple-choice question in the image and then solve it. "
    f"{_LAST_LINE} Think step by step before answering.",
    ("direct", "standard"): "Answer with the option letter from the given choices directly.",
    ("direct", "vision"): f"Answer with the option letter from the given choices directly. {_LAST_LINE}",
}


def _mmmu_pro(benchmark: Benchmark) -> Iterator[Item]:
    assert benchmark.form is not None, "it has forms"
    for row in benchmark.rows("standard"):
        options = reading.listed(row["options"])
        lines = [f"{letter}. {option}" for letter, option in zip(reading.LETTERS, options, strict=False)]
        text = "\n".join([row["question"], *lines, _MMMU_PRO[benchmark.form, "standard"]])
        yield _ten_options(row, "standard", _interleaved(text, row), options)
    for row in benchmark.rows("vision"):
        content = _behind_picture(_MMMU_PRO[benchmark.form, "vision"], row, "image")
        yield _ten_options(row, "vision", content, reading.listed(row["options"]))


def _ten_options(row: Row, part: str, content: list[Mapping[str, Any]], options: list[str]) -> Item:
    target = {"letter": row["answer"], "options": options}
    return Item(id=f"{part}-{row['id']}", group=part, messages=_asked(content), target=target)


def _mark_mmmu_pro(item: Item, text: str) -> Mark:
    return _chosen(item, reading.mmmu_pro_choice(text, item.target["options"]))


# ---- MMLU-Pro, GPQA, GSM8K


def _mmlu_pro(benchmark: Benchmark) -> Iterator[Item]:
    solved: dict[str, list[Row]] = {}
    for row in benchmark.rows("validation"):
        solved.setdefault(row["category"], []).append(row)
    for row in benchmark.rows("test"):
        options = _real_options(row)
        text = (
            f"The following are multiple choice questions (with answers) about {row['category']}. Think step "
            'by step and then output the answer in the format of "The answer is (X)" at the end.\n\n'
            + "".join(_mmlu_pro_example(each, each["cot_content"]) for each in solved[row["category"]])
            + _mmlu_pro_example(row, "")
        )
        yield Item(
            id=str(row["question_id"]),
            group=row["category"],
            messages=_asked(text),
            target={"letter": row["answer"], "options": options},
        )


def _mmlu_pro_example(row: Row, thoughts: str) -> str:
    thoughts = thoughts.removeprefix("A: ") or "Let's think step by step."
    lines = "".join(f"{a}. {b}\n" for a, b in zip(reading.LETTERS, _real_options(row), strict=False))
    return f"Question: {row['question']}\nOptions: {lines}Answer: {thoughts}\n\n"


def _real_options(row: Row) -> list[str]:
    return [option for option in reading.listed(row["options"]) if option != "N/A"]


def _mark_mmlu_pro(item: Item, text: str) -> Mark:
    return _chosen(item, reading.mmlu_pro_choice(text))


def _gpqa(benchmark: Benchmark) -> Iterator[Item]:
    """All questions, then all once more with other orders of their options, drawn one after another."""
    assert benchmark.orders is not None, "options are shuffled"
    rng = random.Random(0)
    rows = list(benchmark.rows("diamond"))
    for turn in range(benchmark.orders):
        for number, row in enumerate(rows):
            answers = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
            order = rng.sample(range(4), 4)
            lines = "\n".join(f"{a}) {answers[i]}" for a, i in zip("ABCD", order, strict=True))
            text = (
                "Answer the following multiple choice question. The last line of your response should be of "
                "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think "
                f"step by step before answering.\n\n{row['Question']}\n\n{lines}"
            )
            question = row.get("Record ID") or str(number)
            yield Item(
                id=f"{question}-{turn}",
                group=row.get("High-level domain") or "all",
                messages=_asked(text),
                target={"letter": "ABCD"[order.index(0)]},
                repeats=question,
            )


def _mark_gpqa(item: Item, text: str) -> Mark:
    read = reading.gpqa_choice(text)
    return Mark(points=float(read == item.target["letter"]), read=read)


def _gsm8k(benchmark: Benchmark) -> Iterator[Item]:
    for number, row in enumerate(benchmark.rows("test")):
        text = (
            "Solve this math problem. Give the reasoning steps before giving the final answer on the last "
            'line by itself in the format of "Answer:". Do not add anything other than the integer answer '
            f'after "Answer:".\n\n{row["question"]}'
        )
        right = row["answer"].rpartition("#### ")[2].replace(",", "").strip()
        yield Item(id=str(number), group="test", messages=_asked(text), target={"number": right})


def _mark_gsm8k(item: Item, text: str) -> Mark:
    read = reading.last_number(text)
    return Mark(points=float(read == item.target["number"]), read=read)


# ---- MATH-Vision, DocVQA


def _mathvision(benchmark: Benchmark) -> Iterator[Item]:
    for row in benchmark.rows("test"):
        options = reading.listed(row["options"])
        named = "".join(options) != "ABCDE"  # else the picture shows them
        lines = "".join(
            f"({a}) {b}\n" for a, b in zip(reading.LETTERS, options if named else (), strict=False)
        )
        text = (
            'Please solve the problem and put your answer in one "\\boxed{}". If it is a multiple choice '
            f'question, only one letter is allowed in the "\\boxed{{}}".\n{row["question"]}\n{lines}'
        )
        answer = str(row["answer"])
        also = options[reading.LETTERS.index(answer)] if options else ""
        yield Item(
            id=str(row["id"]),
            group=row["subject"],
            messages=_asked(_behind_picture(text, row, "decoded_image")),
            target={"answers": [answer, also] if also else [answer]},
        )


def _mark_mathvision(item: Item, text: str) -> Mark:
    read = mathvision.read_answer(text)
    right = any(mathvision.equal(answer, read) for answer in item.target["answers"])
    return Mark(points=float(right), read=read)


def _docvqa(benchmark: Benchmark) -> Iterator[Item]:
    for row in benchmark.rows("validation"):
        text = f"{row['question']}\nAnswer the question using a single word or phrase."
        yield Item(
            id=str(row["questionId"]),
            group=(row.get("question_types") or ["all"])[0],
            messages=_asked(_behind_picture(text, row, "image")),
            target={"answers": list(row["answers"])},
        )


def _mark_docvqa(item: Item, text: str) -> Mark:
    return Mark(points=reading.anls(text, item.target["answers"]), read=text.strip())


# ---- parts


def _chosen(item: Item, letter: str | None) -> Mark:
    """The mark of a choice; one that was not to be found is drawn, as the authors do."""
    guessed = letter is None
    if letter is None:
        letter = reading.guess(reading.LETTERS[: len(item.target["options"])], item.id)
    return Mark(points=float(letter == item.target["letter"]), read=letter, guessed=guessed)


def _asked(content: str | list[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return ({"role": "user", "content": content},)


def _answers(answer: str) -> list[str]:
    """An open question's right answer, or several in a list's text."""
    return reading.listed(answer) if answer.startswith("[") else [answer]


def _interleaved(text: str, row: Row) -> list[Mapping[str, Any]]:
    """The text with a picture for each `<image N>`, or all pictures before it if it names none."""
    pictures = {n: found for n in range(1, 8) if (found := picture(row, f"image_{n}")) is not None}
    if not _MARKER.search(text):
        return [*({"type": "image", "image": each} for each in pictures.values()), _text(text)]
    content: list[Mapping[str, Any]] = []
    for i, part in enumerate(_MARKER.split(text)):
        if i % 2:
            content.append({"type": "image", "image": pictures[int(part)]})
        elif part:
            content.append(_text(part))
    return content


def _behind_picture(text: str, row: Row, column: str) -> list[Mapping[str, Any]]:
    found = picture(row, column)
    if found is None:
        raise ValueError(f"{column} is empty")
    return [{"type": "image", "image": found}, _text(text)]


def _text(text: str) -> Mapping[str, Any]:
    return {"type": "text", "text": text}


BENCHMARKS: Sequence[Benchmark] = (
    Benchmark(
        name="mmmu",
        data=Data("MMMU/MMMU", {"validation": "*/validation-*"}),
        read=_mmmu,
        rule=_mark_mmmu,
        max_tokens=1024,
    ),
    Benchmark(
        name="mmmu_pro",
        data=Data("MMMU/MMMU_Pro", {"standard": "standard (10 options)/test-*", "vision": "vision/test-*"}),
        read=_mmmu_pro,
        rule=_mark_mmmu_pro,
        max_tokens=4096,
        forms=("cot", "direct"),
        form="cot",
    ),
    Benchmark(
        name="mmlu_pro",
        data=Data("TIGER-Lab/MMLU-Pro", {"validation": "data/validation-*", "test": "data/test-*"}),
        read=_mmlu_pro,
        rule=_mark_mmlu_pro,
        max_tokens=4096,
    ),
    Benchmark(
        name="gsm8k",
        data=Data("openai/gsm8k", {"test": "main/test-*"}),
        read=_gsm8k,
        rule=_mark_gsm8k,
        max_tokens=1024,
    ),
    Benchmark(
        name="gpqa",
        data=Data("Idavidrein/gpqa", {"diamond": "gpqa_diamond"}),
        read=_gpqa,
        rule=_mark_gpqa,
        max_tokens=8192,
        orders=4,
    ),
    Benchmark(
        name="mathvision",
        data=Data("MathLLMs/MathVision", {"test": "data/test-*"}),
        read=_mathvision,
        rule=_mark_mathvision,
        max_tokens=4096,
    ),
    Benchmark(
        name="docvqa",
        data=Data("lmms-lab/DocVQA", {"validation": "DocVQA/validation-*"}),
        read=_docvqa,
        rule=_mark_docvqa,
        max_tokens=64,
    ),
)
