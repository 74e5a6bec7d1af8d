"""Each slot's sampling state, and the way from a step's logits to its tokens.

Order: the model's own distribution is read for logprobs; penalties; biases and bans; then temperature,
top-k, top-p and min-p in `kernels.sample` (spec 6.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gemcut.data import Seat, TokenLogprobs
from gemcut.kernels import Backend, sample
from gemcut.sampling import SamplingParams, SlotSampling

NEVER = float("-inf")


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) that draws generated token `index` of a sequence: a hash of both.

    It depends on nothing else, so a sequence draws the same numbers in every batch, and again after
    preemption.
    """
    digest = hashlib.blake2b(
        seed.to_bytes(16, "little", signed=True) + index.to_bytes(8, "little"), digest_size=8
    )
    return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53


@dataclass(slots=True)
class _Slot:
    """One seated sequence. `biases`: (ids, addends) on the device, or None."""

    prompt_ids: tuple[int, ...] = ()
    sampling: SlotSampling | None = None
    biases: tuple[torch.Tensor, torch.Tensor] | None = None
    allowed: torch.Tensor | None = None
    stops: torch.Tensor | None = None
    penalized: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Sampled:
    """tokens: [L] int64 on the device. broken: [L] bool, rows without a token to choose: their logits are
    not numbers, or everything is banned."""

    tokens: torch.Tensor
    broken: torch.Tensor
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


