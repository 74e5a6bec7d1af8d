"""Runs steps: media, batch, forward, sampling. One runner owns one device."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gemcut.data import ForwardCounts, Row, Step, StepResult
from gemcut.errors import ConfigError
from gemcut.kernels import paged_attention
from gemcut.models.gemma4.model import Gemma4
from gemcut.models.gemma4.text import Attend
from gemcut.runner.batch import Inputs, PageTables, Size
from gemcut.runner.capture import Capture
from gemcut.runner.checks import RandomChecks
from gemcut.runner.encode import SoftTokens
from gemcut.runner.graphs import HEADS, Graphs, Kind, build, decode_sizes, encoder_sizes, other_sizes
from gemcut.runner.kv import KVPools, PoolSizes
from gemcut.runner.sample import Draws, Ranked, Sampler, choose, is_broken, top_logprobs
from gemcut.runner.upload import upload

log = logging.getLogger(__name__)

PROMPT_LOGIT_ROWS = 256  # rows of prompt logits at a time: [256, 262144] fp32 is 268 MB
BROKEN = -1  # in place of a token


@dataclass(slots=True)
class _Launched:
    """A step whose results may still be on their way. `done`: the CUDA event after the copies, if any.

    tokens: of each of `slots`, or BROKEN. logprobs: of the rows `wanted` (slot, k), in that order.
    """

    number: int
    slots: list[int]
    tokens: torch.Tensor
    done: torch.cuda.Event | None = None
    logprobs: Ranked | None = None
    wanted: Sequence[tuple[int, int]] = ()
    prompt_logprobs: Mapping[int, Sequence[Ranked]] = field(default_factory=dict)


class ModelRunner:
    """The runner of the engine's protocol, over one model on one device."""

    def __init__(
        self,
        model: Gemma4,
        sizes: PoolSizes,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """max_num_tokens: of a step."""
        backbone = getattr(model, "text_backbone", None)
        if backbone is None:
            raise ConfigError(
                f"{type(model).__name__} declares no text_backbone(): the runner has nothing to run."
            )
        self.model, self.device, self.max_model_len = model, device, max_model_len
        self._on_gpu = device.type == "cuda"
        self._card = device if self._on_gpu else -1  # for torch.cuda.device: -1 is none
        self.decoder = backbone()
        text = model.plan.text
        self.kv = KVPools(text, sizes, device, dtype)
        self.tables = PageTables(max_num_seqs, max_model_len, sizes.page_size, device)
        self.soft = SoftTokens(model, device, dtype)
        takes_media = model.plan.vision is not None
        soft = torch.zeros(max_num_tokens if takes_media else 0, text.hidden, device=device, dtype=dtype)
        self.inputs = Inputs(self.tables, max_num_tokens, soft, device)
        self.sampler = Sampler(max_num_seqs, text.vocab, device, self.decoder.backend)
        # what the forward leaves to the head, and the head to the host
        self.picked = torch.zeros(max_num_seqs + 1, text.hidden, device=device, dtype=dtype)
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.graphs = Graphs()
        self._launched: deque[_Launched] = deque()

    @property
    def counts(self) -> ForwardCounts:
        return self.graphs.counts

    @torch.inference_mode()
    def capture(self, kinds: Sequence[Kind], most_bytes: int, make: Callable[[], Capture]) -> None:
        """Make graphs of all sizes before the first step; see `graphs.build`. make: called when everything
        has run at its largest."""
        inputs, pages = self.inputs, self.tables.width
        checks = RandomChecks(
            self.model.plan.text, inputs, self.kv, self.soft, self.picked, self.tokens, self.max_model_len
        )
        decodes = decode_sizes(self.tables.num_slots, pages)
        others = other_sizes(inputs.max_tokens, self.tables.num_slots, pages, media=len(inputs.soft) > 0)
        # captures need a stream of their own; what they are compared with runs there too, with the same
        # workspaces
        side = torch.cuda.Stream(self.device) if self._on_gpu else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(self.device))
        encoders = encoder_sizes() if self.model.plan.vision is not None else []
        # on a CPU both contexts change nothing
        with torch.cuda.device(self._card), torch.cuda.stream(side):  # type: ignore[arg-type]
            if self._on_gpu and self.decoder.backend.kernels == "triton":
                self._precompile([*decodes, *others], encoders)
            for size in (decodes[-1], others[-1]):
                checks.forward(size, lambda size=size: self.forward(size))
            for count in encoders[-1:]:
                checks.encode(count, lambda count=count: self.soft.run(count))
            for max_top_k in HEADS:
                checks.head(decodes[-1].rows, max_top_k, lambda k=max_top_k: self.head(decodes[-1].rows, k))
            self.graphs = build(
                kinds,
                decodes,
                others,
                encoders,
                forward=self.forward,
                head=self.head,
                encode=self.soft.run,
                capture=make(),
                checks=checks,
                most_bytes=most_bytes,
            )
            checks.clean()
        if side is not None:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _precompile(self, sizes: Sequence[Size], encoders: Sequence[int]) -> None:
        """Compile what steps of these sizes launch. Powers of two and the largest stand for all: kernels
        change with the size at few places, and what is missed is compiled when it is captured."""
        from gemcut.kernels.precompile import precompile

        def run() -> None:
            for size in sizes:
                if size.tokens & (size.tokens - 1) == 0 or size.tokens == self.inputs.max_tokens:
                    self.forward(size)
            for max_top_k in HEADS:
                self.head(self.tables.num_slots, max_top_k)
                self.head(1, max_top_k)
            for count in encoders[-1:]:
                self.soft.run(count)

        began = time.perf_counter()
        count = precompile(run)
        log.info("%d kernels compiled in %.1f s", count, time.perf_counter() - began)

    @torch.inference_mode()
    def launch(self, step: Step, masks: Mapping[int, np.ndarray] | None = None) -> None:
        """Start a step. `masks`: slot -> the ids that its grammar admits next, as an int32 bitmask."""
        with torch.cuda.device(self._card):
            for key in step.free_media:
                self.soft.free(key)
            if step.encode:
                self.soft.encode(step.encode, self.graphs.find_encoder)
            for seat in step.seats:
                self.sampler.seat(seat)
            self.tables.enter(step.seats, step.rows)
            launched = self._run(step, masks or {})
            if self._on_gpu:
                launched.done = torch.cuda.Event()
                launched.done.record()
        self._launched.append(launched)

    def collect(self) -> StepResult:
        """Wait for the oldest launched step."""
        step = self._launched.popleft()
        if step.done is not None:
            step.done.synchronize()
        tokens, errors = {}, {}
        for slot, token in zip(step.slots, step.tokens.tolist(), strict=True):
            if token == BROKEN:
                errors[slot] = (
                    "No token can be chosen for this request: the model's output is not a number, or the "
                    "request's bans leave nothing. Others are unaffected."
                )
            else:
                tokens[slot] = token
        logprobs = {}
        if step.logprobs is not None:
            for (slot, k), entry in zip(step.wanted, step.logprobs.read(), strict=True):
                logprobs[slot] = entry.first(k)
        prompt_logprobs = {
            slot: tuple(entry for part in parts for entry in part.read())
            for slot, parts in step.prompt_logprobs.items()
        }
        return StepResult(step.number, tokens, errors, logprobs, prompt_logprobs)

    def _run(self, step: Step, masks: Mapping[int, np.ndarray]) -> _Launched:
        if not step.rows:
            return _Launched(step.number, [], torch.empty(0, dtype=torch.int64))
        rows, counts = step.rows, self.graphs.counts
        draws = self.sampler.draws(rows, masks)
        launched = _Launched(step.number, draws.slots, self.tokens[:0])
        # a graph leaves no hidden states but those that are sampled from
        asks = any(self._num_asked(row) for row in rows)
        graph = None if asks else self.graphs.find(rows)
        size = self._size(rows) if graph is None else graph.size
        self.inputs.fill(rows, size, self.soft, draws)
        if graph is not None:
            graph.replay()
            counts.replays[graph.kind] += 1
        else:
            hidden = self.forward(size)
            launched.prompt_logprobs = self._prompt_logprobs(rows, hidden)
            why = "prompt logprobs" if asks else "no graph of this size"
            counts.eager[why if len(self.graphs) else "no graphs"] += 1
        if draws.slots:
            self._draw(draws, masks, launched)
        return launched

    def _size(self, rows: Sequence[Row]) -> Size:
        """The size of a step as it is."""
        pages = self.tables.width
        if self.device.type == "cpu":  # its attention copies tables; on a GPU every step sees the same width
            pages = -(-max(row.start + row.count for row in rows) // self.tables.page_size)
        media = any(row.spans for row in rows)
        return Size(sum(row.count for row in rows), len(rows), pages, media)

    def forward(self, size: Size, attend: Attend = paged_attention) -> torch.Tensor:
        """Run the decoder on what was filled in. Rows that sample leave their hidden states in `picked`.

        Returns the hidden states [size.tokens, H] of all tokens.
        """
        hidden = self.decoder(self.inputs.batch(size), self.kv.layers, attend)
        torch.index_select(hidden, 0, self.inputs.ends(size.rows), out=self.picked[: size.rows])
        return hidden

    def head(self, count: int, max_top_k: int) -> None:
        """Draw tokens for the first `count` rows of `picked`, from the logits as they are."""
        logits, maxima = self.decoder.logits(self.picked[:count])
        tokens = choose(logits, maxima, self.inputs.draws(count), max_top_k, self.decoder.backend)
        self._keep(tokens, is_broken(maxima))

    def _draw(self, draws: Draws, masks: Mapping[int, np.ndarray], launched: _Launched) -> None:
        count = len(draws.slots)
        counts = self.graphs.counts
        replay = self.graphs.find_head(count, draws.max_top_k) if draws.plain else None
        if replay is not None:
            replay()
            counts.replays["head"] += 1
        else:
            if self.graphs.heads:
                counts.eager["head: top_k" if draws.plain else "head: rules of requests"] += 1
            logits, maxima = self.decoder.logits(self.picked[:count])
            sampled = self.sampler.draw(logits, maxima, draws, self.inputs.draws(count), masks)
            self._keep(sampled.tokens, sampled.broken)
            launched.logprobs, launched.wanted = sampled.logprobs, sampled.wanted
        # a copy: the next step writes its tokens to the same place
        launched.tokens = self.tokens[:count].to("cpu", non_blocking=True, copy=True)

    def _keep(self, tokens: torch.Tensor, broken: torch.Tensor) -> None:
        """Leave tokens where the slots' next decode rows and the host find them."""
        count = len(tokens)
        self.inputs.last_tokens.scatter_(0, self.inputs.draws(count).slots, tokens)
        self.tokens[:count].copy_(tokens.masked_fill(broken, BROKEN))

    def _prompt_logprobs(self, rows: Sequence[Row], hidden: torch.Tensor) -> dict[int, list[Ranked]]:
        """slot -> entries of prompt tokens start + 1 .. start + count, as far as they are in the prompt."""
        found: dict[int, list[Ranked]] = {}
        begin = 0
        for row in rows:
            count = self._num_asked(row)
            k = self.sampler.params(row.slot).prompt_logprobs
            if count and k is not None:
                prompt = self.sampler.prompt_ids(row.slot)
                following = upload(np.array(prompt[row.start + 1 :][:count]), self.device)
                found[row.slot] = []
                for i in range(0, count, PROMPT_LOGIT_ROWS):
                    stop = min(count, i + PROMPT_LOGIT_ROWS)
                    logits, _ = self.decoder.logits(hidden[begin + i : begin + stop])
                    found[row.slot].append(top_logprobs(logits, following[i:stop], k))
            begin += row.count
        return found

    def _num_asked(self, row: Row) -> int:
        """How many of the prompt's tokens behind a row's are to be told with their log-probabilities."""
        if self.sampler.params(row.slot).prompt_logprobs is None:
            return 0
        return max(0, min(row.count, len(self.sampler.prompt_ids(row.slot)) - 1 - row.start))
