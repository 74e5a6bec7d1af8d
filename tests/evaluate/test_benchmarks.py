"""Each benchmark's questions and scores, from fixtures of our own in its schema."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from gemcut.errors import GemcutError, NotFound
from gemcut.evaluate.benchmarks import BENCHMARKS, Benchmark
from gemcut.evaluate.task import Item, Reply

FIXTURES = Path(__file__).parent / "fixtures"


def benchmark(name: str, folder: Path | None = None) -> Benchmark:
    found = next(each for each in BENCHMARKS if each.name == name)
    return replace(found, folder=folder or FIXTURES / name)


def content(item: Item) -> list[str]:
    """Texts as they are, pictures by their sizes."""
    given = item.messages[0]["content"]
    if isinstance(given, str):
        return [given]

    def shown(part: Mapping[str, Any]) -> str:
        if part["type"] == "text":
            return part["text"]
        return "{}x{}".format(*Image.open(io.BytesIO(part["image"])).size)

    return [shown(part) for part in given]


def points(name: str, *replies: str) -> list[float]:
    task = benchmark(name)
    return [
        task.mark(item, Reply(text=reply)).points for item, reply in zip(task.items(), replies, strict=True)
    ]


def test_mmmu() -> None:
    choice, number, art = benchmark("mmmu").items()
    assert content(choice) == [
        "In which month were most umbrellas sold, by ",
        "360x260",
        "?\n(A) May\n(B) June\n(C) July\n(D) August\n\n"
        "Answer with the option's letter from the given choices directly.",
    ]
    assert content(number) == [
        "380x128",
        " By how much do all pieces of rope cost less than the sail, in dollars? The month's sales: ",
        "360x260",
        "\nAnswer the question using a single word or phrase.",
    ]
    assert content(art)[1::2] == ["360x260", "380x128"]  # pictures among the options
    assert [item.group for item in (choice, number, art)] == ["Marketing", "Accounting", "Art_Theory"]
    assert points("mmmu", "C", "It is $374.", "(B)") == [1, 1, 1]
    assert points("mmmu", "(A)", "373", "A") == [0, 0, 0]


def test_mmmu_draws_where_nothing_can_be_read() -> None:
    task = benchmark("mmmu")
    item = next(iter(task.items()))
    first, second = (task.mark(item, Reply(text=text)) for text in ("", "no idea"))
    assert first.guessed
    assert first == second
    assert first.read in "ABCD"
    assert not task.mark(item, Reply(text="C")).guessed


def test_mmmu_pro() -> None:
    standard, vision = benchmark("mmmu_pro").items()
    assert content(standard)[0] == "360x260"
    assert content(standard)[1].endswith(
        "\nJ. 67\nAnswer the preceding multiple choice question. The last line of your response should be of "
        "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options. Think step "
        "by step before answering."
    )
    assert content(vision)[1].startswith("Write out the multiple-choice question in the image")
    assert [standard.group, vision.group] == ["standard", "vision"]
    assert standard.id != vision.id
    assert points("mmmu_pro", "12 + 7 + 30 + 18\nAnswer: J", "Answer: A") == [1, 0]


def test_mmmu_pro_asked_directly() -> None:
    task = replace(benchmark("mmmu_pro"), form="direct")
    standard, vision = task.items()
    assert content(standard)[1].endswith(
        "\nJ. 67\nAnswer with the option letter from the given choices directly."
    )
    assert content(vision)[1] == (
        "Answer with the option letter from the given choices directly. The last line of your response "
        "should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of "
        "options."
    )
    assert task.choices == {"form": "direct"}
    assert task.mark(standard, Reply(text="J")).points == 1


def test_mmlu_pro() -> None:
    (item,) = benchmark("mmlu_pro").items()
    assert content(item) == [
        "The following are multiple choice questions (with answers) about physics. Think step by step and "
        'then output the answer in the format of "The answer is (X)" at the end.\n\n'
        "Question: A lamp of 60 W burns for two hours. How much energy is that?\n"
        "Options: A. 30 Wh\nB. 60 Wh\nC. 120 Wh\n"
        "Answer: Let's think step by step. 60 W for 2 h are 120 Wh. The answer is (C).\n\n"
        "Question: A stone falls for two seconds from rest. About how fast is it then?\n"
        "Options: A. 5 m/s\nB. 10 m/s\nC. 20 m/s\nD. 40 m/s\n"
        "Answer: Let's think step by step.\n\n"
    ]
    assert points("mmlu_pro", "g t = 20 m/s. The answer is (C).") == [1]
    assert points("mmlu_pro", "The answer is (D).") == [0]


def test_gpqa() -> None:
    task = benchmark("gpqa")
    for item in task.items():
        text = content(item)[0]
        right = item.target["letter"]
        assert f"{right}) {'mercury' if item.group == 'Chemistry' else 'up'}" in text.splitlines()
        assert task.mark(item, Reply(text=f"Answer: {right}")).points == 1
        assert task.mark(item, Reply(text=right)).points == 0  # not in the form that was asked for
    assert list(task.items()) == list(task.items())  # the order of the options stays


def test_gpqa_asks_in_several_orders() -> None:
    """All questions, then all again; the orders are drawn as the authors of the form draw them."""
    task = benchmark("gpqa")
    items = list(task.items())
    assert len(items) == 8
    questions = [item.repeats for item in items]
    assert questions == questions[:2] * 4
    rng = random.Random(0)
    orders = [rng.sample(range(4), 4) for _ in items]
    assert [item.target["letter"] for item in items] == ["ABCD"[order.index(0)] for order in orders]
    assert len({content(item)[0] for item in items}) > 2
    once = list(replace(task, orders=1).items())
    assert once == items[:2]
    assert task.choices == {"orders": 4}


def test_gsm8k() -> None:
    assert points("gsm8k", "12 * 100\nAnswer: 1,200", "Answer: 7 swans") == [1, 1]
    assert points("gsm8k", "1200", "Answer: 5") == [0, 0]


def test_mathvision() -> None:
    choice, free = benchmark("mathvision").items()
    assert content(choice)[0] == "260x200"
    assert content(choice)[1].endswith(
        "How long is the third side? <image1>\n(A) 5\n(B) 6\n(C) 7\n(D) 8\n(E) 9\n"
    )
    assert content(free)[1].endswith("acute angle? <image1>\n")
    assert points("mathvision", r"\boxed{A}", r"\boxed{0.6}") == [1, 1]
    assert points("mathvision", r"\boxed{5}", r"\boxed{\frac{4}{5}}") == [1, 0]  # the option's value counts


def test_docvqa() -> None:
    assert points("docvqa", "The Harbour Office", "$446") == [pytest.approx(1 - 1 / 18), 1.0]
    first, _ = benchmark("docvqa").items()
    assert content(first) == [
        "480x230",
        "To whom is the invoice addressed?\nAnswer the question using a single word or phrase.",
    ]


@pytest.mark.parametrize("name", [each.name for each in BENCHMARKS])
def test_targets_and_ids_go_through_json(name: str) -> None:
    items = list(benchmark(name).items())
    assert len({item.id for item in items}) == len(items) > 0
    for item in items:
        assert json.loads(json.dumps(item.target)) == item.target


def test_parquet_in_the_hubs_layout_gives_the_same_items(tmp_path: Path) -> None:
    text = (FIXTURES / "mmmu" / "validation.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for row in lines:
        for name in [name for name in row if name.startswith("image_")]:
            cell = row[name]
            row[name] = cell and {"bytes": (FIXTURES / "mmmu" / cell["path"]).read_bytes(), "path": "x"}
    for row in lines:  # a folder a subject, as on the hub
        folder = tmp_path / row["id"].split("_")[1]
        folder.mkdir()
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([row]), folder / "validation-00000-of-00001.parquet"
        )
    found = {item.id: item for item in benchmark("mmmu", tmp_path).items()}
    assert found == {item.id: item for item in benchmark("mmmu").items()}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no folder .*gone"):
        list(benchmark("gsm8k", tmp_path / "gone").items())
    with pytest.raises(NotFound, match=r"main/test-\*\.parquet.*test\.jsonl"):
        list(benchmark("gsm8k", tmp_path).items())
    (tmp_path / "test.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(GemcutError, match=r"not as openai/gsm8k has them.*answer"):
        list(benchmark("gsm8k", tmp_path).items())
    (tmp_path / "test.jsonl").write_text("{\n")
    with pytest.raises(GemcutError, match="line 1, is no JSON"):
        list(benchmark("gsm8k", tmp_path).items())
    (tmp_path / "test.jsonl").write_text("[1, 2]\n")
    with pytest.raises(GemcutError, match="line 1, holds no JSON object"):
        list(benchmark("gsm8k", tmp_path).items())
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(GemcutError, match="cannot be read"):
        list(benchmark("gsm8k", tmp_path).items())


def test_a_picture_lies_in_its_folder(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "docvqa" / "invoice.png", tmp_path / "outside.png")
    inner = tmp_path / "inner"
    inner.mkdir()
    row = {"questionId": "1", "question": "?", "answers": ["a"], "image": {"path": "../outside.png"}}
    (inner / "validation.jsonl").write_text(json.dumps(row))
    with pytest.raises(GemcutError, match="outside of its folder"):
        list(benchmark("docvqa", inner).items())
