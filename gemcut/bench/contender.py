"""What is measured: an engine in this process, driven as `LLM` drives it.

Enters: a model (a checkpoint, or a config and a seed) and engine settings. Leaves: a `Contender` that runs
prompts of random ids and tells when what happened. Several contenders share one set of weights.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from gemcut.config import EngineConfig
from gemcut.data import POOL, ImagePatches, Prompt, Span, Step, StepResult
from gemcut.demo import CHECKPOINT
from gemcut.engine.loop import Job
from gemcut.engine.model_files import ChatPrompt, ModelFiles
from gemcut.errors import ConfigError, GemcutError, NotFound
from gemcut.hub import SIZES, read_config
from gemcut.llm import open_files, start_engine
from gemcut.models.weight_sources import RandomWeights, SharedWeights, WeightSource
from gemcut.plan import ModelPlan, parse_config, weight_bytes
from gemcut.prompt.tokenizer import Tokenizer
from gemcut.runner.runner import ModelRunner
from gemcut.runner.start import choose_device, choose_dtype
from gemcut.sampling import GenerationDefaults, SamplingParams

HELD_S = 0.05  # the device is held up so long that the host has launched a step before it begins
BESIDE_KV_BYTES = 10 << 30  # activations and graphs of engines that are compared
LASTING = 64  # tokens of an answer that is only watched for a while
CYCLES_PER_S = 1.7e9  # of a GPU's clock, about


@dataclass(slots=True)
class Trace:
    """What one run took, in seconds.

    first_token_s: from the start to each prompt's first token. step_s: of the steps that gave every prompt
    one more token. Both are empty for an engine whose steps are not seen. most_running: sequences that ran at
    once. answers: the ids that came, by prompt.
    """

    wall_s: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    most_running: int = 0
    preemptions: int = 0
    answers: list[list[int]] = field(default_factory=list)


class Contender(Protocol):
    """One side of a comparison."""

    name: str

    def generate(self, prompts: Sequence[ChatPrompt], new_tokens: int) -> Trace:
        """Answer all prompts, greedily, with exactly so many tokens each."""
        ...

    def facts(self) -> dict[str, Any]:
        """What it really ran with, for records."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and answer."""
        ...


