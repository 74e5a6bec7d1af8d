"""transformers as the other side: the same values in its model, the same prompts, its own `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from gemcut.bench.against import Share
from gemcut.bench.contender import Setup, Trace, give_back_memory
from gemcut.data import ImagePatches, pixel_values
from gemcut.engine.model_files import ChatPrompt
from gemcut.models.weight_sources import draw
from gemcut.plan import tensor_shapes

LARGEST_BATCH = 32  # a step takes a tenth of a second, and its KV much memory


class Transformers:
    """Gemma 4 of transformers: sdpa attention, grouped products of experts, eager, no graphs."""

    name = "transformers"

    def __init__(
        self,
        setup: Setup,
        device: torch.device,
        dtype: torch.dtype,
        *,
        share: Share | None = None,
        pictures: bool = False,
    ) -> None:
        """It takes the memory that it needs, whatever its share, and has its tower with or without
        pictures."""
        import transformers

        config = setup.model_config()
        parsed = transformers.AutoConfig.for_model(**config)
        text_only = config.get("model_type") == "gemma4_text"
        model_class: Any = (
            transformers.Gemma4ForCausalLM if text_only else transformers.Gemma4ForConditionalGeneration
        )
        with torch.device(device):
            model = model_class._from_config(parsed, attn_implementation="sdpa", dtype=dtype).eval()
        plan = setup.files().plan
        self.has_experts = any(layer.experts is not None for layer in plan.text.layers)
        if self.has_experts:
            model.set_experts_implementation("grouped_mm")
        values = model.state_dict()
        for name in tensor_shapes(plan):
            draw(values[name], name, setup.seed)
        model.generation_config.eos_token_id = None
        self.model, self.device, self.image = model, device, plan.ids.image
        self.longest = plan.text.max_positions
        self.clock = _Clock(device)

    def facts(self) -> dict[str, Any]:
        import transformers

        return {
            "version": transformers.__version__,
            "weights": "the same values as gemcut's",
            "attention": "sdpa",
            "experts": "grouped_mm" if self.has_experts else None,
        }

    def close(self) -> None:
        del self.model
        give_back_memory()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[ChatPrompt], new_tokens: int) -> Trace:
        """Prompts of one length, in batches of at most `LARGEST_BATCH`, one after another: nobody joins a
        batch that runs. Ids and pictures lie on the device before the time begins."""
        starts = range(0, len(prompts), LARGEST_BATCH)
        batches = [self._inputs(prompts[start : start + LARGEST_BATCH]) for start in starts]
        trace = Trace(most_running=min(len(prompts), LARGEST_BATCH))
        ticks = self.clock.ticks
        _synchronize(self.device)
        began = time.perf_counter()
        for inputs in batches:
            ticks.clear()
            out = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=new_tokens, stopping_criteria=[self.clock]
            )
            trace.answers += out[:, inputs["input_ids"].shape[1] :].tolist()
            trace.first_token_s += [ticks[0] - began] * len(out)
        trace.wall_s = time.perf_counter() - began
        if len(batches) == 1:  # otherwise no step gives every prompt a token
            trace.step_s = [later - earlier for earlier, later in pairwise(ticks)]
        return trace

    @torch.inference_mode()
    def encode_ms(self, pictures: Sequence[ImagePatches]) -> float:
        """Milliseconds from pictures on the device to their soft tokens: tower and projector."""
        inputs = self._pixels(pictures)
        _synchronize(self.device)
        began = time.perf_counter()
        self.model.get_image_features(**inputs)
        _synchronize(self.device)
        return (time.perf_counter() - began) * 1e3

    def _inputs(self, prompts: Sequence[ChatPrompt]) -> dict[str, torch.Tensor]:
        """What its `generate` takes for a batch of B prompts of T tokens: input_ids, attention_mask, and with
        pictures mm_token_type_ids, int64 [B, T]; and `_pixels`."""
        ids = torch.tensor([prompt.prompt.token_ids for prompt in prompts], device=self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures := [picture for prompt in prompts for picture in prompt.media]:
            inputs |= {"mm_token_type_ids": (ids == self.image).long()} | self._pixels(pictures)
        return inputs

    def _pixels(self, pictures: Sequence[ImagePatches]) -> dict[str, torch.Tensor]:
        """As its image processor makes them: pixel_values fp32 [P, N, 768] and image_position_ids int64
        [P, N, 2] of P pictures, those with fewer than N patches filled up with zeros and -1."""
        values = [torch.from_numpy(pixel_values()[picture.pixels]) for picture in pictures]
        positions = [torch.from_numpy(picture.positions()).long() for picture in pictures]
        return {
            "pixel_values": pad_sequence(values, batch_first=True).to(self.device),
            "image_position_ids": pad_sequence(positions, batch_first=True, padding_value=-1).to(self.device),
        }


class _Clock:
    """Stands among the stopping criteria, is asked after every token, and never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        _synchronize(self.device)
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
