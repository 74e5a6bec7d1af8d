"""Drives a real runner over a tiny checkpoint, step by step, and reads what the model computed.

A `Rig` loads a folder as an engine does (`ModelFiles`, `runner.start`) and hands steps to
`runner.launch`. It stands in for the scheduler: it gives pages out in a shuffled order, and spoils with
NaN what a runner must not read, so that a wrong page or a wrong window shows in every test.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from gemcut.config import EngineConfig
from gemcut.data import (
    EncodeItem,
    ImagePatches,
    MediaSpan,
    PageRun,
    Row,
    Seat,
    Step,
    StepResult,
)
from gemcut.engine.model_files import ModelFiles
from gemcut.kernels import Backend
from gemcut.media.image import patches
from gemcut.models.checkpoint import load
from gemcut.models.gemma4.model import Gemma4
from gemcut.plan import ModelPlan
from gemcut.runner.start import start
from gemcut.sampling import SamplingParams, SlotSampling

GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0)
IMAGE, BOI, EOI = (tiny.SPECIAL_IDS[t] for t in ("<|image|>", "<|image>", "<image|>"))


def save(folder: Path, kind: str, *, text_only: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Write a tiny checkpoint as a user would, and return the transformers model it was written from."""
    reference = tiny.make_model(kind, dtype, text_only=text_only)
    reference.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return reference


def load_model(folder: Path, dtype: torch.dtype) -> tuple[Gemma4, ModelPlan]:
    """The model alone, as `runner.start` loads it."""
    plan = ModelFiles.open(folder).plan
    with torch.device("meta"):
        model = Gemma4(plan, Backend())
    load(model, plan, folder, device="cpu", dtype=dtype)
    return model.eval(), plan


@dataclass(frozen=True)
class Picture:
    """A prompt's picture: what gemcut reads, and how large it is."""

    patches: ImagePatches
    budget: int


def picture(height: int, width: int, budget: int, seed: int = 0) -> Picture:
    return Picture(patches(tiny.picture(height, width, seed), budget), budget)


@dataclass(frozen=True)
class Asked:
    """A prompt with its pictures in place. spans: positions [start, stop) of each picture."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()


def ask(*parts: str | Picture) -> Asked:
    """A prompt of texts (control tokens spelled out) and pictures, in order."""
    tokenizer = tiny.make_tokenizer()
    ids: list[int] = []
    pictures, spans = [], []
    for part in parts:
        if isinstance(part, str):
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
            continue
        count = part.patches.soft_tokens
        spans.append((len(ids) + 1, len(ids) + 1 + count))
        ids += [BOI, *[IMAGE] * count, EOI]
        pictures.append(part)
    return Asked(tuple(ids), tuple(pictures), tuple(spans))


def reference_inputs(asked: Asked, *, padded: bool = True) -> dict[str, torch.Tensor]:
    """What transformers' forward wants for the same prompt: pictures padded to the largest budget.

    Not `padded`: to the largest picture only. Then one picture goes through products of the same shape as
    gemcut's, whose sums come out bit for bit.
    """
    ids = torch.tensor([asked.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not asked.pictures:
        return inputs
    most = 9 * max(p.budget if padded else p.patches.soft_tokens for p in asked.pictures)
    pixels = torch.zeros(len(asked.pictures), most, 768)
    positions = torch.full((len(asked.pictures), most, 2), -1)
    for i, p in enumerate(asked.pictures):
        count = p.patches.rows * p.patches.columns
        # the reference's pixel_values: bytes times 1/255, rounded once (spec 4.1 step 4)
        pixels[i, :count] = (torch.from_numpy(p.patches.pixels).double() * (1 / 255)).float()
        positions[i, :count] = torch.from_numpy(p.patches.positions()).long()
    return inputs | {
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": pixels,
        "image_position_ids": positions,
    }


def fp32_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' models with one rounding, as gemcut's. q, k, v: [B, heads, T, D]."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (t.float().repeat_interleave(groups, dim=1) for t in (key, value))
    mask = None if attention_mask is None else attention_mask.float()
    scores = query.float() @ keys.transpose(2, 3)
    out = (scores if mask is None else scores + mask).softmax(dim=-1) @ values
    return out.transpose(1, 2).to(query.dtype), None


# In bf16 transformers' eager attention rounds scores and probabilities (spec 10 item 5) and hides behind
# that what the rest of a module does. With this one every other rounding can be compared bit by bit.
transformers.AttentionInterface.register("fp32", fp32_attention)
AttentionMaskInterface.register("fp32", eager_mask)


@torch.no_grad()
def reference_logits(reference: Any, asked: Asked, *, soft: torch.Tensor | None = None) -> torch.Tensor:
    """transformers' logits at every position, [T, V]. `soft` takes the place of its own soft tokens."""
    hooks = []
    if soft is not None:
        projector = reference.model.embed_vision
        hooks.append(
            projector.register_forward_hook(lambda *_: soft.clone())
        )  # a copy outside inference mode
    logits = reference(**reference_inputs(asked), use_cache=False).logits[0].float()
    for hook in hooks:
        hook.remove()
    return logits


