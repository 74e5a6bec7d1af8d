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

from gemcut.data import Row, Seat, TokenLogprobs
from gemcut.kernels import Backend, block_maxima, sample
from gemcut.runner.upload import upload
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
    """One seated sequence. `biases`: (ids, addends) on the device, or None. `ruled`: its logits are changed
    before a token is drawn, at every step; `stops` are banned at the first ones only."""

    prompt_ids: tuple[int, ...] = ()
    sampling: SlotSampling | None = None
    biases: tuple[torch.Tensor, torch.Tensor] | None = None
    allowed: torch.Tensor | None = None
    stops: torch.Tensor | None = None
    penalized: bool = False

    @property
    def ruled(self) -> bool:
        return self.penalized or self.biases is not None or self.allowed is not None


@dataclass(frozen=True, eq=False, slots=True)
class Draws:
    """The L rows of a step that sample, in order.

    rows: [L] int64, which of the step's rows they are. slots: theirs. indices: how many tokens each has
    generated before. columns: name -> [L], the arguments of `kernels.sample`. max_top_k: the largest top_k of
    rows that are not greedy, 0 if all are. plain: tokens are drawn from the logits as they are, and that is
    all that is wanted of them.
    """

    rows: np.ndarray
    slots: list[int]
    indices: list[int]
    columns: Mapping[str, np.ndarray]
    max_top_k: int
    plain: bool


@dataclass(frozen=True, eq=False, slots=True)
class DrawTensors:
    """`Draws` on the device, each [L], padding included: slots int64, the rest as `kernels.sample` has it."""

    slots: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Ranked:
    """Log-probabilities of R chosen tokens and the k likeliest of each row, perhaps still on their way here.

    chosen, own, rank: [R]. ids, values: [R, k].
    """

    chosen: torch.Tensor
    own: torch.Tensor
    rank: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor

    def read(self) -> list[TokenLogprobs]:
        """One entry a row; whoever reads has waited for the device."""
        columns = (t.tolist() for t in (self.chosen, self.own, self.rank, self.ids, self.values))
        return [
            TokenLogprobs(token, logprob, place, tuple(zip(top, probs, strict=True)))
            for token, logprob, place, top, probs in zip(*columns, strict=True)
        ]


@dataclass(frozen=True, eq=False, slots=True)
class Sampled:
    """tokens: [L] int64 on the device. broken: [L] bool, rows without a token to choose: their logits are
    not numbers, or everything is banned. logprobs: of the rows `wanted` (slot, k), in that order."""

    tokens: torch.Tensor
    broken: torch.Tensor
    logprobs: Ranked | None = None
    wanted: Sequence[tuple[int, int]] = field(default=())


