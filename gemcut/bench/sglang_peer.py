"""SGLang as the other side: an `Engine`, whose scheduler is a process of its own.

Written against the source of 0.5.23; it was not run against the package itself, which wants a GPU that the
project's tests do not have. Everything that is not named here is at SGLang's own default. Its steps are not
seen from here, and streaming would slow it down: a step's time is the difference between a long and a short
run, divided.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gemcut.bench.against import Share, installed
from gemcut.bench.contender import Setup, Trace
from gemcut.bench.peer_files import peer_prompt, write_folder
from gemcut.engine.model_files import ChatPrompt
from gemcut.errors import GemcutError
from gemcut.plan import weight_bytes


class SGLang:
    """`Engine` with random values."""

    name = "sglang"

    def __init__(
        self, setup: Setup, device: torch.device, dtype: torch.dtype, *, share: Share | None, pictures: bool
    ) -> None:
        sglang: Any = import_module("sglang")

        self.plan = setup.files().plan
        self.longest = setup.config.max_model_len or self.plan.text.max_positions
        self.settings: dict[str, Any] = {
            "load_format": "dummy",
            "dtype": str(dtype).removeprefix("torch."),
            "random_seed": setup.seed,
            "context_length": self.longest,
            "disable_radix_cache": True,
            "skip_tokenizer_init": True,
            "enable_metrics": True,  # answers then tell when they ran
        }
        if self.plan.vision is not None and not pictures:
            self.settings["language_model_only"] = True
        if share is not None and device.type == "cuda":
            # of what is free when it starts: weights and KV
            static = weight_bytes(self.plan, dtype.itemsize) + (share.kv_bytes or 0)
            self.settings["mem_fraction_static"] = static / torch.cuda.mem_get_info(device)[0]
        self.folder = tempfile.TemporaryDirectory()  # its processes read it when they like
        write_folder(setup, Path(self.folder.name))
        self.engine = sglang.Engine(model_path=self.folder.name, **self.settings)

    def facts(self) -> dict[str, Any]:
        return {
            "version": installed("sglang"),
            "weights": "random values of its own",
            "settings": self.settings,
        }

    def generate(self, prompts: Sequence[ChatPrompt], new_tokens: int) -> Trace:
        asked = [peer_prompt(self.plan, prompt) for prompt in prompts]
        pictures = [prompt.pictures for prompt in asked]
        began = time.perf_counter()
        outputs = self.engine.generate(
            input_ids=[prompt.ids for prompt in asked],
            sampling_params={"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True},
            image_data=pictures if any(pictures) else None,
        )
        wall = time.perf_counter() - began
        answers = [list(output["output_ids"]) for output in outputs]
        if any(len(answer) != new_tokens for answer in answers):
            raise GemcutError("sglang ended an answer early.")
        told = [output["meta_info"] for output in outputs]
        return Trace(
            wall_s=wall,
            most_running=at_once(told),
            preemptions=sum(info["num_retractions"] for info in told),
            answers=answers,
        )

    def close(self) -> None:
        """It ends every child of this process, whoever started it: the last thing that a run does."""
        self.engine.shutdown()
        self.folder.cleanup()


def at_once(told: Sequence[Mapping[str, Any]]) -> int:
    """The most answers that were under way together, by when each began to run and ended."""
    changes = [(info["forward_entry_time"], 1) for info in told]
    changes += [(info["request_finished_ts"], -1) for info in told]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most
