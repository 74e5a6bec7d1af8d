"""What the engine asks of a runner, and nothing more."""

from __future__ import annotations

from typing import Protocol

from gemcut.data import Step, StepResult


class Runner(Protocol):
    """Runs steps strictly in the order of launch, as if on one stream.

    That order is a promise the scheduler builds on: a page or an encoder entry that the plan of
    step n + 1 gives to somebody else may still be read by step n, which runs before.
    """

    def launch(self, step: Step) -> None:
        """Start the step and return; it may still be running when the next one is launched."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest launched step that was not collected yet."""
        ...
