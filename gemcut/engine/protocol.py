"""What the engine asks of a runner, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from gemcut.data import ForwardCounts, Step, StepResult


class Runner(Protocol):
    """Runs steps strictly in the order of launch, as if on one stream.

    That order is a promise the scheduler builds on: a page or an encoder entry that the plan of
    step n + 1 gives to somebody else may still be read by step n, which runs before.
    """

    @property
    def counts(self) -> ForwardCounts: ...

    def launch(self, step: Step, masks: Mapping[int, np.ndarray] | None = None) -> None:
        """Start the step and return; it may still be running when the next one is launched.

        masks: slot -> the ids that its grammar admits next, an int32 bitmask over the vocabulary, low bit
        first; for rows that sample.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest launched step that was not collected yet."""
        ...
