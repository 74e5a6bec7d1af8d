"""New tokens a second on a CPU, beside transformers: `python -m gemcut.bench.throughput`.

Enters: a checkpoint folder (the demo). Leaves: medians of interleaved rounds, ratios, and a JSON record. Each
round asks questions and shows pictures that none before it did, so no cache helps across rounds.

Both start from ids and from pictures that are decoded and cut. gemcut ends with texts, transformers with ids.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gemcut.config import EngineConfig
from gemcut.demo import CHECKPOINT
from gemcut.demo.render_pil import draw
from gemcut.demo.scenes import Canvas, sample_shapes, sample_size
from gemcut.engine.loop import Job
from gemcut.engine.model_files import ModelFiles
from gemcut.llm import open_files, start_engine
from gemcut.sampling import SamplingParams

Workload = Literal["mixed", "text", "uneven"]
WORKLOADS: tuple[Workload, ...] = ("mixed", "text", "uneven")
Times = dict[str, list[float]]  # seconds of each round, by engine

QUESTIONS = ("How many shapes are there?", "List all shapes.", "What colour is the circle?", "Where is it?")
SENTENCE = "Tell me about the {color} {thing} number {number}. "
COLORS, THINGS = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "triangle", "sign")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a conversation, and how many tokens it wants."""

    messages: list[dict[str, Any]]
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One engine on one workload. tokens_per_s: of those asked for. ratio: median of its seconds over
    gemcut's in the same round."""

    workload: Workload
    engine: str
    median_s: float
    least_s: float
    most_s: float
    tokens_per_s: float
    ratio: float


def requests(workload: Workload, count: int, seed: int) -> list[Ask]:
    """`count` requests of some 90 prompt tokens. "mixed": every other one has a picture, 32 to 64 new tokens.
    "text": no pictures. "uneven": no pictures, 8 to 200 new tokens, short answers more often than long."""
    rng = random.Random(f"{workload}/{seed}")
    asks = []
    for index in range(count):
        content: list[dict[str, Any]] = []
        if workload == "mixed" and index % 2:
            height, width = sample_size(rng)
            scene = sample_shapes(rng, Canvas.of(height, width))
            content.append({"type": "image", "image": draw(scene, height, width, rng.getrandbits(32))})
            text = rng.choice(QUESTIONS)
        else:
            text = "".join(
                SENTENCE.format(
                    color=rng.choice(COLORS), thing=rng.choice(THINGS), number=rng.randrange(1000)
                )
                for _ in range(3)
            )
        content.append({"type": "text", "text": text})
        new_tokens = round(8 * 25 ** rng.random()) if workload == "uneven" else rng.randint(32, 64)
        asks.append(Ask([{"role": "user", "content": content}], new_tokens))
    return asks


class Gemcut:
    """The engine with its default settings."""

    name = "gemcut"

    def __init__(self, folder: Path) -> None:
        config = EngineConfig(model=str(folder), device="cpu")
        self.files = open_files(config)
        self.engine, _ = start_engine(config, self.files)

    def prepare(self, asks: Sequence[Ask]) -> Callable[[], None]:
        jobs = [
            Job(
                request_id=str(index),
                prompt=self.files.chat_prompt(ask.messages),
                params=SamplingParams(temperature=0, max_tokens=ask.new_tokens, ignore_eos=True),
            )
            for index, ask in enumerate(asks)
        ]

        def run() -> None:
            for job in jobs:
                self.engine.add(job)
            count = 0
            while not self.engine.idle:
                for update in self.engine.step():
                    count += len(update.delta.token_ids)
            _expect(count, sum(ask.new_tokens for ask in asks))

        return run


class Transformers:
    """`generate` on one padded batch of all requests; it stops when the longest has its tokens."""

    name = "transformers generate"

    def __init__(self, folder: Path, files: ModelFiles) -> None:
        import transformers
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        self.files = files
        self.processor: Any = Gemma4ImageProcessorPil.from_pretrained(folder)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model: Any = transformers.Gemma4ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()

    def prepare(self, asks: Sequence[Ask]) -> Callable[[], None]:
        inputs = self._inputs(asks)
        longest = max(ask.new_tokens for ask in asks)

        @torch.inference_mode()
        def run() -> None:
            out = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=longest, min_new_tokens=longest
            )
            _expect(out.shape[1] - inputs["input_ids"].shape[1], longest)

        return run

    def _inputs(self, asks: Sequence[Ask]) -> dict[str, torch.Tensor]:
        prompts = [self.files.chat_prompt(ask.messages).prompt.token_ids for ask in asks]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        pictures = [
            part["image"] for ask in asks for part in ask.messages[0]["content"] if part["type"] == "image"
        ]
        image = self.model.config.image_token_id
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image).long()}
        if pictures:
            pixels = self.processor(pictures, return_tensors="pt")
            inputs["pixel_values"] = pixels["pixel_values"]
            inputs["image_position_ids"] = pixels["image_position_ids"]
        return inputs


