"""The nouns of an evaluation: what is asked, what came back, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question.

    id: unique in its task, the same in every run. group: the row of the result's table that it counts for.
    messages: as `LLM.chat` takes them. target: what the task scores by, as JSON has it. thinking: whether the
    model may think first. repeats: what several items ask in different words, which makes their scores depend
    on each other; None for an item by itself.
    """

    id: str
    group: str
    messages: tuple[Mapping[str, Any], ...]
    target: Any
    thinking: bool = False
    repeats: str | None = None

    @property
    def draw(self) -> str:
        """What it counts as in a standard error."""
        return self.repeats or self.id

    @property
    def question(self) -> str:
        """The text of the last message, for those who read the answers."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"] for part in content if part["type"] == "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What was answered. complete: False if the answer was cut off at its longest."""

    text: str
    reasoning: str = ""
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a reply is worth. points: 0 to 1. read: the answer that was found in the reply, or drawn where
    none was: `guessed`."""

    points: float
    read: Any
    guessed: bool = False


class Task(Protocol):
    """A set of questions and the rule that scores their answers.

    max_tokens: of an answer, thoughts included.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def choices(self) -> Mapping[str, Any]:
        """What was chosen about the questions, as JSON has it: answers to others are no answers to these."""
        ...

    def items(self) -> Iterable[Item]:
        """All items, in an order that stays."""
        ...

    def mark(self, item: Item, reply: Reply) -> Mark:
        """Score a reply."""
        ...