class Sampler:
    """Sampling state of all slots. Penalty counts exist on the device from their first use on."""

    def __init__(self, num_slots: int, vocab: int, device: torch.device, backend: Backend) -> None:
        self.vocab, self.device, self.backend = vocab, device, backend
        self._slots = [_Slot() for _ in range(num_slots)]
        self._generated: torch.Tensor | None = None  # int32 [slots, V], times each id was generated
        self._prompted: torch.Tensor | None = None  # bool [slots, V], ids of the prompt

    def params(self, slot: int) -> SamplingParams:
        sampling = self._slots[slot].sampling
        assert sampling is not None, f"slot {slot} has no sequence"
        return sampling.params

    def prompt_ids(self, slot: int) -> tuple[int, ...]:
        return self._slots[slot].prompt_ids

    def seat(self, seat: Seat) -> None:
        """A sequence takes a slot, new or back from preemption with the tokens it has."""
        sampling = seat.sampling
        if not isinstance(sampling, SlotSampling):
            raise TypeError(f"Seat.sampling must be SlotSampling, got {type(sampling).__name__}")
        params = sampling.params
        # a checkpoint's lists may name ids beyond its vocabulary; they never come anyway
        suppressed = [token for token in sampling.suppressed if token < self.vocab]
        stop_ids = [token for token in sampling.stop_ids if token < self.vocab]
        biases = dict(params.logit_bias) | dict.fromkeys(suppressed, NEVER)
        state = _Slot(prompt_ids=seat.token_ids[: seat.num_prompt], sampling=sampling)
        if biases:
            state.biases = (
                torch.tensor(list(biases), dtype=torch.int64, device=self.device),
                torch.tensor(list(biases.values()), dtype=torch.float32, device=self.device),
            )
        if params.allowed_token_ids is not None:
            state.allowed = torch.full((self.vocab,), NEVER, device=self.device)
            state.allowed[list(params.allowed_token_ids)] = 0.0
        if params.min_tokens and stop_ids:
            state.stops = torch.tensor(stop_ids, dtype=torch.int64, device=self.device)
        state.penalized = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        )
        self._slots[seat.slot] = state
        if state.penalized:
            self._count(seat)

    def _count(self, seat: Seat) -> None:
        if self._generated is None or self._prompted is None:
            shape = len(self._slots), self.vocab
            self._generated = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._prompted = torch.zeros(shape, dtype=torch.bool, device=self.device)
        ids = torch.tensor(seat.token_ids, dtype=torch.int64, device=self.device)
        self._prompted[seat.slot] = False
        self._prompted[seat.slot, ids[: seat.num_prompt]] = True
        counts = torch.bincount(ids[seat.num_prompt :], minlength=self.vocab)
        self._generated[seat.slot] = counts.to(torch.int32)

    def draw(
        self,
        logits: torch.Tensor,
        slots: Sequence[int],
        indices: Sequence[int],
        masks: Mapping[int, np.ndarray],
    ) -> Sampled:
        """Sample a token for each row.

        logits: [L, V] fp32 of the rows' last tokens. slots: their slots. indices: how many tokens each
        has generated before. masks: slot -> int32 bitmask over the vocabulary (a grammar's), low bit first.
        """
        states = [self._slots[slot] for slot in slots]
        params = [self.params(slot) for slot in slots]
        broken = logits.isnan().any(dim=-1)
        changed = self._constrain(logits, states, slots, indices, masks)
        if changed is not logits:
            broken |= (changed == NEVER).all(dim=-1)  # bans and grammar together left nothing
        columns = np.array(
            [(p.temperature, p.top_p, p.min_p, p.top_k or self.vocab) for p in params], dtype=np.float64
        )
        draws = [
            uniform(state.sampling.seed, index) if state.sampling and p.temperature else 0.0
            for state, p, index in zip(states, params, indices, strict=True)
        ]
        temperature, top_p, min_p, top_k = torch.from_numpy(columns.T.copy()).to(self.device)
        tokens = sample(
            changed,
            temperature.float(),
            top_k.long(),
            top_p.float(),
            min_p.float(),
            torch.tensor(draws, dtype=torch.float64, device=self.device),
            max_top_k=max((p.top_k or self.vocab for p in params if p.temperature), default=0),
            backend=self.backend,
        )
        if self._generated is not None and any(state.penalized for state in states):
            rows = [i for i, state in enumerate(states) if state.penalized]
            at = torch.tensor([slots[i] for i in rows], device=self.device)
            self._generated[at, tokens[rows]] += 1
        wanted = [(i, p.logprobs) for i, p in enumerate(params) if p.logprobs is not None]
        found = {}
        if wanted:
            rows = [i for i, _ in wanted]
            for (i, k), entry in zip(
                wanted, top_logprobs(logits[rows], tokens[rows], max(k for _, k in wanted)), strict=True
            ):
                found[slots[i]] = entry.first(k)
        return Sampled(tokens, broken, found)

    def _constrain(
        self,
        logits: torch.Tensor,
        states: Sequence[_Slot],
        slots: Sequence[int],
        indices: Sequence[int],
        masks: Mapping[int, np.ndarray],
    ) -> torch.Tensor:
        """The logits after penalties, biases and bans; a copy if there are any."""
        if not masks and not any(
            s.penalized or s.biases or s.allowed is not None or s.stops is not None for s in states
        ):
            return logits
        out = logits.clone()
        for row, (state, slot, index) in enumerate(zip(states, slots, indices, strict=True)):
            if state.penalized:
                self._penalize(out[row], slot)
            if state.biases is not None:
                ids, addends = state.biases
                out[row, ids] += addends
            if state.allowed is not None:
                out[row] += state.allowed
            if state.stops is not None and index < self.params(slot).min_tokens:
                out[row, state.stops] = NEVER
            if slot in masks:
                bits = torch.from_numpy(masks[slot]).to(self.device)
                shifts = torch.arange(32, dtype=torch.int32, device=self.device)
                admitted = ((bits[:, None] >> shifts) & 1).bool().flatten()
                admitted = torch.nn.functional.pad(admitted, (0, max(0, self.vocab - admitted.shape[0])))
                out[row].masked_fill_(~admitted[: self.vocab], NEVER)
        return out

    def _penalize(self, row: torch.Tensor, slot: int) -> None:
        assert self._generated is not None, "a penalized slot has counts"
        assert self._prompted is not None, "a penalized slot has its prompt's ids"
        params = self.params(slot)
        times = self._generated[slot]
        seen = (times > 0) | self._prompted[slot]
        factor = params.repetition_penalty
        row.copy_(torch.where(seen, torch.where(row > 0, row / factor, row * factor), row))
        row -= params.frequency_penalty * times + params.presence_penalty * (times > 0)


def top_logprobs(logits: torch.Tensor, chosen: torch.Tensor, k: int) -> list[TokenLogprobs]:
    """Log-probabilities of each row's chosen token and its k likeliest. logits: [L, V]; chosen: [L]."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(-1, chosen[:, None])
    rank = (logprobs > own).sum(dim=-1) + 1
    # stable: ties go to the lowest id, as in sampling
    values, ids = (t[:, :k] for t in logprobs.sort(dim=-1, descending=True, stable=True))
    return [
        TokenLogprobs(token, logprob, place, tuple(zip(top, probs, strict=True)))
        for token, logprob, place, top, probs in zip(
            chosen.tolist(), own[:, 0].tolist(), rank.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]