class Sampler:
    """Sampling state of all slots. Penalty counts exist on the device from their first use on."""

    def __init__(self, num_slots: int, vocab: int, device: torch.device, backend: Backend) -> None:
        self.vocab, self.device, self.backend = vocab, device, backend
        self._slots = [_Slot() for _ in range(num_slots)]
        # by slot: temperature, top_p, min_p, top_k
        self._columns = np.zeros((4, num_slots))
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
                self._upload(list(biases), np.int64),
                self._upload(list(biases.values()), np.float32),
            )
        if params.allowed_token_ids is not None:
            state.allowed = torch.full((self.vocab,), NEVER, device=self.device)
            state.allowed[self._upload(params.allowed_token_ids, np.int64)] = 0.0
        if params.min_tokens and stop_ids:
            state.stops = self._upload(stop_ids, np.int64)
        state.penalized = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        )
        self._slots[seat.slot] = state
        top_k = params.top_k or self.vocab
        self._columns[:, seat.slot] = params.temperature, params.top_p, params.min_p, top_k
        if state.penalized:
            self._count(seat)

    def _upload(self, values: Sequence[float], dtype: type) -> torch.Tensor:
        return upload(np.array(values, dtype=dtype), self.device)

    def _count(self, seat: Seat) -> None:
        if self._generated is None or self._prompted is None:
            shape = len(self._slots), self.vocab
            self._generated = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._prompted = torch.zeros(shape, dtype=torch.bool, device=self.device)
        ids = self._upload(seat.token_ids, np.int64)
        self._prompted[seat.slot] = False
        self._prompted[seat.slot, ids[: seat.num_prompt]] = True
        generated = ids[seat.num_prompt :]
        counts = self._generated[seat.slot]
        counts.zero_().index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def draws(self, rows: Sequence[Row], masks: Mapping[int, np.ndarray]) -> Draws:
        """Which rows of a step sample, and how. masks: as in `draw`."""
        chosen = [(i, row) for i, row in enumerate(rows) if row.samples]
        slots = [row.slot for _, row in chosen]
        indices = [row.start + row.count - len(self.prompt_ids(row.slot)) for _, row in chosen]
        temperature, top_p, min_p, top_k = self._columns[:, slots]
        numbers, plain = [], not masks
        for slot, index in zip(slots, indices, strict=True):
            state, params = self._slots[slot], self.params(slot)
            assert state.sampling is not None, f"slot {slot} has no sequence"
            numbers.append(uniform(state.sampling.seed, index) if params.temperature else 0.0)
            stops = state.stops is not None and index < params.min_tokens
            plain = plain and not (state.ruled or stops or params.logprobs is not None)
        return Draws(
            rows=np.array([i for i, _ in chosen], dtype=np.int64),
            slots=slots,
            indices=indices,
            columns={
                "temperature": temperature,
                "top_p": top_p,
                "min_p": min_p,
                "top_k": top_k,
                "uniform": np.array(numbers),
            },
            max_top_k=int(top_k[temperature > 0].max(initial=0)),
            plain=plain,
        )

    def draw(
        self,
        logits: torch.Tensor,
        maxima: torch.Tensor,
        draws: Draws,
        tensors: DrawTensors,
        masks: Mapping[int, np.ndarray],
    ) -> Sampled:
        """Sample a token for each row, with everything that requests may ask for.

        logits: [L, V] fp32 of the rows' last tokens. maxima: theirs, as `kernels.logits` leaves them.
        masks: slot -> int32 bitmask over the vocabulary (a grammar's), low bit first.
        """
        slots = draws.slots
        states = [self._slots[slot] for slot in slots]
        changed = logits if draws.plain else self._constrain(logits, states, draws, masks)
        broken = is_broken(maxima)
        if changed is not logits:
            maxima = block_maxima(changed, backend=self.backend)
            broken |= is_broken(maxima)  # bans and grammar together left nothing
        tokens = choose(changed, maxima, tensors, draws.max_top_k, self.backend)
        if self._generated is not None and any(state.penalized for state in states):
            rows = [i for i, state in enumerate(states) if state.penalized]
            at = self._upload([slots[i] for i in rows], np.int64)
            self._generated[at, tokens[self._upload(rows, np.int64)]] += 1
        wanted = [(i, k) for i, slot in enumerate(slots) if (k := self.params(slot).logprobs) is not None]
        if not wanted:
            return Sampled(tokens, broken)
        rows = self._upload([i for i, _ in wanted], np.int64)
        ranked = top_logprobs(logits[rows], tokens[rows], max(k for _, k in wanted))
        return Sampled(tokens, broken, ranked, [(slots[i], k) for i, k in wanted])

    def _constrain(
        self, logits: torch.Tensor, states: Sequence[_Slot], draws: Draws, masks: Mapping[int, np.ndarray]
    ) -> torch.Tensor:
        """The logits after penalties, biases and bans; a copy if there are any."""
        if not masks and not any(s.ruled or s.stops is not None for s in states):
            return logits
        out = logits.clone()
        for row, (state, slot, index) in enumerate(zip(states, draws.slots, draws.indices, strict=True)):
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
                bits = upload(masks[slot], self.device)
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


def choose(
    logits: torch.Tensor, maxima: torch.Tensor, draws: DrawTensors, max_top_k: int, backend: Backend
) -> torch.Tensor:
    """A token for each row of the logits that requests' rules have been applied to, and their maxima."""
    return sample(
        logits,
        maxima,
        draws.temperature,
        draws.top_k,
        draws.top_p,
        draws.min_p,
        draws.uniform,
        max_top_k=max_top_k,
        backend=backend,
    )


def is_broken(maxima: torch.Tensor) -> torch.Tensor:
    """bool [L]: rows that no token can be chosen from. maxima: [L, B]; one is NaN if anything is."""
    best = maxima.amax(dim=-1)
    return best.isnan() | (best == NEVER)


def top_logprobs(logits: torch.Tensor, chosen: torch.Tensor, k: int) -> Ranked:
    """Log-probabilities of each row's chosen token and its k likeliest. logits: [L, V]; chosen: [L]."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(-1, chosen[:, None])
    rank = (logprobs > own).sum(dim=-1) + 1
    # stable: ties go to the lowest id, as in sampling
    values, ids = (t[:, :k] for t in logprobs.sort(dim=-1, descending=True, stable=True))
    return Ranked(*(t.to("cpu", non_blocking=True) for t in (chosen, own[:, 0], rank, ids, values)))
