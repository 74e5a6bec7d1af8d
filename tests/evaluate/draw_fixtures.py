"""Draw the fixtures: a few questions of our own in each benchmark's schema, with charts, tables and pages.

    python tests/evaluate/draw_fixtures.py

Rows lie in fixtures/<benchmark>/<part>.jsonl, pictures beside them. What the pictures show is in the rows.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent / "fixtures"
INK, PAPER, ACCENT = (30, 30, 30), (255, 255, 255), (40, 90, 160)


def font(size: int) -> Any:
    return ImageFont.load_default(size)


def bars(title: str, values: dict[str, int]) -> Image.Image:
    """A bar chart with its values above the bars."""
    picture = Image.new("RGB", (360, 260), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((16, 10), title, INK, font(18))
    most = max(values.values())
    for i, (name, value) in enumerate(values.items()):
        left, top = 30 + 80 * i, 220 - round(150 * value / most)
        draw.rectangle((left, top, left + 48, 220), ACCENT)
        draw.text((left + 8, top - 22), str(value), INK, font(16))
        draw.text((left, 226), name, INK, font(16))
    return picture


def table(header: list[str], rows: list[list[str]]) -> Image.Image:
    picture = Image.new("RGB", (120 * len(header) + 20, 36 * (len(rows) + 1) + 20), PAPER)
    draw = ImageDraw.Draw(picture)
    for y, cells in enumerate([header, *rows]):
        for x, cell in enumerate(cells):
            draw.rectangle((10 + 120 * x, 10 + 36 * y, 130 + 120 * x, 46 + 36 * y), outline=INK)
            draw.text((18 + 120 * x, 17 + 36 * y), cell, INK, font(16))
    return picture


def page(lines: list[str]) -> Image.Image:
    """A page of text, its first line a heading."""
    picture = Image.new("RGB", (480, 60 + 34 * len(lines)), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((24, 20 + 34 * i), line, INK, font(24 if i == 0 else 18))
    return picture


def triangle(a: str, b: str) -> Image.Image:
    """A right triangle with the lengths of its short sides."""
    picture = Image.new("RGB", (260, 200), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.polygon([(40, 160), (220, 160), (40, 40)], outline=INK)
    draw.text((120, 166), a, INK, font(18))
    draw.text((16, 92), b, INK, font(18))
    return picture


def write(benchmark: str, part: str, rows: list[dict[str, Any]], **pictures: Image.Image) -> None:
    folder = FOLDER / benchmark
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.quantize(16).save(folder / f"{name}.png", optimize=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{part}.jsonl").write_text(lines)


def choices(count: int, right: str, at: int) -> list[str]:
    """`count` options, the right one at its place."""
    options = [f"{17 + 3 * i}" for i in range(count)]
    options[at] = right
    return options


def main() -> None:
    sales = bars("Umbrellas sold", {"May": 12, "Jun": 7, "Jul": 30, "Aug": 18})
    costs = table(["item", "pieces", "cost"], [["rope", "4", "$36"], ["sail", "1", "$410"]])
    shown = dict.fromkeys(f"image_{n}" for n in range(3, 8))
    common = {"explanation": "", "img_type": "['Plots and Charts']", "topic_difficulty": "Easy"}
    write(
        "mmmu",
        "validation",
        [
            {
                "id": "validation_Marketing_1",
                "question": "In which month were most umbrellas sold, by <image 1>?",
                "options": "['May', 'June', 'July', 'August']",
                "image_1": {"path": "sales.png"},
                "image_2": None,
                "answer": "C",
                "question_type": "multiple-choice",
                "subfield": "Market Research",
                **shown,
                **common,
            },
            {
                "id": "validation_Accounting_1",
                "question": "<image 2> By how much do all pieces of rope cost less than the sail, in "
                "dollars? The month's sales: <image 1>",
                "options": "[]",
                "image_1": {"path": "sales.png"},
                "image_2": {"path": "costs.png"},
                "answer": "['374', '$374']",
                "question_type": "open",
                "subfield": "Financial Accounting",
                **shown,
                **common,
            },
            {
                "id": "validation_Art_Theory_1",
                "question": "Which of these is a table?",
                "options": "['<image 1>', '<image 2>']",
                "image_1": {"path": "sales.png"},
                "image_2": {"path": "costs.png"},
                "answer": "B",
                "question_type": "multiple-choice",
                "subfield": "Theory",
                **shown,
                **common,
            },
        ],
        sales=sales,
        costs=costs,
    )
    ten = choices(10, "67", 9)
    asked = page(
        ["How many umbrellas in all?", *(f"{a}. {b}" for a, b in zip("ABCDEFGHIJ", ten, strict=True))]
    )
    write(
        "mmmu_pro",
        "standard",
        [
            {
                "id": "test_Marketing_1",
                "question": "<image 1> How many umbrellas were sold in all?",
                "options": str(ten),
                "image_1": {"path": "sales.png"},
                **{f"image_{n}": None for n in range(2, 8)},
                "answer": "J",
                "subject": "Marketing",
            }
        ],
        sales=sales,
    )
    write(
        "mmmu_pro",
        "vision",
        [
            {
                "id": "test_Marketing_1",
                "image": {"path": "asked.png"},
                "options": str(ten),
                "answer": "J",
                "subject": "Marketing",
            }
        ],
        asked=asked,
    )
    mmlu = {"answer_index": 2, "src": "ours", "category": "physics"}
    write(
        "mmlu_pro",
        "validation",
        [
            {
                "question_id": 70,
                "question": "A lamp of 60 W burns for two hours. How much energy is that?",
                "options": ["30 Wh", "60 Wh", "120 Wh", "N/A"],
                "answer": "C",
                "cot_content": "A: Let's think step by step. 60 W for 2 h are 120 Wh. The answer is (C).",
                **mmlu,
            }
        ],
    )
    write(
        "mmlu_pro",
        "test",
        [
            {
                "question_id": 71,
                "question": "A stone falls for two seconds from rest. About how fast is it then?",
                "options": ["5 m/s", "10 m/s", "20 m/s", "40 m/s", "N/A", "N/A"],
                "answer": "C",
                "cot_content": "",
                **mmlu,
            }
        ],
    )
    write(
        "gsm8k",
        "test",
        [
            {
                "question": "Ada folds 12 boats an hour. How many does she fold in 100 hours?",
                "answer": "She folds 12*100 = <<12*100=1200>>1200.\n#### 1,200",
            },
            {
                "question": "Of 9 swans 4 fly away and 2 come back. How many are there?",
                "answer": "9-4 = <<9-4=5>>5, 5+2 = <<5+2=7>>7.\n#### 7",
            },
        ],
    )
    corner = triangle("4", "3")
    write(
        "mathvision",
        "test",
        [
            {
                "id": "1",
                "question": "How long is the third side? <image1>",
                "options": ["5", "6", "7", "8", "9"],
                "image": "corner.png",
                "decoded_image": {"path": "corner.png"},
                "answer": "A",
                "solution": None,
                "level": 1,
                "subject": "metric geometry - length",
            },
            {
                "id": "2",
                "question": "What is the sine of the smaller acute angle? <image1>",
                "options": [],
                "image": "corner.png",
                "decoded_image": {"path": "corner.png"},
                "answer": "\\frac{3}{5}",
                "solution": None,
                "level": 2,
                "subject": "metric geometry - angle",
            },
        ],
        corner=corner,
    )
    write(
        "docvqa",
        "validation",
        [
            {
                "questionId": "1",
                "question": "To whom is the invoice addressed?",
                "question_types": ["form"],
                "image": {"path": "invoice.png"},
                "docId": 1,
                "answers": ["Harbor Office", "The Harbor Office"],
                "data_split": "val",
            },
            {
                "questionId": "2",
                "question": "What is the total?",
                "question_types": ["form"],
                "image": {"path": "invoice.png"},
                "docId": 1,
                "answers": ["$446"],
                "data_split": "val",
            },
        ],
        invoice=page(["Invoice 2031", "To: Harbor Office", "4 ropes  $36", "1 sail  $410", "Total  $446"]),
    )
    gpqa = FOLDER / "gpqa"
    gpqa.mkdir(exist_ok=True)
    with (gpqa / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        wrong = [f"Incorrect Answer {i}" for i in (1, 2, 3)]
        writer.writerow(["Record ID", "Question", "Correct Answer", *wrong, "High-level domain"])
        writer.writerow(
            ["rec1", "Which metal melts at\n-39 C?", "mercury", "lead", "tin", "zinc", "Chemistry"]
        )
        writer.writerow(["rec2", "Which quark has charge 2/3?", "up", "down", "strange", "bottom", "Physics"])


if __name__ == "__main__":
    main()
