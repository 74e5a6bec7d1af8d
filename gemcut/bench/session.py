"""One run of `gemcut bench`: engines on one set of weights, the ceilings of their device, records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.bench import batch, decode, memory, prefill, profile, vision
from gemcut.bench.against import Transformers
from gemcut.bench.contender import Gemcut, Setup, release
from gemcut.bench.profile import Kind
from gemcut.bench.records import Record, Table, device_name
from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import measure_ceilings
from gemcut.runner.start import choose_device

AGAINST = ("prefill", "decode")  # subjects that a peer can be measured by
PEER_BATCH = 32  # its largest by default: a step takes a tenth of a second, and padded KV much memory
PREFILLS, DECODES = (256, 8192), (1, 64)  # steps that are profiled


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What to measure and how often. tokens and batches: None for those of the default that fit."""

    tokens: Sequence[int] | None = None
    batches: Sequence[int] | None = None
    pictures: Sequence[int] = vision.PICTURES
    profiled: Sequence[tuple[Kind, int]] | None = None
    cached: int = decode.CACHED
    new_tokens: int = decode.NEW
    requests: int = batch.REQUESTS
    prefill_rounds: int = 10
    decode_rounds: int = 3
    batch_rounds: int = 1
    vision_rounds: int = 10


class Session:
    """`tell` is given lines for whoever waits. peer: the other side, once it has taken the engines' place."""

    def __init__(
        self, setup: Setup, *, command: str, records: Path | None, tell: Callable[[str], None]
    ) -> None:
        self.setup, self.command, self.records, self.tell = setup, command, records, tell
        self.device, _ = choose_device(setup.config.device)
        # before the engine takes the memory that a fair copy needs
        self.ceilings = measure_ceilings(self.device)
        tell(f"{device_name(self.device)}: {self.ceilings}")
        self.peer: Transformers | None = None
        self.experts: dict[int, float | None] = {}  # by batch, as far as they were counted
        self.contenders = setup.start()
        self.dtype = self.contenders[0].dtype
        first = self.contenders[0]
        self.roofline = Roofline(first.plan, self.ceilings, first.dtype.itemsize)
        for contender in self.contenders:
            used = contender.used
            tell(
                f"{contender.name}: {used.kernels} kernels, {used.numerics} numerics, graphs {used.graphs}, "
                f"started in {used.load_s:.1f} s"
            )
            for what, why in used.switched_off:
                tell(f"{contender.name}: without {what}: {why}")

    def change_sides(self) -> None:
        """Give the engines up for transformers: both do not fit on one device at full size."""
        release(self.contenders)
        self.peer = Transformers(self.setup, self.device, self.dtype)
        self.tell("transformers, after gemcut, on the same device and the same weights")

    @property
    def sides(self) -> Sequence[Gemcut | Transformers]:
        return self.contenders if self.peer is None else [self.peer]

    def run(self, subject: str, sizes: Sizes) -> tuple[Record, list[Table]]:
        """Measure one of `SUBJECTS`, write its record, and return it with its tables."""
        notes: list[str] = []

        def note(text: str) -> None:
            notes.append(text)
            self.tell(text)

        results = SUBJECTS[subject](self, sizes, note)
        record = Record.of(
            subject,
            self.device,
            self.ceilings,
            results,
            command=self.command,
            facts=self.setup.facts() | {"engines": {side.name: side.facts() for side in self.sides}},
            notes=notes,
            peer="" if self.peer is None else self.peer.name,
        )
        if self.records is not None:
            self.tell(f"written to {record.write(self.records)}")
        return record, tables(record)

    def prefill(self, sizes: Sizes, note: Callable[[str], None]) -> list[Any]:
        most = min(side.longest for side in self.sides) - 1
        tokens = _fitting(sizes.tokens, prefill.TOKENS, most, "tokens", note)
        compares = len(self.sides) > 1
        return prefill.measure(self.sides, self.roofline, tokens, sizes.prefill_rounds, launches=compares)

    def decode(self, sizes: Sizes, note: Callable[[str], None]) -> list[Any]:
        most = self.setup.config.max_num_seqs if self.peer is None else PEER_BATCH
        batches = _fitting(sizes.batches, decode.BATCHES, most, "sequences", note)
        rows = decode.measure(
            self.sides,
            self.roofline,
            batches,
            sizes.decode_rounds if self.peer is None else 1,
            note=note,
            cached=sizes.cached,
            new_tokens=sizes.new_tokens,
            experts=self.experts,
        )
        self.experts |= {row.batch: row.experts for row in rows}
        return rows

    def vision(self, sizes: Sizes, _: Callable[[str], None]) -> list[Any]:
        return vision.measure(self.contenders, self.roofline, sizes.pictures, sizes.vision_rounds)

    def batch(self, sizes: Sizes, note: Callable[[str], None]) -> list[Any]:
        return batch.measure(
            self.contenders,
            self.roofline,
            sizes.batch_rounds,
            note=note,
            requests=sizes.requests,
            prompt=sizes.cached,
            answer=sizes.new_tokens,
        )

    def memory(self, _sizes: Sizes, _: Callable[[str], None]) -> list[Any]:
        return memory.measure(self.contenders)

    def profile(self, sizes: Sizes, note: Callable[[str], None]) -> list[Any]:
        longest, most = self.contenders[0].longest - 1, self.setup.config.max_num_seqs
        wanted: Sequence[tuple[Kind, int]] = sizes.profiled or [
            *(("prefill", tokens) for tokens in _fitting(None, PREFILLS, longest, "tokens", note)),
            *(("decode", batch) for batch in _fitting(None, DECODES, most, "sequences", note)),
        ]
        return profile.measure(self.contenders, self.roofline, wanted)


# in the order of `all`: the profiler slows what comes after it
SUBJECTS: dict[str, Callable[[Session, Sizes, Callable[[str], None]], list[Any]]] = {
    "prefill": Session.prefill,
    "decode": Session.decode,
    "vision": Session.vision,
    "batch": Session.batch,
    "memory": Session.memory,
    "profile": Session.profile,
}


def _fitting(
    asked: Sequence[int] | None, default: Sequence[int], most: int, unit: str, note: Callable[[str], None]
) -> Sequence[int]:
    """What was asked for, whatever it is; otherwise the part of the default that the engine holds."""
    if asked is not None:
        return asked
    if left_out := [f"{size:,}" for size in default if size > most]:
        note(f"left out: {', '.join(left_out)} {unit}; the engine holds {most:,}")
    return [size for size in default if size <= most]


def tables(record: Record) -> list[Table]:
    """What is shown of a record."""
    if record.subject == "profile":
        return profile.tables(record.results)
    one = {
        "prefill": prefill.table,
        "decode": decode.table,
        "vision": vision.table,
        "batch": batch.table,
        "memory": memory.table,
    }
    return [one[record.subject](record.results)]
