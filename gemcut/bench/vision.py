"""Pictures: the tower with its projector, and the time to the first token of a prompt with a picture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcut.bench.contender import Contender, Gemcut, by_turns, picture_prompt, random_picture
from gemcut.bench.records import Table, ms, percent
from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import Times
from gemcut.bench.transformers_peer import Transformers
from gemcut.data import POOL, EncodeItem, ImagePatches, Step
from gemcut.errors import ConfigError

PICTURES = (1, 4)
TEXT_TOKENS = 64
WARM_UPS = 2
DEVICE_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds. what: "encode", pictures to soft tokens; or "first token", of a prompt of a picture and
    64 tokens of text. device: on the GPU when it need not wait for the host. share: floor / wall."""

    what: str
    pictures: int
    soft_tokens: int
    engine: str
    floor: float
    wall: Times
    device: Times | None
    share: float


def measure(
    contenders: Sequence[Contender], roofline: Roofline, pictures: Sequence[int], rounds: int, soft: int
) -> list[Row]:
    """Every call has a picture that its engine has not seen: engines keep what they encoded.

    soft: tokens of a picture. Of vLLM and SGLang the first token alone is measured: their towers are not to
    be had by themselves. They prepare pictures in that time; ours, and transformers', come prepared.
    """
    if roofline.plan.vision is None:
        raise ConfigError("This model has no vision tower: it takes text only.")
    with_tower = [contender for contender in contenders if isinstance(contender, Gemcut | Transformers)]
    rows = []
    for count in pictures if with_tower else ():

        def encode(contender: Gemcut | Transformers, number: int, count: int = count) -> float:
            if isinstance(contender, Gemcut):
                return encode_new(contender, count, number)
            return contender.encode_ms(_pictures(count, soft, number))

        by_turns(with_tower, WARM_UPS, encode)
        walls = by_turns(with_tower, rounds, encode)
        floor = roofline.tower_ms(count, soft * POOL * POOL)
        for contender in with_tower:
            spans = _encode_on_device(contender, count, soft) if isinstance(contender, Gemcut) else []
            rows.append(_row("encode", count, soft, contender, floor, walls, spans))

    def first_token(contender: Contender, number: int) -> float:
        prompt = picture_prompt(roofline.plan, [random_picture(soft, number)], TEXT_TOKENS, number)
        return contender.generate([prompt], 1).wall_s * 1e3

    by_turns(contenders, WARM_UPS, lambda contender, number: first_token(contender, rounds + number))
    walls = by_turns(contenders, rounds, first_token)
    floor = roofline.tower_ms(1, soft * POOL * POOL) + roofline.prefill_ms(soft + 2 + TEXT_TOKENS)
    for contender in contenders:
        spans: list[float] = []
        if isinstance(contender, Gemcut):
            with contender.timed_on_device() as spans:
                for number in range(DEVICE_ROUNDS):
                    first_token(contender, rounds + WARM_UPS + number)
        rows.append(_row("first token", 1, soft, contender, floor, walls, spans))
    return rows


def _row(
    what: str,
    pictures: int,
    soft: int,
    contender: Contender,
    floor: float,
    walls: Mapping[str, Sequence[float]],
    device: Sequence[float],
) -> Row:
    wall = Times.of(walls[contender.name])
    on_device = Times.of(device) if device else None
    return Row(what, pictures, soft, contender.name, floor, wall, on_device, floor / wall.median)


def encode_new(contender: Gemcut, count: int, number: int) -> float:
    """Milliseconds for pictures that nobody has seen: tower and projector, to the end on the device."""
    items = _items(count, contender.files.image_tokens, number)
    began = time.perf_counter()
    _encode(contender, items)
    contender.synchronize()
    spent = time.perf_counter() - began
    _forget(contender, items)
    return spent * 1e3


def _pictures(count: int, soft: int, number: int) -> list[ImagePatches]:
    return [random_picture(soft, number * count + i) for i in range(count)]


def _items(count: int, soft: int, number: int) -> list[EncodeItem]:
    return [EncodeItem("image", picture.digest, picture) for picture in _pictures(count, soft, number)]


def _encode(contender: Gemcut, items: Sequence[EncodeItem]) -> None:
    """Launch a step that does nothing else."""
    contender.runner.launch(Step(0, rows=(), encode=tuple(items)))


def _forget(contender: Gemcut, items: Sequence[EncodeItem]) -> None:
    """Collect that step, and give the soft tokens up."""
    contender.runner.collect()
    contender.runner.launch(Step(0, rows=(), free_media=tuple(item.key for item in items)))
    contender.runner.collect()


def _encode_on_device(contender: Gemcut, count: int, soft: int) -> list[float]:
    if contender.device.type != "cuda":
        return []
    spent = []
    for number in range(DEVICE_ROUNDS):
        items = _items(count, soft, number)
        spent.append(contender.device_ms(lambda items=items: _encode(contender, items)))
        _forget(contender, items)
    return spent


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    header = (
        "what",
        "pictures",
        "engine",
        "floor ms",
        "wall ms",
        "p20",
        "p80",
        "device ms",
        "of the roofline",
    )
    rows = [
        (
            r["what"],
            f"{r['pictures']} x {r['soft_tokens']}",
            r["engine"],
            ms(r["floor"]),
            *(ms(r["wall"][key]) for key in ("median", "p20", "p80")),
            ms(r["device"] and r["device"]["median"]),
            percent(r["share"]),
        )
        for r in results
    ]
    return Table(f"Pictures; the first token with {TEXT_TOKENS} tokens of text", header, rows)
