"""How many distinct experts the steps of a decode touched: the bytes that a step has to read depend on it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gemcut.bench.contender import Contender, Gemcut, release
from gemcut.data import Prompt
from gemcut.engine.model_files import ChatPrompt
from gemcut.kernels import Routing
from gemcut.models.gemma4 import text
from gemcut.plan import kv_bytes_per_token

STEPS = 16  # of a decode that are counted


class ExpertCounter:
    """Reads answers again as prompts and looks where their tokens were sent.

    What is timed is a graph that nothing can look into. So this is an engine of its own, on the same weights
    and without graphs, that reads one sequence at a time. None is started for a model without experts.
    """

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self._owner = next((c for c in contenders if isinstance(c, Gemcut) and _has_experts(c)), None)
        self._readers: list[Gemcut] = []

    def distinct(self, prompts: Sequence[ChatPrompt], answers: Sequence[Sequence[int]]) -> float | None:
        """Mean over layers and steps of the experts that the batch touched; None for a dense model, or if
        no contender is one of ours."""
        if self._owner is None:
            return None
        steps = min(STEPS, len(answers[0]) - 1)
        chosen = [
            self._read((*prompt.prompt.token_ids, *answer[:steps]), steps)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        together = torch.stack(chosen, dim=2).flatten(2)  # [layers, steps, batch * K]
        return statistics.mean(len(ids.unique()) for layer in together for ids in layer)

    def close(self) -> None:
        release(self._readers)

    def _read(self, ids: tuple[int, ...], last: int) -> torch.Tensor:
        """Experts of the last tokens of a sequence, [layers, last, K]."""
        assert self._owner is not None, "there is a model with experts"
        if not self._readers:
            self._readers.append(self._start(self._owner, len(ids)))
        reader = self._readers[0]
        with _routings() as calls:
            reader.generate([ChatPrompt(Prompt(ids), (), False)], 1)
        layers = len(reader.plan.text.layers)
        return torch.stack([torch.cat(calls[i::layers])[-last:] for i in range(layers)])

    @staticmethod
    def _start(owner: Gemcut, tokens: int) -> Gemcut:
        """A reader of one sequence of so many tokens at a time."""
        plan, limits = owner.plan.text, owner.engine.scheduler.limits
        per_token = sum(kv_bytes_per_token(plan, kind, owner.dtype.itemsize) for kind in ("sliding", "full"))
        return owner.sibling(
            "expert counter",
            graphs="off",
            max_num_seqs=1,
            kv_bytes=2 * (tokens + 2 * limits.page_size) * per_token,
        )


def _has_experts(contender: Gemcut) -> bool:
    return any(layer.experts is not None for layer in contender.plan.text.layers)


@contextmanager
def _routings() -> Iterator[list[torch.Tensor]]:
    """The experts [T, K] of every call of the router by a decoder, real tokens only, on the host."""
    calls: list[torch.Tensor] = []
    route_experts = text.route_experts

    def listen(r: torch.Tensor, *arguments: Any, **rest: Any) -> Routing:
        routing = route_experts(r, *arguments, **rest)
        count = int(arguments[2])  # the rows behind are padding
        calls.append(routing.experts[:count].cpu())
        return routing

    text.route_experts = listen
    try:
        yield calls
    finally:
        text.route_experts = route_experts
