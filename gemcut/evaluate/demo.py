"""The task `demo`: held-out pictures of shapes and signs, drawn from a seed; an answer is exact or wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from gemcut.demo import evaluate, fonts
from gemcut.errors import NotFound
from gemcut.evaluate.task import Item, Mark, Reply

ITEMS = 500  # that are asked unless told otherwise


@dataclass(frozen=True, slots=True)
class Demo:
    """font_folder: where the fonts of the signs are, by default in the packages of gemcut[demo].
    signs: without them, only shapes are drawn and no fonts are needed.
    """

    seed: int = evaluate.SEED
    font_folder: str | None = None
    signs: bool = True
    name: str = "demo"
    max_tokens: int = 160

    @property
    def choices(self) -> Mapping[str, Any]:
        """None: an item's id says of which seed it is."""
        return {}

    def items(self) -> Iterator[Item]:
        """Items without end: those of `gemcut.demo.evaluate`, lot after lot. Raises NotFound if there are no
        fonts to draw signs with."""
        try:
            for seed in count(self.seed):
                drawn = evaluate.held_out_items(seed, evaluate.LOT, self.font_folder, signs=self.signs)
                for number, item in enumerate(drawn):
                    yield Item(
                        id=f"{seed}-{'' if self.signs else 'shapes-'}{number}",
                        group="thought" if item.thinking else item.qa.kind,
                        messages=item.messages,
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
