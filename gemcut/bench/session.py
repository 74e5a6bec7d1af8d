"""One run of `gemcut bench`: engines on one set of weights, the ceilings of their device, records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.bench import batch, decode, memory, prefill, profile, vision
from gemcut.bench.against import PEER_SUBJECTS, Peer, PeerName, divide, start_peer
from gemcut.bench.contender import Contender, Setup, release
from gemcut.bench.profile import Kind
from gemcut.bench.records import Record, Table, device_name
from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import measure_ceilings
from gemcut.bench.transformers_peer import LARGEST_BATCH
from gemcut.runner.start import choose_device, choose_dtype

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
    """`tell` is given lines for whoever waits. against: another engine; `pictures`, whether it is asked about
    any. It is there from the beginning if both fit on the device, and takes our place in `change_sides`
    otherwise.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        command: str,
        records: Path | None,
        tell: Callable[[str], None],
        against: PeerName | None = None,
        pictures: bool = False,
    ) -> None:
        self.setup, self.command, self.records, self.tell = setup, command, records, tell
        self.against: PeerName | None = against
        self.pictures = pictures
        self.device, _ = choose_device(setup.config.device)
        files = setup.files()
        # before the engine takes the memory that a fair copy needs
        self.ceilings = measure_ceilings(self.device)
        tell(f"{device_name(self.device)}: {self.ceilings}")
        self.peer: Peer | None = None
        self.experts: dict[int, float | None] = {}  # by batch, as far as they were counted
        self.dtype, _ = choose_dtype(setup.config.dtype, files.dtype, self.device)
        self.image_tokens = files.image_tokens
        share = None if against is None else divide(setup, self.device, self.dtype)
        self.contenders = setup.start(None if share is None else share.kv_bytes)
        self.roofline = Roofline(files.plan, self.ceilings, self.dtype.itemsize)
        for contender in self.contenders:
            used = contender.used
            tell(
                f"{contender.name}: {used.kernels} kernels, {used.numerics} numerics, graphs {used.graphs}, "
                f"started in {used.load_s:.1f} s"
            )
            for what, why in used.switched_off:
                tell(f"{contender.name}: without {what}: {why}")
        if against is not None and share is not None:
            self.peer = start_peer(against, setup, self.device, self.dtype, share=share, pictures=pictures)

    @property
    def together(self) -> bool:
        """Whether the other engine is measured by turns with ours."""
        return self.peer is not None and bool(self.contenders)

    def change_sides(self) -> None:
        """Give our engines up for the other one, which has the device for itself."""
        assert self.against is not None, "there is another engine to come"
        release(self.contenders)
        self.peer = start_peer(
            self.against, self.setup, self.device, self.dtype, share=None, pictures=self.pictures
        )

    def close(self) -> None:
        """End the other engine; ours end with the process."""
        if self.peer is not None:
            self.peer.close()

    def sides(self, subject: str) -> list[Contender]:
        """Who is measured by a subject."""
        sides: list[Contender] = [*self.contenders]
        if self.peer is not None and subject in PEER_SUBJECTS:
            sides.append(self.peer)
        return sides

    def run(self, subject: str, sizes: Sizes) -> tuple[Record, list[Table]]:
        """Measure one of `SUBJECTS`, write its record, and return it with its tables."""
        notes: list[str] = []

        def note(text: str) -> None:
            notes.append(text)
            self.tell(text)

        sides = self.sides(subject)
        results = SUBJECTS[subject](self, sizes, note)
        with_peer = self.peer is not None and self.peer in sides
        if with_peer:
            note(self._terms(subject))
        record = Record.of(
            subject,
            self.device,
            self.ceilings,
            results,
            command=self.command,
            facts=self.setup.facts() | {"engines": {side.name: side.facts() for side in sides}},
            notes=notes,
            peer=self.peer.name if self.peer is not None and with_peer else "",
        )
        if self.records is not None:
            self.tell(f"written to {record.write(self.records)}")
        return record, tables(record)

    def _terms(self, subject: str) -> str:
        """What to know of a comparison with the other engine."""
        assert self.peer is not None, "there is another engine"
        terms = [
            f"{self.peer.name} by turns with gemcut, on one device"
            if self.together
            else f"{self.peer.name} alone on the device: both do not fit, gemcut was measured before it"
        ]
        if self.peer.name != "transformers":
            terms.append("random values of its own, so the experts of its steps are not the counted ones")
            if subject == "vision":
                terms.append("it prepares the picture in the time measured, gemcut's comes prepared")
        elif subject == "vision":
            terms.append("pictures come prepared to both, and lie on the device for transformers")
        elif subject == "batch":
            terms.append(f"its batches, of at most {LARGEST_BATCH} prompts, run one after another")
        return "; ".join(terms)

    def prefill(self, sizes: Sizes, note: Callable[[str], None]) -> list[Any]:
        sides = self.sides("prefill")
        most = min(side.longest for side in sides) - 1
        tokens = _fitting(sizes.tokens, prefill.TOKENS, most, "tokens", note)
        compares = len(self.contenders) > 1
        return prefill.measure(sides, self.roofline, tokens, sizes.prefill_rounds, launches=compares)

    def decode(self, sizes: Sizes, note: Callable[[str], None]) -> list[Any]:
        patient = self.peer is None or self.peer.name != "transformers"
        most = self.setup.config.max_num_seqs if patient else LARGEST_BATCH
        batches = _fitting(sizes.batches, decode.BATCHES, most, "sequences", note)
        rows = decode.measure(
            self.sides("decode"),
            self.roofline,
            batches,
            sizes.decode_rounds if patient else 1,
            note=note,
            cached=sizes.cached,
            new_tokens=sizes.new_tokens,
            experts=self.experts,
        )
        self.experts |= {row.batch: row.experts for row in rows}
        return rows

    def vision(self, sizes: Sizes, _: Callable[[str], None]) -> list[Any]:
        sides, soft = self.sides("vision"), self.image_tokens
        return vision.measure(sides, self.roofline, sizes.pictures, sizes.vision_rounds, soft)

    def batch(self, sizes: Sizes, note: Callable[[str], None]) -> list[Any]:
        return batch.measure(
            self.sides("batch"),
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
