"""transformers as the other side: the same values in its model, the same prompts, its own `generate`.

Both models do not fit on one GPU at full size, so it is measured after ours, in the same command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch

from gemcut.bench.contender import Setup, Trace
from gemcut.engine.model_files import ChatPrompt
from gemcut.errors import ConfigError
from gemcut.hub import read_config
from gemcut.models.weight_sources import draw
from gemcut.plan import tensor_shapes


def check_peer(setup: Setup) -> None:
    """Raise ConfigError if the other side cannot be had; before ours takes minutes."""
    if find_spec("transformers") is None:
        raise ConfigError("transformers is not installed: pip install transformers.")
    if setup.random_weights is None:
        raise ConfigError("Both sides get the same random values: give --random-weights.")


class Transformers:
    """Gemma 4 of transformers: sdpa attention, grouped products of experts, eager, no graphs."""

    name = "transformers"

    def __init__(self, setup: Setup, device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        assert setup.random_weights is not None, "checked by check_peer"
        _, config = read_config(setup.random_weights)
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
            "attention": "sdpa",
            "experts": "grouped_mm" if self.has_experts else None,
        }

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