@torch.no_grad()
def reference_tokens(reference: Any, asked: Asked, count: int) -> list[int]:
    """transformers' own greedy answer; no token ends it."""
    inputs = reference_inputs(asked)
    reference.generation_config.eos_token_id = None
    out = reference.generate(**inputs, max_new_tokens=count, do_sample=False)
    return out[0, len(asked.ids) :].tolist()


@dataclass
class _Seated:
    ids: list[int]
    keys: tuple[bytes, ...]
    spans: tuple[tuple[int, int], ...]
    pages: dict[str, list[int]] = field(default_factory=lambda: {"full": [], "sliding": []})
    position: int = 0


class Rig:
    """One runner, and pages for its slots."""

    def __init__(
        self, folder: Path, *, dtype: Any = "float32", page_size: int = 4, seed: int = 0, **settings: Any
    ) -> None:
        settings = {"kv_bytes": 8 << 20, "max_num_seqs": 4} | settings
        config = EngineConfig(model=str(folder), device="cpu", dtype=dtype, page_size=page_size, **settings)
        self.files = ModelFiles.open(folder)
        self.plan = self.files.plan
        self.started = start(config, self.files.plan, self.files.folder, self.files.dtype)
        self.runner = self.started.runner
        self.page_size = page_size
        self._free = {
            "full": list(range(self.started.sizes.full_pages)),
            "sliding": list(range(self.started.sizes.sliding_pages)),
        }
        for pages in self._free.values():
            random.Random(seed).shuffle(pages)
        self._seated: dict[int, _Seated] = {}
        self._number = 0
        self._hidden: list[torch.Tensor] = []
        self.runner.decoder.register_forward_hook(lambda _module, _inputs, out: self._hidden.append(out))
        self.spoil("full", self._free["full"])
        self.spoil("sliding", self._free["sliding"])

    def spoil(self, kind: str, pages: Sequence[int]) -> None:
        """Fill pages with NaN in every layer of a kind: whoever reads them shows it."""
        for layer in self.plan.text.layers:
            if layer.kind == kind and layer.owns_kv:
                kv = self.runner.kv.layers[layer.index]
                kv.k_pages[list(pages)] = float("nan")
                kv.v_pages[list(pages)] = float("nan")

    def seat(
        self,
        slot: int,
        asked: Asked,
        params: SamplingParams = GREEDY,
        *,
        seed: int = 0,
        suppressed: tuple[int, ...] = (),
        stop_ids: tuple[int, ...] = (),
    ) -> tuple[Seat, tuple[EncodeItem, ...]]:
        """What brings a prompt into a slot: a seat, and its pictures to encode."""
        keys = tuple(f"{slot}/{i}".encode() for i in range(len(asked.pictures)))
        self._seated[slot] = _Seated(list(asked.ids), keys, asked.spans)
        sampling = SlotSampling(params=params, seed=seed, suppressed=suppressed, stop_ids=stop_ids)
        seat = Seat(slot, f"r{slot}", asked.ids, len(asked.ids), sampling)
        items = (EncodeItem("image", k, p.patches) for k, p in zip(keys, asked.pictures, strict=True))
        return seat, tuple(items)

    def row(self, slot: int, count: int | None = None, *, decode: bool = False) -> Row:
        """The row that goes on where the slot stands; `count` None takes the rest of its prompt."""
        state = self._seated[slot]
        begin = state.position
        count = 1 if decode else len(state.ids) - begin if count is None else count
        stop = begin + count
        runs = {}
        for kind, pages in state.pages.items():
            wanted = -(-stop // self.page_size) - len(pages)
            new = [self._free[kind].pop() for _ in range(max(0, wanted))]
            runs[kind] = PageRun(len(pages), tuple(new)) if new else None
            pages += new
        spans = tuple(
            MediaSpan("image", key, a, b)
            for key, (a, b) in zip(state.keys, state.spans, strict=True)
            if a < stop and b > begin
        )
        state.position = stop
        ids = None if decode else tuple(state.ids[begin:stop])
        samples = decode or stop == len(state.ids)
        return Row(slot, begin, count, ids, samples, runs["full"], runs["sliding"], spans)

    def step(
        self,
        rows: Sequence[Row],
        seats: Sequence[Seat] = (),
        encode: Sequence[EncodeItem] = (),
        free_media: Sequence[bytes] = (),
        masks: Mapping[int, Any] | None = None,
    ) -> StepResult:
        """Launch one step and collect it."""
        self._number += 1
        step = Step(self._number, tuple(rows), tuple(seats), tuple(encode), tuple(free_media))
        self.runner.launch(step, masks)
        result = self.runner.collect()
        assert result.number == self._number
        for slot, token in result.tokens.items():
            self._seated[slot].ids.append(token)
        return result

    def logits(self) -> torch.Tensor:
        """Logits of every token of the last step, [T, V]."""
        with torch.inference_mode():
            return self.runner.decoder.logits(self._hidden[-1])[0]

    def prefill(
        self,
        slot: int,
        asked: Asked,
        params: SamplingParams = GREEDY,
        *,
        cuts: Sequence[int] = (),
        **seat: Any,
    ) -> torch.Tensor:
        """Compute a prompt in chunks that end at `cuts` and at its end; logits [T, V] of all of it."""
        seated, items = self.seat(slot, asked, params, **seat)
        parts = []
        for i, stop in enumerate([*cuts, len(asked.ids)]):
            row = self.row(slot, stop - self._seated[slot].position)
            self.step([row], [seated] if i == 0 else [], items if i == 0 else [])
            parts.append(self.logits())
            self.spoil_left(slot)
        return torch.cat(parts)

    def decode(self, slot: int) -> torch.Tensor:
        """One token more; logits [V] of it."""
        self.step([self.row(slot, decode=True)])
        self.spoil_left(slot)
        return self.logits()[-1]

    def spoil_left(self, slot: int) -> None:
        """Spoil the sliding pages that no later query of the slot may read."""
        state = self._seated[slot]
        first = state.position - (self.plan.text.window or 0) + 1  # the next query sees from here on
        gone = max(0, first) // self.page_size
        self.spoil("sliding", state.pages["sliding"][:gone])

    def tokens(self, slot: int) -> list[int]:
        """All ids of a slot, the sampled ones last."""
        return list(self._seated[slot].ids)

    def soft(self, slot: int) -> torch.Tensor | None:
        """The soft tokens of a slot's pictures, None without pictures."""
        parts = [self.runner.soft[key] for key in self._seated[slot].keys]
        return torch.cat(parts) if parts else None

    def release(self, slot: int) -> None:
        """A sequence leaves: its pages go back, spoiled."""
        state = self._seated.pop(slot)
        for key in state.keys:
            self.runner.soft.free(key)
        for kind, pages in state.pages.items():
            self.spoil(kind, pages)
            self._free[kind] += pages

    def release_all(self) -> None:
        for slot in list(self._seated):
            self.release(slot)