def continuous_batching(batched: Transformers) -> str:
    """How transformers' own continuous batching fares on one text: "runs", or why it does not.

    As of 5.23 it takes one number of KV heads for all layers, so Gemma 4's are refused.
    """
    from transformers import GenerationConfig

    prompt = list(batched.files.chat_prompt(requests("text", 1, 0)[0].messages).prompt.token_ids)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=-1)
    attention = batched.model.config._attn_implementation
    with batched.model.continuous_batching_context_manager(
        generation_config=greedy, warmup=False, timeout=5
    ) as manager:
        manager.add_request(prompt)
        result = None
        while result is None and manager.is_running():
            result = manager.get_result(timeout=1)
        failure = manager.background_thread_status.fatal_error
    batched.model.set_attn_implementation(attention)
    if result is not None and result.error is None:
        return "runs"
    return f"does not run: {failure or (result and result.error) or 'it returned nothing'}"


def _expect(got: int, wanted: int) -> None:
    if got != wanted:
        raise RuntimeError(f"{got} tokens came where {wanted} were asked for")


def race(
    engines: Sequence[Gemcut | Transformers],
    workload: Workload,
    count: int,
    rounds: int,
) -> tuple[Times, list[int]]:
    """Seconds of each engine and round, engines by turns; and the tokens asked for in each round."""
    times: Times = {engine.name: [] for engine in engines}
    tokens = []
    for number in range(-1, rounds):  # round -1 warms up
        asks = requests(workload, count, number)
        turn = number % len(engines)
        for engine in [*engines[turn:], *engines[:turn]]:
            run = engine.prepare(asks)
            gc.collect()
            began = time.perf_counter()
            run()
            if number >= 0:
                times[engine.name].append(time.perf_counter() - began)
        if number >= 0:
            tokens.append(sum(ask.new_tokens for ask in asks))
    return times, tokens


def summarise(workload: Workload, times: Times, tokens: Sequence[int]) -> list[Result]:
    rates = {
        name: statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
        for name, seconds in times.items()
    }
    return [
        Result(
            workload=workload,
            engine=name,
            median_s=round(statistics.median(seconds), 3),
            least_s=round(min(seconds), 3),
            most_s=round(max(seconds), 3),
            tokens_per_s=round(rates[name], 1),
            # of the rounds' own ratios: what slows the machine slows both
            ratio=round(
                statistics.median(s / ours for s, ours in zip(seconds, times[Gemcut.name], strict=True)), 2
            ),
        )
        for name, seconds in times.items()
    ]


def machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1),
    }


def record(path: Path, results: Sequence[Result], rest: Mapping[str, Any]) -> None:
    """Write the latest run with what is needed to repeat it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = dict(rest) | {"results": [asdict(result) for result in results]}
    path.write_text(json.dumps(entry, indent=1) + "\n")


def table(results: Sequence[Result]) -> str:
    lines = [f"{'workload':<9} {'engine':<28} {'median s':>9} {'tokens/s':>9} {'ours is faster':>15}"]
    lines += [
        f"{r.workload:<9} {r.engine:<28} {r.median_s:9.2f} {r.tokens_per_s:9.0f} {r.ratio:14.2f}x"
        for r in results
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gemcut.bench.throughput", description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--record", type=Path, help="bench/records/cpu/throughput.json in a checkout")
    options = parser.parse_args(arguments)
    import transformers

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    rest = {
        "command": " ".join(["python -m gemcut.bench.throughput", *(arguments or sys.argv[1:])]),
        "commit": commit.stdout.strip() or None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": machine(),
        "model": "demo" if options.model == CHECKPOINT else options.model.name,
        "dtype": "float32",
        "requests": options.requests,
        "rounds": options.rounds,
    }
    ours = Gemcut(options.model)
    batched = Transformers(options.model, ours.files)
    results: list[Result] = []
    for workload in options.workloads:
        results += summarise(workload, *race((ours, batched), workload, options.requests, options.rounds))
    rest["transformers generate_batch"] = continuous_batching(batched)
    print(table(results))
    print(f"transformers generate_batch {rest['transformers generate_batch']}")
    if options.record is not None:
        record(options.record, results, rest)
        print(f"written to {options.record}")


if __name__ == "__main__":
    main()
