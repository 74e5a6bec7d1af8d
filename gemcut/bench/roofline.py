"""The least time that each measured thing takes on a device: the work of `gemcut.plan` at measured ceilings.

Parts of a forward run one after another, each at the slower of its two ceilings. No launch, no gap and no
host: the share of this floor that a measurement reaches is the share of the roofline.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcut.bench.timing import Ceilings
from gemcut.plan import ModelPlan, Work, batch_work, forward_work, tower_work


@dataclass(frozen=True, slots=True)
class Roofline:
    """Floors of one model on one device. width: bytes of a weight, an activation and a KV value."""

    plan: ModelPlan
    ceilings: Ceilings
    width: int

    def prefill_ms(self, tokens: int) -> float:
        """One prompt, nothing cached, the logits of its last token."""
        return self._ms(forward_work(self.plan, 1, tokens, 0, width=self.width))

    def decode_ms(self, batch: int, cached: int, experts: float | None = None) -> float:
        """One token for each of `batch` sequences. experts: touched in a layer, if they were counted."""
        return self._ms(forward_work(self.plan, batch, 1, cached, experts=experts, width=self.width))

    def tower_ms(self, pictures: int, patches: int) -> float:
        """Soft tokens of so many pictures."""
        return self._ms(tower_work(self.plan, pictures, patches, width=self.width))

    def batch_s(self, requests: int, prompt: int, answer: int, at_once: int, chunk: int) -> float:
        """All answers of an offline batch, in seconds."""
        steps = batch_work(self.plan, requests, prompt, answer, at_once, chunk, width=self.width)
        return sum(times * self._ms(work) for times, work in steps) / 1e3

    def _ms(self, work: Work) -> float:
        return work.floor_s(self.ceilings.copy_bytes, self.ceilings.matrix_flops) * 1e3
