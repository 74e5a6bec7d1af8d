"""Train the demo from nothing: python -m gemcut.demo.train --seconds 560 --out DIR

One GPU needs less than ten minutes. CPU workers draw scenes and write rows, the device draws the pictures and
trains; on a GPU the whole step is one CUDA graph. Writes DIR/state.safetensors (float32) now and then, and at
the end DIR/checkpoint, the folder that ships.
"""

import argparse
import collections
import json
import math
import multiprocessing
import queue
import random
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcut.demo import export, fonts, net, render
from gemcut.demo.questions import KINDS
from gemcut.demo.rows import BatchMaker, Layout
from gemcut.demo.tokenizer import Encoder

if TYPE_CHECKING:
    from gemcut.evaluate.run import Result

_TORCH_TYPES = {
    np.dtype(np.int8): torch.int8,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.float32): torch.float32,
}
# What a kind's errors cost, before the weighting by its accuracy: counting a kind and reading are the
# hardest, text is the least wanted.
_IMPORTANCE = {
    "count_shape": 3.0,
    "count_color": 3.0,
    "read_word": 2.5,
    "read_number": 1.5,
    "describe_sign": 1.5,
    "list": 1.5,
    "describe": 1.5,
    "count": 1.3,
} | dict.fromkeys(("repeat", "reverse", "add", "thought"), 0.5)
_REPORT_SECONDS, _SAVE_SECONDS = 10, 100


def _worker(results: Any, progress: Any, layout: Layout, seed: int, font_folder: str | None) -> None:
    """Fill the queue with batches; the letters start larger and the pictures less narrow than they become."""
    maker = BatchMaker(layout, random.Random(seed), Encoder(), fonts.faces(False, font_folder))
    while True:
        done = progress.value
        results.put(
            maker.make(smallest=30 + 14 * max(0.0, 1 - done / 0.2), easy=0.8 * max(0.0, 1 - done / 0.15))
        )


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly (Newton-Schulz as in Muon); [count, rows, columns]."""
    flip = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if flip else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if flip else x


class Optimizer:
    """Muon for matrices, Adam for the rest, both over a few stacked tensors that the parameters are views of.

    Everything, the learning rate too, lives on the device, so that a step can be captured in a graph.
    """

    def __init__(
        self, parameters: net.Parameters, device: torch.device, rate: float, adam_rate: float, decay: float
    ) -> None:
        self.peak, self.adam_ratio, self.decay = rate, adam_rate / rate, decay
        self.parameters: net.Parameters = {}
        groups: dict[tuple[int, ...], list[str]] = collections.defaultdict(list)
        self.flat_names: list[str] = []
        for name, value in parameters.items():
            if name.endswith(net.FIXED):
                self.parameters[name] = value.to(device)
            elif value.dim() < 2 or any(
                part in name for part in ("embed_tokens", "router", "position_embedding", "helper")
            ):
                self.flat_names.append(name)
            else:
                groups[tuple(value.shape[-2:])].append(name)
        self.flat = torch.cat([parameters[name].reshape(-1) for name in self.flat_names]).to(device)
        self._views(self.flat, self.flat_names, parameters, ())
        self.groups = []
        for shape, names in groups.items():
            stack = torch.cat([parameters[name].reshape(-1, *shape) for name in names]).to(device)
            self._views(stack, names, parameters, shape)
            self.groups.append((names, stack, torch.zeros_like(stack)))
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.steps, self.rate = torch.zeros((), device=device), torch.zeros((), device=device)
        self.leaves = [
            self.parameters[name]
            for name in [*self.flat_names, *(n for names, _, _ in self.groups for n in names)]
        ]

    def _views(self, whole: Tensor, names: list[str], like: net.Parameters, shape: tuple[int, ...]) -> None:
        position = 0
        for name in names:
            count = like[name].numel() // math.prod(shape)
            part = whole[position : position + count].view(like[name].shape)
            self.parameters[name] = part.detach().requires_grad_()
            position += count

    def tensors(self) -> list[Tensor]:
        """The trained tensors themselves."""
        return [self.flat, *(stack for _, stack, _ in self.groups)]

    def reset(self) -> None:
        """Forget all momentum."""
        for state in (self.first, self.second, self.steps, *(momentum for _, _, momentum in self.groups)):
            state.zero_()

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Update from the gradients of ``leaves``; returns the norm of Adam's part."""
        count = len(self.flat_names)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients[:count]]).float()
        norm = flat.norm()
        flat = flat * (1.0 / (norm + 1e-6)).clamp(max=1.0)
        self.steps.add_(1.0)
        self.first.lerp_(flat, 0.1)
        self.second.lerp_(flat * flat, 0.02)
        mean, square = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.98**self.steps)
        self.flat.sub_(self.rate * self.adam_ratio * mean / (square.sqrt() + 1e-8))
        for names, stack, momentum in self.groups:
            part = gradients[count : count + len(names)]
            count += len(names)
            gradient = torch.cat([value.reshape(-1, *stack.shape[1:]) for value in part]).float()
            momentum.lerp_(gradient, 0.05)
            update = (
                _orthogonal(torch.lerp(gradient, momentum, 0.95))
                * max(1.0, stack.shape[1] / stack.shape[2]) ** 0.5
            )
            stack.sub_(self.rate * (update + self.decay * stack))
        return norm


