"""vLLM as the other side, in this process, step by step.

Written against the source of 0.33.0; it was not run against the package itself, which wants a GPU that the
project's tests do not have. Everything that is not named here is at vLLM's own default: compilation, graphs,
chunks, kernels.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch

from gemcut.bench.against import Share, installed
from gemcut.bench.contender import Setup, Trace, give_back_memory
from gemcut.bench.peer_files import peer_prompt, write_folder
from gemcut.engine.model_files import ChatPrompt
from gemcut.errors import GemcutError


class VLLM:
    """`LLM` with random values. Its engine core runs in this process, so that a step is a call."""

    name = "vllm"

    def __init__(
        self, setup: Setup, device: torch.device, dtype: torch.dtype, *, share: Share | None, pictures: bool
    ) -> None:
        # read when vllm is imported; otherwise the core is a process of its own, and its steps are not seen
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        vllm: Any = import_module("vllm")

        self.plan = setup.files().plan
        most = setup.config.max_model_len or self.plan.text.max_positions
        memory: dict[str, Any] = {"gpu_memory_utilization": setup.config.gpu_memory_utilization}
        if share is not None and device.type == "cuda":
            _, total = torch.cuda.mem_get_info(device)
            memory = {
                "gpu_memory_utilization": share.all_bytes / total,
                "kv_cache_memory_bytes": share.kv_bytes,
            }
        media = {"image": 1 if pictures else 0, "video": 0}
        self.settings: dict[str, Any] = {
            "load_format": "dummy",
            "dtype": str(dtype).removeprefix("torch."),
            "seed": setup.seed,
            "max_model_len": most,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "disable_log_stats": True,
            **({"limit_mm_per_prompt": media} if self.plan.vision is not None else {}),
            **memory,
        }
        with tempfile.TemporaryDirectory() as folder:
            write_folder(setup, Path(folder))
            self.llm = vllm.LLM(model=folder, **self.settings)
        # a step's output holds its new tokens, without their text
        self._greedy = partial(
            vllm.SamplingParams,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
        )
        self.longest = most
        self._names = map(str, count())

    def facts(self) -> dict[str, Any]:
        return {
            "version": installed("vllm"),
            "weights": "random values of its own",
            "settings": self.settings,
        }

    def generate(self, prompts: Sequence[ChatPrompt], new_tokens: int) -> Trace:
        engine = self.llm.llm_engine
        params = self._greedy(max_tokens=new_tokens)
        asked = dict(zip(self._names, map(self._prompt, prompts), strict=False))
        index_of = {name: index for index, name in enumerate(asked)}
        trace = Trace(answers=[[] for _ in prompts], first_token_s=[0.0] * len(prompts))
        began = last = time.perf_counter()
        for name, prompt in asked.items():
            engine.add_request(name, prompt, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if not outputs:
                continue  # launched ahead: its tokens come with a later call
            now = time.perf_counter()
            trace.most_running = max(trace.most_running, len(outputs))
            later = 0
            for output in outputs:
                index, ids = index_of[output.request_id], output.outputs[0].token_ids
                if ids and not trace.answers[index]:
                    trace.first_token_s[index] = now - began
                elif ids:
                    later += 1
                trace.answers[index] += ids
            if later == len(prompts):
                trace.step_s.append(now - last)
            last = now
        trace.wall_s = time.perf_counter() - began
        if any(len(answer) != new_tokens for answer in trace.answers):
            raise GemcutError("vllm ended an answer early.")
        return trace

    def close(self) -> None:
        del self.llm
        give_back_memory()

    def _prompt(self, prompt: ChatPrompt) -> dict[str, Any]:
        ids, pictures = peer_prompt(self.plan, prompt)
        return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": pictures}} if pictures else {})}