class Gemcut:
    """An engine of ours."""

    def __init__(
        self, name: str, config: EngineConfig, files: ModelFiles, weights: WeightSource | None
    ) -> None:
        """weights: None for those of `files`."""
        self.name, self.config, self.files = name, config, files
        self.engine, self.used = start_engine(config, files, weights=weights)
        assert isinstance(self.engine.runner, ModelRunner), "an engine of this process owns its runner"
        self.runner = self.engine.runner

    @property
    def plan(self) -> ModelPlan:
        return self.files.plan

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.runner.model.parameters()).dtype

    @property
    def longest(self) -> int:
        return self.engine.scheduler.limits.longest

    def facts(self) -> dict[str, Any]:
        counts = self.runner.counts
        forwards = {
            "replays": dict(counts.replays),
            "eager": dict(counts.eager),
            "dropped": dict(counts.dropped),
        }
        return asdict(self.used) | {"forwards": forwards}

    def sibling(self, name: str, **settings: Any) -> Gemcut:
        """Another engine on the same weights."""
        return Gemcut(name, replace(self.config, **settings), self.files, SharedWeights(self.runner.model))

    def generate(self, prompts: Sequence[ChatPrompt], new_tokens: int) -> Trace:
        trace = Trace(answers=[[] for _ in prompts])
        trace.first_token_s = [0.0] * len(prompts)
        before, done = self.engine.stats().preemptions, 0
        began = last = time.perf_counter()
        for job in self._jobs(prompts, new_tokens):
            self.engine.add(job)
        while done < len(prompts):
            updates = self.engine.step()
            now = time.perf_counter()
            trace.most_running = max(trace.most_running, len(self.engine.scheduler.running))
            later = 0
            for update in updates:
                index, ids = int(update.request_id), update.delta.token_ids
                if ids and not trace.answers[index]:
                    trace.first_token_s[index] = now - began
                elif ids:
                    later += 1
                trace.answers[index] += ids
                done += update.output is not None
            if later == len(prompts):
                trace.step_s.append(now - last)
            last = now
        trace.wall_s = time.perf_counter() - began
        trace.preemptions = self.engine.stats().preemptions - before
        self._drain()
        if any(len(answer) != new_tokens for answer in trace.answers):
            raise GemcutError("An answer ended early: the model's output is not a number.")
        return trace

    @contextmanager
    def timed_on_device(self) -> Iterator[list[float]]:
        """Milliseconds that each step launched in here takes on the GPU, filled in at the end.

        The device does not wait for the host: it is held up until a step is launched. Empty on a CPU.
        """
        spans: list[float] = []
        if self.device.type != "cuda":
            yield spans
            return
        timed = _TimedRunner(self)
        self.engine.runner = timed
        try:
            yield spans
        finally:
            self.engine.runner = self.runner
        torch.cuda.synchronize(self.device)
        spans += [start.elapsed_time(stop) for start, stop in timed.events]

    @contextmanager
    def decoding(self, prompts: Sequence[ChatPrompt]) -> Iterator[Callable[[], Any]]:
        """The engine with all prompts read and their answers under way; what is yielded makes one step.

        The first answers go on while the last prompts are read: all last for some twenty steps more.
        """
        new_tokens = min(LASTING, self.longest - max(len(prompt.prompt) for prompt in prompts))
        for job in self._jobs(prompts, new_tokens):
            self.engine.add(job)
        started: set[str] = set()
        while len(started) < len(prompts):
            started |= {update.request_id for update in self.engine.step() if update.delta.token_ids}
        try:
            yield self.engine.step
        finally:
            for index in range(len(prompts)):
                self.engine.abort(str(index))
            self._drain()

    def device_ms(self, call: Callable[[], Any]) -> float:
        """Milliseconds that a call takes on the GPU when it need not wait for the host."""
        start, stop = self.held(call)
        stop.synchronize()
        return start.elapsed_time(stop)

    def held(self, call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """The events before and after a call, behind something that holds the stream up for a while."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(HELD_S * CYCLES_PER_S))
        start.record()
        call()
        stop.record()
        return start, stop

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _jobs(self, prompts: Sequence[ChatPrompt], new_tokens: int) -> list[Job]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        return [
            Job(request_id=str(index), prompt=prompt, params=params, chat=False)
            for index, prompt in enumerate(prompts)
        ]

    def _drain(self) -> None:
        while not self.engine.idle:
            self.engine.step()


class _TimedRunner:
    """Passes steps on, and keeps the CUDA events before and after each."""

    def __init__(self, contender: Gemcut) -> None:
        self.contender, self.runner = contender, contender.runner
        self.counts = self.runner.counts
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def launch(self, step: Step, masks: Mapping[int, np.ndarray] | None = None) -> None:
        self.events.append(self.contender.held(lambda: self.runner.launch(step, masks)))

    def collect(self) -> StepResult:
        return self.runner.collect()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What to measure. random_weights: a size, config.json or folder whose config alone is read; then
    `config.model` is not used. versus: settings of engines to set against one another, by their names."""

    config: EngineConfig
    random_weights: str | None = None
    versus: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model's name in tables and records."""
        if self.random_weights is not None:
            return self.random_weights
        return "demo" if self.config.model is None else self.config.model

    @property
    def seed(self) -> int:
        """Of the random weights."""
        return self.config.seed or 0

    def files(self) -> ModelFiles:
        if self.random_weights is None:
            return open_files(self.config)
        config = self.model_config()
        plan = parse_config(config, allow_unknown=self.config.allow_unknown_config)
        return files_without_weights(plan, config.get("dtype"))

    def model_config(self) -> dict[str, Any]:
        """config.json of the model whose weights are random. Raises NotFound if there is none."""
        assert self.random_weights is not None, "a checkpoint has its own"
        try:
            return read_config(self.random_weights)[1]
        except NotFound as error:
            sizes = ", ".join(SIZES)
            raise NotFound(
                f"--random-weights {self.random_weights}: {error} It takes one of {sizes} as well."
            ) from error

    def start(self, kv_bytes: int | None = None) -> list[Gemcut]:
        """The engines, on one set of weights; several divide the memory for KV among them. kv_bytes: of
        each, if somebody else divided it."""
        files = self.files()
        weights = None if self.random_weights is None else RandomWeights(self.seed)
        (name, settings), *others = (self.versus or {"gemcut": {}}).items()
        config = replace(self.config, kv_bytes=kv_bytes or self._kv_bytes(files))
        first = Gemcut(name, replace(config, **settings), files, weights)
        return [first, *(first.sibling(name, **settings) for name, settings in others)]

    def _kv_bytes(self, files: ModelFiles) -> int | None:
        """Of each engine. None: one engine takes what it would take for a user."""
        device, _ = choose_device(self.config.device)
        if self.config.kv_bytes is not None or len(self.versus) < 2 or device.type == "cpu":
            return self.config.kv_bytes
        free, total = torch.cuda.mem_get_info(device)
        dtype, _ = choose_dtype(self.config.dtype, files.dtype, device)
        spare = (
            free - (1 - self.config.gpu_memory_utilization) * total - weight_bytes(files.plan, dtype.itemsize)
        )
        if spare < 2 * BESIDE_KV_BYTES:
            raise ConfigError(
                f"{free / 1e9:.1f} GB are free; beside the weights they hold no {len(self.versus)} engines. "
                "Compare fewer, or give --kv-bytes."
            )
        return int(spare - BESIDE_KV_BYTES) // len(self.versus)

    def facts(self) -> dict[str, Any]:
        """For records."""
        return {
            "model": self.model,
            "weights": "checkpoint" if self.random_weights is None else "random",
            "settings": {name: value for name, value in asdict(self.config).items() if name != "model"},
        }


def files_without_weights(plan: ModelPlan, dtype: str | None) -> ModelFiles:
    """Files of a model that has only a config. The demo's tokenizer stands in: texts then mean nothing."""
    return ModelFiles(
        folder=CHECKPOINT,
        plan=plan,
        tokenizer=Tokenizer(CHECKPOINT),
        defaults=GenerationDefaults.parse(None, plan.ids.eos),
        empty_thought=False,
        image_tokens=plan.default_image_tokens,
        dtype=dtype,
    )


def release(contenders: list[Gemcut]) -> None:
    """Give the memory of engines back, for another contender on the same device."""
    for contender in contenders:
        contender.engine.close()
    contenders.clear()
    give_back_memory()


def give_back_memory() -> None:
    """To the device, of what nobody holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


# ---- prompts


def text_prompt(plan: ModelPlan, tokens: int, seed: int) -> ChatPrompt:
    """Random ids from the middle of the vocabulary, where there are no control tokens."""
    return ChatPrompt(Prompt(tuple(_ids(plan, tokens, seed))), (), False)


def picture_prompt(plan: ModelPlan, pictures: Sequence[ImagePatches], tokens: int, seed: int) -> ChatPrompt:
    """Pictures in their brackets, then `tokens` random ids."""
    boi, image, eoi = plan.ids.boi, plan.ids.image, plan.ids.eoi
    if boi is None or image is None or eoi is None:
        raise ConfigError("This model takes no pictures: its config names no image tokens.")
    ids: list[int] = []
    spans = []
    for index, picture in enumerate(pictures):
        start, count = len(ids) + 1, picture.soft_tokens
        spans.append(Span("image", index, start, start + count))
        ids += [boi, *[image] * count, eoi]
    return ChatPrompt(Prompt((*ids, *_ids(plan, tokens, seed)), tuple(spans)), tuple(pictures), False)


def random_picture(soft_tokens: int, seed: int) -> ImagePatches:
    """Noise, in the grid nearest to a square that has so many soft tokens."""
    rows = next(n for n in range(int(soft_tokens**0.5), 0, -1) if soft_tokens % n == 0)
    columns = soft_tokens // rows
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (soft_tokens * POOL * POOL, 768), dtype=np.uint8)
    return ImagePatches(pixels, rows * POOL, columns * POOL, digest=rng.bytes(32))


def _ids(plan: ModelPlan, tokens: int, seed: int) -> list[int]:
    vocab = plan.text.vocab
    return random.Random(seed).choices(range(vocab // 4, 3 * vocab // 4), k=tokens)


# ---- rounds

C = TypeVar("C", bound=Contender)
T = TypeVar("T")


def by_turns(contenders: Sequence[C], rounds: int, run: Callable[[C, int], T]) -> dict[str, list[T]]:
    """What `run(contender, round)` returns, by name. Each round has all contenders, another one first."""
    found: dict[str, list[T]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        turn = number % len(contenders)
        for contender in [*contenders[turn:], *contenders[:turn]]:
            found[contender.name].append(run(contender, number))
    return found