class Trainer:
    """Device buffers, the step, and the measures taken during training."""

    def __init__(
        self, layout: Layout, size: net.Size, arguments: argparse.Namespace, device: torch.device
    ) -> None:
        self.layout, self.size, self.device = layout, size, device
        cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.buffer = torch.zeros(layout.bytes, dtype=torch.uint8, device=device)
        parameters = net.initial(size, arguments.seed)
        if arguments.start:
            weights = load_file(Path(arguments.start) / "model.safetensors")
            parameters |= {name: value.float() for name, value in weights.items()}
        self.batch = {
            name: self.buffer[offset : offset + math.prod(shape) * dtype.itemsize]
            .view(_TORCH_TYPES[dtype])
            .view(shape)
            for name, (offset, dtype, shape) in layout.fields().items()
        }
        self.optimizer = Optimizer(parameters, device, arguments.rate, arguments.adam_rate, 0.05)
        self.net = net.Net(size, self.optimizer.parameters, self.dtype, flash=cuda)
        self.draw_shapes, self.draw_signs = render.draw_shapes, render.draw_signs
        self.kind_weight = torch.tensor([0.0, *(_IMPORTANCE.get(kind, 1.0) for kind in KINDS)], device=device)
        self.helper_weight = torch.ones((), device=device)
        self.kind_sums = torch.zeros(net.KIND_ROWS, 3, device=device)
        self.sums = torch.zeros(
            7, device=device
        )  # loss, balance, helper, gradient norm, helper hits, marks, steps

    def load(self, buffer: np.ndarray) -> None:
        """Copy a batch to the device."""
        self.buffer.copy_(torch.from_numpy(buffer))

    @torch.no_grad()
    def pictures(self) -> tuple[Tensor, render.Positions]:
        """Draw the batch's pictures: patches [n, PATCHES, 768] in -1..1, and where they lie."""
        batch, count = self.batch, self.layout.shape_pictures
        positions = render.patch_positions(batch["grid"])
        shape = (self.layout.pictures, render.PATCHES * render.PATCH**2, 3)
        noise = torch.randn(shape, device=self.device, dtype=self.dtype)
        common = (batch["look"], batch["grid"], batch["stretch"], positions.x, positions.y, noise)
        drawn = [
            self.draw_shapes(batch["shapes"], *(part[:count] for part in common)).to(self.dtype),
            self.draw_signs(batch["signs"], batch["masks"], *(part[count:] for part in common)).to(
                self.dtype
            ),
        ]
        # Levels 0..255 are exact in bf16; scaling them in float32 rounds as the model's own bf16 input does.
        pixels = torch.cat(drawn).float() / 255 * 2 - 1
        return pixels.to(self.dtype).view(self.layout.pictures, render.PATCHES, 768), positions

    def calibrate(self) -> None:
        """Fit the patch projection and the standardization to the loaded batch."""
        pixels, positions = self.pictures()
        tokens = torch.arange(render.PATCHES // 9, device=self.device) < (
            positions.valid.sum(1)[:, None] // 9
        )
        with torch.no_grad():
            net.calibrate(
                self.net.parameters,
                pixels[positions.valid][::7],
                lambda: self.net.tower(pixels, positions)[tokens],
            )

    def losses(self) -> tuple[Tensor, ...]:
        """The net's losses on the loaded batch."""
        return self.net.loss(*self.pictures(), self.batch, self.kind_weight)

    def step(self) -> None:
        """One training step on the loaded batch."""
        loss, balance, helper, kind_sums, _, marked = self.losses()
        total = loss + 0.005 * balance + 0.3 * self.helper_weight * helper
        norm = self.optimizer.step(torch.autograd.grad(total, self.optimizer.leaves))
        with torch.no_grad():
            self.kind_sums.add_(kind_sums)
            self.sums.add_(torch.stack([loss, balance, helper, norm, *marked, torch.ones_like(loss)]))

    def compile(self) -> None:
        """Replace the elementwise parts by compiled ones."""
        self.net.kernels = net.Kernels().compiled()
        self.draw_shapes = torch.compile(render.draw_shapes, dynamic=False)
        self.draw_signs = torch.compile(render.draw_signs, dynamic=False)

    def capture(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph. It trains a few steps on the way: reset the optimizer after."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step()
        return graph

    def validate(self, batches: list[np.ndarray]) -> dict[str, tuple[float, int]]:
        """Share of answers with every token right (teacher forcing, so the same as greedy), and their number,
        per kind.

        Not under no_grad, for which everything would be compiled once more.
        """
        right: collections.Counter[int] = collections.Counter()
        seen: collections.Counter[int] = collections.Counter()
        for buffer in batches:
            self.load(buffer)
            hits = self.losses()[4].cpu().numpy() > 0
            for kinds, row in zip(self.layout.views(buffer)["kind"][:, 1:], hits, strict=True):
                for part in np.split(np.arange(len(kinds)), np.flatnonzero(np.diff(kinds)) + 1):
                    if kinds[part[0]] >= 0:
                        seen[kinds[part[0]]] += 1
                        right[kinds[part[0]]] += bool(row[part].all())
        return {KINDS[kind]: (round(right[kind] / seen[kind], 4), seen[kind]) for kind in sorted(seen)}

    def state(self) -> net.Parameters:
        """A float32 copy of all parameters on the CPU."""
        return {name: value.detach().float().cpu().clone() for name, value in self.net.parameters.items()}


def reweigh(accuracy: np.ndarray) -> list[float]:
    """Weight of each kind by its accuracy per token: what is right already counts less."""
    weight = [min(1.5, 0.1 + 8 * (1 - value)) for value in accuracy[1:]]
    return [0.0, *(_IMPORTANCE.get(kind, 1.0) * value for kind, value in zip(KINDS, weight, strict=True))]


def exact_answers(
    checkpoint: Path, folder: Path, font_folder: str | None, items: int | None = None
) -> "Result":
    """What an engine answers to held-out questions: `gemcut eval demo --model CHECKPOINT` by its own code,
    with the same questions and prompts. The answers are kept in `folder`."""
    from gemcut.evaluate.answerers import EngineAnswerer, Wish
    from gemcut.evaluate.demo import ITEMS, Demo
    from gemcut.evaluate.run import run
    from gemcut.llm import AsyncLLM

    shutil.rmtree(folder, ignore_errors=True)  # answers of an earlier training are not this one's
    task = Demo(font_folder=font_folder)
    llm = AsyncLLM(str(checkpoint), kv_bytes=256 << 20)  # the training still holds memory of its own
    try:
        answerer = EngineAnswerer(llm, Wish(max_tokens=task.max_tokens))
        return run(task, answerer, folder, {"model": str(checkpoint)}, items=items or ITEMS)
    finally:
        llm.close()


def train(arguments: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """Run a whole training; returns the last validation on held-out fonts, words and combinations."""
    began = time.time()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    def say(*parts: object) -> None:
        print(f"[{time.time() - began:6.1f}]", *parts, flush=True)

    layout = Layout(*map(int, arguments.rows.split(",")))
    context = multiprocessing.get_context("fork")
    progress, batches = context.Value("d", 0.0), context.Queue(24)
    workers = [
        context.Process(
            target=_worker,
            args=(batches, progress, layout, arguments.seed * 1000 + index, arguments.fonts),
            daemon=True,
        )
        for index in range(arguments.workers)
    ]
    for worker in workers:
        worker.start()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        torch.set_num_threads(arguments.threads)
    trainer = Trainer(layout, net.Size(), arguments, device)
    optimizer = trainer.optimizer
    say(
        "device", torch.cuda.get_device_name() if cuda else "cpu", "parameters", sum(p.numel() for p in
        net.initial(net.Size()).values()), "rows", layout.rows, "pictures", layout.pictures,
    )  # fmt: skip
    maker = BatchMaker(
        layout,
        random.Random(987_654_321),
        Encoder(),
        fonts.faces(True, arguments.fonts),
        unseen=True,
        variety=0.4,
    )
    held_out = [maker.make(smallest=34) for _ in range(arguments.validation)]
    trainer.load(batches.get())
    if not arguments.start:
        trainer.calibrate()
    say("loss before training", round(trainer.losses()[0].item(), 3))
    start = [tensor.clone() for tensor in optimizer.tensors()]
    if arguments.compile:
        trainer.compile()
        say("compiled loss", round(trainer.losses()[0].item(), 3))
    run = trainer.step
    if cuda:
        graph = trainer.capture()
        run = graph.replay
        say("graph captured, GB", round(torch.cuda.memory_reserved() / 1e9, 1))
        for tensor, value in zip(optimizer.tensors(), start, strict=True):
            tensor.copy_(value)
        optimizer.reset()
        trainer.sums.zero_()
        trainer.kind_sums.zero_()

    free: queue.Queue[Tensor] = queue.Queue()
    ready: queue.Queue[Tensor] = queue.Queue()
    for _ in range(8):
        free.put(torch.empty(layout.bytes, dtype=torch.uint8, pin_memory=cuda))

    def pin() -> None:
        while True:
            batch, slot = batches.get(), free.get()
            slot.numpy()[:] = batch
            ready.put(slot)

    threading.Thread(target=pin, daemon=True).start()
    first = last_report = last_save = time.time()
    seconds = arguments.seconds - (first - began)
    step = reported = 0
    waited, mult = 0.0, 1.0
    accuracy, good = np.zeros(net.KIND_ROWS), [tensor.clone() for tensor in optimizer.tensors()]
    pending: collections.deque[tuple[Any, Tensor]] = collections.deque()
    while (now := time.time()) - first < seconds and step < arguments.steps:
        done = (now - first) / seconds
        progress.value = done
        optimizer.rate.fill_(
            optimizer.peak * mult * min(1, (step + 1) / 200) * min(1, (1 - done) / arguments.cooldown)
        )
        trainer.helper_weight.fill_(max(0.1, 1 - done / 0.7))
        slot = ready.get()
        waited += time.time() - now
        trainer.buffer.copy_(slot, non_blocking=True)
        run()
        step += 1
        if cuda:
            event = torch.cuda.Event()
            event.record()
            pending.append((event, slot))
            while len(pending) > 3:
                event, slot = pending.popleft()
                event.synchronize()
                free.put(slot)
        else:
            free.put(slot)
        if now - last_report > _REPORT_SECONDS or step in (5, 50):
            loss, balance, helper, norm, hits, marks, steps = trainer.sums.tolist()
            counts = trainer.kind_sums.cpu().numpy().copy()
            accuracy = np.where(counts[:, 2] > 0, counts[:, 1] / np.maximum(counts[:, 2], 1), accuracy)
            trainer.sums.zero_()
            trainer.kind_sums.zero_()
            milliseconds = 1000 * (time.time() - last_report) / max(1, step - reported)
            say(
                f"step {step} loss {loss / steps:.4f} balance {balance / steps:.3f}",
                f"helper {helper / steps:.4f}",
                f"found {hits / max(1, marks):.4f} norm {norm / steps:.3f} ms {milliseconds:.1f}",
                f"waited {waited:.1f} |",
                " ".join(f"{kind}:{value:.3f}" for kind, value in zip(KINDS, accuracy[1:], strict=True)),
            )
            last_report, reported = time.time(), step
            if not math.isfinite(loss):
                say("not finite: back to the last report, at half the rate")
                mult *= 0.5
                for tensor, value in zip(optimizer.tensors(), good, strict=True):
                    tensor.copy_(value)
                optimizer.reset()
            else:
                good = [tensor.clone() for tensor in optimizer.tensors()]
                if done > 0.06:
                    trainer.kind_weight.copy_(torch.tensor(reweigh(accuracy)))
        if now - last_save > _SAVE_SECONDS:
            say("held out", json.dumps(trainer.validate(held_out[:2])))
            save_file(trainer.state(), out / "state.safetensors")
            last_save = time.time()
    if cuda:
        torch.cuda.synchronize()
    took = time.time() - first
    say(f"end: steps {step}, pictures {step * layout.pictures}, seconds {took:.1f}, waited {waited:.1f}")
    state = trainer.state()
    save_file(state, out / "state.safetensors")
    export.write(state, net.Size(), out / "checkpoint")
    # What ships is rounded to bf16, so that is what is measured.
    with torch.no_grad():
        for tensor in optimizer.tensors():
            tensor.copy_(tensor.bfloat16())
    result = trainer.validate(held_out)
    say("held out, rounded", json.dumps(result))
    for worker in workers:
        worker.terminate()
    score = exact_answers(out / "checkpoint", out / "answers", arguments.fonts).score
    say(
        f"exact answers to {score.count} held-out questions: {score.mean:.2%}",
        f"(gemcut eval demo --model {out / 'checkpoint'} asks the same)",
    )
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--seconds", type=float, default=560, help="from the start to the end of the training"
    )
    result.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    result.add_argument("--out", default="demo-training")
    result.add_argument(
        "--start", default=None, help="a checkpoint folder to continue from, not from nothing"
    )
    result.add_argument("--fonts", default=None, help="a folder of fonts instead of the installed packages")
    result.add_argument("--rows", default="76,120,26,4", help="rows a step: shapes, signs, pairs, text")
    result.add_argument("--workers", type=int, default=13)
    result.add_argument("--threads", type=int, default=2, help="of PyTorch on a CPU")
    result.add_argument("--validation", type=int, default=12, help="held-out batches")
    result.add_argument("--compile", type=int, default=int(torch.cuda.is_available()))
    result.add_argument("--rate", type=float, default=0.02)
    result.add_argument("--adam-rate", type=float, default=3e-3)
    result.add_argument(
        "--cooldown", type=float, default=0.7, help="share of the time over which the rate falls to 0"
    )
    result.add_argument("--seed", type=int, default=1)
    return result


if __name__ == "__main__":
    train(parser().parse_args())
