"""The task `demo`: held-out pictures of shapes and signs, drawn from a seed; an answer is exact or wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemcut.demo import evaluate, fonts
from gemcut.errors import NotFound
from gemcut.evaluate.task import Item, Mark, Reply

SEED = 20261124  # of the first pictures that bench/records/demo-accuracy.json counts
WITHOUT_END = 1 << 40  # pictures


@dataclass(frozen=True, slots=True)
class Demo:
    """font_folder: where the fonts of the signs are, by default in the packages of gemcut[demo].
    signs: without them, only shapes are drawn and no fonts are needed.
    """

    seed: int = SEED
    font_folder: str | None = None
    signs: bool = True
    name: str = "demo"
    max_tokens: int = 160

    def items(self) -> Iterator[Item]:
        """Items without end. Raises NotFound if there are no fonts to draw signs with."""
        drawn = evaluate.held_out_items(self.seed, WITHOUT_END, self.font_folder, signs=self.signs)
        try:
            for number, item in enumerate(drawn):
                yield Item(
                    id=f"{self.seed}-{'' if self.signs else 'shapes-'}{number}",
                    group="thought" if item.thinking else item.qa.kind,
                    messages=messages(item),
                    target={"text": item.qa.answer, "reasoning": item.thought},
                    thinking=item.thinking,
                )
        except FileNotFoundError as error:
            raise NotFound(
                f"The demo's signs are drawn with fonts of {' and '.join(fonts.HELD_OUT)}, which are not "
                "here: pip install gemcut[demo], name a folder with --fonts, or leave signs out with "
                "--no-signs."
            ) from error

    def mark(self, item: Item, reply: Reply) -> Mark:
        right = reply.text == item.target["text"] and reply.reasoning == item.target["reasoning"]
        return Mark(points=float(right), read=reply.text)


def messages(item: evaluate.Item) -> tuple[Mapping[str, Any], ...]:
    """The conversation of an item: earlier turns with their right answers, the pictures in the first."""
    pictures = [{"type": "image", "image": picture} for picture in item.pictures]
    questions = [question for question, _ in item.history] + [item.qa.question]
    first = [*pictures[: item.order], {"type": "text", "text": questions[0]}, *pictures[item.order :]]
    turns: list[Mapping[str, Any]] = [{"role": "user", "content": first}]
    for (_, answer), question in zip(item.history, questions[1:], strict=True):
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return tuple(turns)
