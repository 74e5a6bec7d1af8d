"""Runs steps: media, batch, forward, sampling. One runner owns one device."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gemcut.data import Row, Step, StepResult, TokenLogprobs
from gemcut.errors import ConfigError
from gemcut.models.gemma4.model import Gemma4
from gemcut.runner.batch import PageTables, build
from gemcut.runner.encode import SoftTokens
from gemcut.runner.kv import KVPools, PoolSizes
from gemcut.runner.sample import Sampled, Sampler, top_logprobs

PROMPT_LOGIT_ROWS = 256  # rows of prompt logits at a time: [256, 262144] fp32 is 268 MB


@dataclass(slots=True)
class _Launched:
    """A step whose tokens may still be on their way. `done`: the CUDA event after the copy, if any."""

    number: int
    slots: list[int]
    tokens: torch.Tensor
    broken: torch.Tensor
    done: torch.cuda.Event | None
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


class ModelRunner:
    """The runner of the engine's protocol, over one model on one device."""

    def __init__(
        self,
        model: Gemma4,
        sizes: PoolSizes,
        *,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        backbone = getattr(model, "text_backbone", None)
        if backbone is None:
            raise ConfigError(
                f"{type(model).__name__} declares no text_backbone(): the runner has nothing to run."
            )
        self.model, self.device, self.dtype = model, device, dtype
        self.decoder = backbone()
        self.kv = KVPools(model.plan.text, sizes, device, dtype)
        self.tables = PageTables(max_num_seqs, max_model_len, sizes.page_size)
        self.soft = SoftTokens(model, device)
        self.sampler = Sampler(max_num_seqs, model.plan.text.vocab, device, self.decoder.backend)
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._launched: deque[_Launched] = deque()

    @torch.inference_mode()
    def launch(self, step: Step, masks: Mapping[int, np.ndarray] | None = None) -> None:
        """Start a step. `masks`: slot -> the ids that its grammar admits next, as an int32 bitmask."""
        for key in step.free_media:
            self.soft.free(key)
        if step.encode:
            self.soft.encode(step.encode)
        for seat in step.seats:
            self.tables.seat(seat)
            self.sampler.seat(seat)
        for row in step.rows:
            self.tables.extend(row)
        if not step.rows:
            empty = torch.empty(0, dtype=torch.int64)
            self._launched.append(_Launched(step.number, [], empty, empty.bool(), None))
            return
        batch = build(step, self.tables, self.soft, self.last_tokens, self.device)
        hidden = self.decoder(batch, self.kv.layers)
        prompt_logprobs = self._prompt_logprobs(step.rows, hidden)
        sampled, slots = self._sample(step.rows, hidden, masks or {})
        tokens, broken, done = sampled.tokens, sampled.broken, None
        if self.device.type == "cuda":
            tokens, broken = (t.to("cpu", non_blocking=True) for t in (tokens, broken))
            done = torch.cuda.Event()
            done.record()
        self._launched.append(
            _Launched(step.number, slots, tokens, broken, done, sampled.logprobs, prompt_logprobs)
        )

    def collect(self) -> StepResult:
        """Wait for the oldest launched step."""
        step = self._launched.popleft()
        if step.done is not None:
            step.done.synchronize()
        tokens, errors = {}, {}
        for slot, token, broken in zip(step.slots, step.tokens.tolist(), step.broken.tolist(), strict=True):
            if broken:
                errors[slot] = (
                    "No token can be chosen for this request: the model's output is not a number, or the "
                    "request's bans leave nothing. Others are unaffected."
                )
            else:
                tokens[slot] = token
        return StepResult(step.number, tokens, errors, step.logprobs, step.prompt_logprobs)

    def _sample(
        self, rows: Sequence[Row], hidden: torch.Tensor, masks: Mapping[int, np.ndarray]
    ) -> tuple[Sampled, list[int]]:
        slots, ends, indices, end = [], [], [], 0
        for row in rows:
            end += row.count
            if row.samples:
                slots.append(row.slot)
                ends.append(end - 1)
                indices.append(row.start + row.count - len(self.sampler.prompt_ids(row.slot)))
        if not slots:
            none = torch.empty(0, dtype=torch.int64)
            return Sampled(none, none.bool()), []
        logits = self.decoder.logits(hidden[torch.tensor(ends, device=self.device)])
        sampled = self.sampler.draw(logits, slots, indices, masks)
        self.last_tokens[torch.tensor(slots, device=self.device)] = sampled.tokens
        return sampled, slots

    def _prompt_logprobs(
        self, rows: Sequence[Row], hidden: torch.Tensor
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        """slot -> entries of prompt tokens start + 1 .. start + count, as far as they are in the prompt."""
        found = {}
        begin = 0
        for row in rows:
            k = self.sampler.params(row.slot).prompt_logprobs
            prompt = self.sampler.prompt_ids(row.slot)
            if k is not None and row.start < len(prompt) - 1:
                count = min(row.count, len(prompt) - 1 - row.start)
                following = torch.tensor(prompt[row.start + 1 :][:count], device=self.device)
                entries: list[TokenLogprobs] = []
                for i in range(0, count, PROMPT_LOGIT_ROWS):
                    stop = min(count, i + PROMPT_LOGIT_ROWS)
                    logits = self.decoder.logits(hidden[begin + i : begin + stop])
                    entries += top_logprobs(logits, following[i:stop], k)
                found[row.slot] = tuple(entries)
            begin += row.count
        return found
