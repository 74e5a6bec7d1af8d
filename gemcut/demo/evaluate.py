"""Measure the demo: greedy answers about held-out pictures, exact or wrong, per kind.

    python -m gemcut.demo.evaluate --pictures 2000 --out accuracy.json

The pictures are drawn with PIL in their own sizes, with fonts, words, numbers and combinations that the
training never saw. This command asks transformers; `gemcut eval demo` puts the same questions, in the same
prompts, to gemcut or a server.
"""

import argparse
import collections
import concurrent.futures
import importlib.metadata
import io
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gemcut.data import Control, Text
from gemcut.demo import CHECKPOINT, fonts, render_pil
from gemcut.demo.questions import QA, ask_shapes, ask_sign, ask_text, ask_two, describe_all
from gemcut.demo.scenes import Canvas, Scene, SignScene, sample_shapes, sample_sign, sample_size
from gemcut.prompt.template import render
from gemcut.prompt.variant import carries_empty_thought, read_chat_template

SEED, LOT = 20261124, 1000  # of the first pictures that are measured; pictures that come from one seed
SMALLEST = 34.0  # least font size of a sign in px, as the model sees it: letters about 22 px wide


@dataclass(frozen=True)
class Item:
    """One question about zero, one or two pictures.

    ``order`` is the index of the picture that the question comes before: 0 in front of all, len(pictures)
    after all. ``history`` holds earlier turns (question, answer); the pictures belong to the first turn.
    ``thinking`` asks for thoughts, whose right text is ``thought``.
    """

    qa: QA
    pictures: tuple[Image.Image, ...]
    order: int
    history: tuple[tuple[str, str], ...] = ()
    thinking: bool = False
    thought: str = ""
    sizes: tuple[tuple[int, int], ...] = ()  # height, width
    layout: str = ""

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """The conversation: earlier turns with their right answers, the pictures in the first."""
        pictures = [{"type": "image", "image": picture} for picture in self.pictures]
        questions = [question for question, _ in self.history] + [self.qa.question]
        first = [*pictures[: self.order], {"type": "text", "text": questions[0]}, *pictures[self.order :]]
        turns: list[Mapping[str, Any]] = [{"role": "user", "content": first}]
        for (_, answer), question in zip(self.history, questions[1:], strict=True):
            turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return tuple(turns)

    @property
    def expected(self) -> str:
        """The whole right text of the model's turn."""
        thought = f"<|channel>thought\n{self.thought}\n<channel|>" if self.thinking else ""
        return thought + self.qa.answer


Answer = Callable[[Item], str]


def _picture(rng: random.Random, scene: Scene, size: tuple[int, int]) -> Image.Image:
    picture = render_pil.draw(scene, *size, seed=rng.getrandbits(32))
    if rng.random() < 0.25:
        packed = io.BytesIO()
        picture.save(packed, "JPEG", quality=rng.randint(75, 95))
        picture = Image.open(packed).convert("RGB")
    return picture


def held_out_items(
    seed: int, pictures: int, font_folder: str | None = None, *, signs: bool = True
) -> Iterator[Item]:
    """Items about so many held-out pictures, one to three a picture; deterministic by seed.

    Half of the pictures are signs, every tenth pair of a text question and a pair of pictures joins them. A
    third of the items are later turns of a chat, one in twenty is asked with thinking on. Without ``signs``
    no fonts are needed, and the items are others. Raises FileNotFoundError if fonts are missing.
    """
    rng = random.Random(seed)
    faces = fonts.faces(True, font_folder) if signs else ()
    drawn = 0
    while drawn < pictures:
        sort = rng.choices(["sign", "shapes", "pair", "text"], [42 if signs else 0, 32, 16, 10])[0]
        if sort == "text":
            yield Item(ask_text(rng, unseen=True), (), 0)
            continue
        sizes = tuple(sample_size(rng) for _ in range(2 if sort == "pair" else 1))
        canvases = [Canvas.of(*size) for size in sizes]
        scenes: Sequence[Scene]
        if sort == "sign":
            sign = sample_sign(rng, canvases[0], faces, SMALLEST, unseen=True)
            scenes, asked = [sign], ask_sign(rng, sign)
            asked = [asked[0], *rng.sample(asked[1:], 1)]
        elif sort == "shapes":
            shapes = sample_shapes(rng, canvases[0], unseen=True)
            scenes, asked = [shapes], ask_shapes(rng, shapes)
            asked = rng.sample(asked, min(3, len(asked)))
        else:
            most = rng.choice([1, 1, 3, 5, 8])
            first, second = (sample_shapes(rng, canvas, most, unseen=True) for canvas in canvases)
            scenes, asked = [first, second], ask_two(rng, first, second)
            asked = rng.sample(asked, min(2, len(asked)))
        images = tuple(_picture(rng, scene, size) for scene, size in zip(scenes, sizes, strict=True))
        drawn += len(images)
        layout = "+".join(canvas.layout for canvas in canvases)
        sayable = not any(isinstance(scene, SignScene) and scene.plate is None for scene in scenes)
        history: tuple[tuple[str, str], ...] = ()
        for qa in asked:
            order = rng.randrange(len(images) + 1)
            thinking = sayable and rng.random() < 0.05
            thought = describe_all(scenes) if thinking else ""
            yield Item(qa, images, order, history, thinking, thought, sizes, layout)
            history = (*history, (qa.question, qa.answer)) if rng.random() < 0.5 else ()


