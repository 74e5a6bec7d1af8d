"""Random steps that graphs are compared with the eager run on, before any request comes.

Enters: a size, and something to run. Leaves: what it computed that counts. Rows take several slots and random
lengths, prompts and single tokens mixed, with pictures; their pages lie anywhere among the first of the
pools. Whatever must not be read is NaN: the rest of their pages, soft tokens of nobody, rows of padding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gemcut.data import POOL, ImagePatches, MediaSpan, PageRun, Row, Seat
from gemcut.plan import TextPlan
from gemcut.runner.batch import Inputs, Size
from gemcut.runner.encode import SoftTokens
from gemcut.runner.kv import KVPools
from gemcut.runner.sample import Draws

POSITIONS = 8192  # that a check's rows have at most together, or as many as two of its steps
MOST_PROMPTS = 5  # rows of a step with more than one token
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class _Scene:
    """A random step. past: page slots of the positions before it, new: of its own; soft: tokens by key."""

    seats: list[Seat]
    rows: list[Row]
    past: np.ndarray
    new: np.ndarray
    soft: dict[bytes, torch.Tensor] = field(default_factory=dict)


class RandomChecks:
    """The checks of one runner. They may be used until the first request comes, and `clean` ends them."""

    def __init__(
        self,
        text: TextPlan,
        inputs: Inputs,
        kv: KVPools,
        media: SoftTokens,
        picked: torch.Tensor,
        tokens: torch.Tensor,
        max_model_len: int,
    ) -> None:
        """picked, tokens: what the runner's forward and head write to."""
        self.text, self.inputs, self.kv, self.media = text, inputs, kv, media
        self.picked, self.tokens = picked, tokens
        self.max_len = max_model_len
        sizes = kv.sizes
        self.page_size = sizes.page_size
        most = self._pages(max(POSITIONS, 2 * inputs.max_tokens))
        self.num_pages = min(n for n in (sizes.sliding_pages, sizes.full_pages, most) if n)
        self.device = picked.device
        # one layer of each kind shows what all before it computed: the last that writes pages
        self.seen = [owners[-1].index for kind in ("sliding", "full") if (owners := text.owners(kind))]

    def forward(self, size: Size, run: Callable[[], object]) -> list[torch.Tensor]:
        """Hidden states of the rows that sample, and keys and values of the new tokens in the last layers."""
        generator = torch.Generator(self.device).manual_seed(size.tokens)
        scene = self._scene(random.Random(size.tokens), size, generator)
        self._fill_pages(scene, generator)
        self.inputs.tables.enter(scene.seats, scene.rows)
        draws = _draws(random.Random(0), scene.rows, 0)
        self.inputs.soft.fill_(NAN)
        self.inputs.last_tokens.random_(0, self.text.vocab, generator=generator)
        self.inputs.fill(scene.rows, size, scene.soft, draws)
        if size.media:
            total = sum(row.count for row in scene.rows)
            self.inputs.pretend_soft(size, slice(total, size.tokens))
        self.picked.fill_(NAN)
        run()
        outputs = [self.picked[: len(draws.slots)].clone()]
        new = torch.from_numpy(scene.new).to(self.device)
        for index in self.seen:
            for pages in (self.kv.layers[index].k_pages, self.kv.layers[index].v_pages):
                outputs.append(pages.flatten(0, 1).index_select(0, new))
        return outputs

    def head(self, count: int, max_top_k: int, run: Callable[[], object]) -> list[torch.Tensor]:
        """Tokens of `count` rows less some padding, for the host and for the next step."""
        choose = random.Random(count)
        num_rows = count - choose.randrange(count // 4 + 1)
        slots = choose.sample(range(self.inputs.tables.num_slots), num_rows)
        rows = [Row(slot, 0, 1, (0,), True) for slot in slots]
        draws = _draws(choose, rows, max_top_k)
        pages = self.inputs.tables.width
        self.inputs.fill(rows, Size(num_rows, num_rows, pages, False), {}, draws)
        generator = torch.Generator(self.device).manual_seed(count)
        self.picked.fill_(NAN)
        self.picked[:num_rows].normal_(generator=generator)
        self.tokens.fill_(-2)
        self.inputs.last_tokens.fill_(-2)
        run()
        return [self.tokens[:num_rows].clone(), self.inputs.last_tokens[slots]]

    def encode(self, count: int, run: Callable[[], object]) -> list[torch.Tensor]:
        """Soft tokens of random pictures of up to `count` patches together; those behind are random too."""
        choose, inputs = random.Random(count), self.media.inputs
        pictures, left = [], count
        while len(pictures) < choose.randint(1, 4) and left >= POOL**2:
            rows = POOL * choose.randint(1, max(1, min(20, left // POOL**2 // 4)))
            columns = POOL * choose.randint(1, min(40, left // (POOL * rows)))
            pixels = np.frombuffer(choose.randbytes(rows * columns * inputs.pixels.shape[1]), dtype=np.uint8)
            pictures.append(ImagePatches(pixels.reshape(rows * columns, -1), rows, columns, b""))
            left -= rows * columns
        inputs.pixels.random_(0, 256, generator=torch.Generator(self.device).manual_seed(count))
        inputs.soft.fill_(NAN)
        inputs.fill(pictures)
        run()
        return [inputs.soft[: sum(picture.soft_tokens for picture in pictures)].clone()]

    def clean(self) -> None:
        """Leave nothing behind that is no number."""
        for layer in {id(kv): kv for kv in self.kv.layers}.values():
            for pages in (layer.k_pages, layer.v_pages):
                pages[: self.num_pages].zero_()
        for tensor in (self.inputs.soft, self.inputs.last_tokens, self.picked, self.tokens):
            tensor.zero_()

    def _scene(self, choose: random.Random, size: Size, generator: torch.Generator) -> _Scene:
        tables = self.inputs.tables
        most_rows = min(size.rows, tables.num_slots, self.num_pages)
        if size.tokens == size.rows:
            counts = [1] * (most_rows - choose.randrange(most_rows // 4 + 1))
        else:
            tokens = size.tokens - choose.randrange(size.tokens // 8 + 1)
            counts = self._cut(choose, min(tokens, most_rows * self._longest(1)), most_rows)
        free = choose.sample(range(self.num_pages), self.num_pages)
        scene = _Scene([], [], np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        past, new = [scene.past], [scene.new]
        left = self.num_pages
        need = sum(self._pages(count) for count in counts)
        for slot, count in zip(choose.sample(range(tables.num_slots), len(counts)), counts, strict=True):
            need -= self._pages(count)
            longest = min(self.max_len, (left - need) * self.page_size)
            start = choose.randint(0, max(0, longest - count))
            if choose.random() < 0.25:
                start = 0
            pages = tuple(free.pop() for _ in range(self._pages(start + count)))
            left -= len(pages)
            where = np.repeat(np.array(pages) * self.page_size, self.page_size)
            where += np.tile(np.arange(self.page_size), len(pages))
            past.append(where[:start])
            new.append(where[start : start + count])
            spans = self._spans(choose, slot, start, count, scene, generator) if size.media else ()
            # a decode row's token is one that was sampled
            late = count == 1 and choose.random() < 0.5
            ids = None if late else tuple(choose.randrange(self.text.vocab) for _ in range(count))
            run = PageRun(0, pages)
            scene.seats.append(Seat(slot, "check", (), 0))
            scene.rows.append(Row(slot, start, count, ids, True, run, run, spans))
        return _Scene(scene.seats, scene.rows, np.concatenate(past), np.concatenate(new), scene.soft)

    def _longest(self, rows: int) -> int:
        """Tokens that each of so many rows has pages for."""
        return min(self.max_len, self.num_pages // rows * self.page_size)

    def _pages(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def _cut(self, choose: random.Random, tokens: int, most_rows: int) -> list[int]:
        """Counts of rows: a few prompts, and single tokens beside them, within the pages that there are."""
        num_prompts = choose.randint(1, min(MOST_PROMPTS, most_rows, tokens))
        num_single = min(choose.randint(0, most_rows - num_prompts), tokens - num_prompts)
        longest = self._longest(num_prompts + num_single)
        tokens = min(tokens - num_single, num_prompts * longest)
        counts = [tokens // num_prompts + (i < tokens % num_prompts) for i in range(num_prompts)]
        for i in range(num_prompts - 1):  # not all alike
            moved = choose.randint(0, min(counts[i] - 1, longest - counts[i + 1]))
            counts[i], counts[i + 1] = counts[i] - moved, counts[i + 1] + moved
        counts += [1] * num_single
        choose.shuffle(counts)
        return [count for count in counts if count]

    def _spans(
        self,
        choose: random.Random,
        slot: int,
        start: int,
        count: int,
        scene: _Scene,
        generator: torch.Generator,
    ) -> tuple[MediaSpan, ...]:
        """Pictures in a chunk, some side by side."""
        spans, at = [], start + choose.randint(0, 4)
        while at + 2 < start + count and len(spans) < 3:
            stop = at + choose.randint(2, min(280, start + count - at))
            key = f"{slot}/{at}".encode()
            scene.soft[key] = torch.empty_like(self.inputs.soft[: stop - at]).normal_(generator=generator)
            spans.append(MediaSpan("image", key, at, stop))
            at = stop + choose.choice((0, 1, 40))
        return tuple(spans)

    def _fill_pages(self, scene: _Scene, generator: torch.Generator) -> None:
        past = torch.from_numpy(scene.past).to(self.device)
        for layer in {id(kv): kv for kv in self.kv.layers}.values():
            for pages in (layer.k_pages, layer.v_pages):
                pages[: self.num_pages].fill_(NAN)
                shape = len(past), *pages.shape[2:]
                values = torch.randn(shape, generator=generator, device=self.device, dtype=pages.dtype)
                pages.flatten(0, 1).index_copy_(0, past, values)


def _draws(choose: random.Random, rows: Sequence[Row], max_top_k: int) -> Draws:
    """All rows sample, each in its own way; some are greedy, all are with max_top_k 0."""
    count = len(rows)

    def column(low: float, high: float) -> np.ndarray:
        return np.array([choose.uniform(low, high) for _ in range(count)])

    warm = np.array([max_top_k > 0 and choose.random() < 0.75 for _ in range(count)])
    return Draws(
        rows=np.arange(count),
        slots=[row.slot for row in rows],
        indices=[0] * count,
        columns={
            "temperature": np.where(warm, column(0.5, 1.5), 0.0),
            "top_p": column(0.5, 1.0),
            "min_p": column(0.0, 0.05),
            "top_k": np.array([choose.randint(1, max(1, max_top_k)) for _ in range(count)]),
            "uniform": column(0.0, 1.0),
        },
        max_top_k=max_top_k,
        plain=True,
    )
