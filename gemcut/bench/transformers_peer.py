"""transformers as the other side: the same values in its model, the same prompts, its own `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from gemcut.bench.against import Share
from gemcut.bench.contender import Setup, Trace, give_back_memory
from gemcut.engine.model_files import ChatPrompt
from gemcut.models.weight_sources import draw
from gemcut.plan import tensor_shapes


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
        """It takes the memory that it needs, whatever its share; nobody asks it about pictures."""
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
        self.model, self.device = model, device
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
        """Prompts of one length, in one batch."""
        ids = torch.tensor([prompt.prompt.token_ids for prompt in prompts], device=self.device)
        self.clock.ticks.clear()
        began = time.perf_counter()
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            stopping_criteria=[self.clock],
        )
        answers = out[:, ids.shape[1] :].tolist()
        wall = time.perf_counter() - began
        ticks = self.clock.ticks
        return Trace(
            wall_s=wall,
            first_token_s=[ticks[0] - began] * len(prompts),
            step_s=[later - earlier for earlier, later in pairwise(ticks)],
            most_running=len(prompts),
            answers=answers,
        )


class _Clock:
    """Stands among the stopping criteria, is asked after every token, and never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