def chat_text(item: Item, soft_tokens: Sequence[int], *, empty_thought: bool) -> str:
    """The item's prompt by gemcut's template, as one string with its soft tokens written out."""
    pieces = []
    for segment in render(item.messages, enable_thinking=item.thinking, empty_thought=empty_thought):
        if isinstance(segment, Text):
            pieces.append(segment.text)
        elif isinstance(segment, Control):
            pieces.append(segment.token)
        else:
            pieces.append(f"<|image>{'<|image|>' * soft_tokens[segment.index]}<image|>")
    return "".join(pieces)


@dataclass
class Outcome:
    """What was asked, expected and answered."""

    kind: str
    question: str
    expected: str
    got: str
    right: bool
    seconds: float
    order: str
    turn: int
    sizes: list[list[int]]
    layout: str


def evaluate(
    answer: Answer, items: Iterable[Item], report: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Ask every item; ``answer`` returns the whole greedy text of the model's turn, thoughts and all, without
    its end.
    """
    outcomes = []
    for item in items:
        began = time.perf_counter()
        got = answer(item)
        kind = "thought" if item.thinking else item.qa.kind
        order = "none"
        if item.pictures:
            order = {0: "before", len(item.pictures): "after"}.get(item.order, "between")
        outcome = Outcome(
            kind=kind,
            question=item.qa.question,
            expected=item.expected,
            got=got,
            right=got == item.expected,
            seconds=time.perf_counter() - began,
            order=order,
            turn=len(item.history) + 1,
            sizes=[list(size) for size in item.sizes],
            layout=item.layout,
        )
        outcomes.append(outcome)
        if report:
            report(outcome)
    return outcomes


def table(
    outcomes: list[Outcome], key: Callable[[Outcome], str] = lambda outcome: outcome.kind
) -> dict[str, list[int]]:
    """Right and asked, by kind or another key, and in all."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for outcome in outcomes:
        for name in (key(outcome), "all"):
            counts[name][0] += outcome.right
            counts[name][1] += 1
    return {name: counts[name] for name in sorted(counts, key=lambda name: (name == "all", name))}


class TransformersEngine:
    """Greedy answers of transformers' Gemma 4 on the CPU; keeps the smallest margin of an answer's tokens.

    One pass over prompt and right answer shows whether greedy decoding gives that answer: every one of its
    tokens has the largest logit. Only where it does not, or with ``always_generate``, an answer is generated.
    """

    def __init__(self, folder: Path, dtype: str, always_generate: bool = False) -> None:
        import torch
        import transformers
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        self.torch, self.always_generate = torch, always_generate
        self.empty_thought = carries_empty_thought(read_chat_template(folder), has_per_layer_embeddings=False)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.processor = Gemma4ImageProcessorPil.from_pretrained(folder)
        self.model: Any = transformers.Gemma4ForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.model.eval()
        self.margin = 0.0

    def _tensors(self, ids: list[int], features: list[Any]) -> dict[str, Any]:
        torch, image_id = self.torch, self.model.config.image_token_id
        rows = torch.tensor([ids])
        tensors = {
            "input_ids": rows,
            "attention_mask": torch.ones_like(rows),
            "mm_token_type_ids": (rows == image_id).long(),
        }
        if features:
            pixels = torch.cat([part["pixel_values"] for part in features])
            tensors["pixel_values"] = pixels.to(self.model.dtype)
            tensors["image_position_ids"] = torch.cat([part["image_position_ids"] for part in features])
        return tensors

    def _keep_margin(self, logits: Any) -> None:
        best = logits.float().topk(2).values
        self.margin = float((best[:, 0] - best[:, 1]).min())

    def __call__(self, item: Item) -> str:
        torch = self.torch
        features = [self.processor([picture], return_tensors="pt") for picture in item.pictures]
        soft = [int(part["num_soft_tokens_per_image"][0]) for part in features]
        text = chat_text(item, soft, empty_thought=self.empty_thought)
        prompt, answer = (
            self.tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (text, item.expected + "<turn|>")
        )
        with torch.no_grad():
            if not self.always_generate:
                logits = self.model(**self._tensors(prompt + answer, features)).logits[
                    0, len(prompt) - 1 : -1
                ]
                if logits.argmax(-1).tolist() == answer:
                    self._keep_margin(logits)
                    return item.expected
            result = self.model.generate(
                **self._tensors(prompt, features), do_sample=False, max_new_tokens=160, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        self._keep_margin(torch.stack(result.logits)[:, 0])
        given = self.tokenizer.decode(result.sequences[0, len(prompt) :], skip_special_tokens=False)
        return given.removesuffix("<turn|>")


@dataclass
class Measured:
    """One item's outcome under the first dtype, and what every dtype answered."""

    outcome: Outcome
    answers: list[str]
    margin: float


def measure(
    checkpoint: Path, dtypes: list[str], generate: bool, seed: int, pictures: int, font_folder: str | None
) -> list[Measured]:
    """Evaluate transformers on pictures in several dtypes; prints wrong and differing answers."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    engines = [TransformersEngine(checkpoint, dtype, generate) for dtype in dtypes]
    answers: list[list[str]] = []
    measured: list[Measured] = []

    def ask_all(item: Item) -> str:
        answers.append([engine(item) for engine in engines])
        return answers[-1][0]

    def keep(outcome: Outcome) -> None:
        measured.append(Measured(outcome, answers[-1], round(engines[0].margin, 3)))
        if not outcome.right or len(set(answers[-1])) > 1:
            print(json.dumps(asdict(measured[-1])), flush=True)

    evaluate(ask_all, held_out_items(seed, pictures, font_folder), keep)
    return measured


def record(measured: list[Measured], dtypes: list[str]) -> dict[str, Any]:
    """The numbers of an evaluation."""
    outcomes = [one.outcome for one in measured]
    margins = sorted(one.margin for one in measured if one.outcome.right)
    return {
        "questions": len(measured),
        "dtypes": dtypes,
        "right_and_asked": table(outcomes),
        "right_and_asked_by_order": table(outcomes, lambda outcome: outcome.order),
        "right_and_asked_by_turn": table(outcomes, lambda outcome: str(outcome.turn)),
        "right_and_asked_by_layout": table(outcomes, lambda outcome: outcome.layout or "text"),
        "right_by_dtype": {
            dtype: sum(one.answers[index] == one.outcome.expected for one in measured)
            for index, dtype in enumerate(dtypes)
        },
        "differing_from_the_first_dtype": {
            dtype: sum(one.answers[index] != one.answers[0] for one in measured)
            for index, dtype in enumerate(dtypes)
            if index
        },
        "margin_percentiles_of_right_answers": {
            str(share): margins[min(len(margins) - 1, int(share / 100 * len(margins)))]
            for share in (0, 0.1, 1, 5, 50)
        },
        "wrong_or_differing": [
            asdict(one) for one in measured if not one.outcome.right or len(set(one.answers)) > 1
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--engine", choices=["transformers"], default="transformers")
    parser.add_argument(
        "--dtypes", default="float32,bfloat16", help="the first is what the others are compared to"
    )
    parser.add_argument("--generate", action="store_true", help="decode every answer token by token")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument(
        "--seed", type=int, default=SEED, help=f"of the first {LOT:,} pictures, the next ones count on"
    )
    parser.add_argument("--processes", type=int, default=1, help="that work at a time")
    parser.add_argument("--fonts", default=None, help="a folder of fonts instead of the installed packages")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    dtypes = arguments.dtypes.split(",")
    with concurrent.futures.ProcessPoolExecutor(
        arguments.processes, multiprocessing.get_context("spawn")
    ) as pool:
        parts = [
            pool.submit(
                measure,
                arguments.checkpoint,
                dtypes,
                arguments.generate,
                seed,
                min(LOT, arguments.pictures - drawn),
                arguments.fonts,
            )
            for seed, drawn in enumerate(range(0, arguments.pictures, LOT), start=arguments.seed)
        ]
        measured = [one for part in parts for one in part.result()]
    result = {
        "command": f"python -m gemcut.demo.evaluate --pictures {arguments.pictures} --seed {arguments.seed}"
        f"{' --generate' if arguments.generate else ''}",
        "engine": arguments.engine,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pillow")},
        "pictures": arguments.pictures,
        **record(measured, dtypes),
    }
    print(
        json.dumps({name: value for name, value in result.items() if name != "wrong_or_differing"}, indent=1)
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
