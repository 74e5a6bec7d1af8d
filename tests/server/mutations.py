"""Requests with something wrong in them."""

from __future__ import annotations

import random
from typing import Any

VALUES = [
    None,
    True,
    -1,
    0,
    1e300,
    10**40,
    "",
    "x",
    [],
    {},
    [[]],
    [None],
    {"": None},
    "\x00",
    "é" * 100,
    "<|turn>",
]


def mutated(value: Any, rng: random.Random) -> Any:
    """The same with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return {**value, f"{key}x": value[key]}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [mutated(item, rng) if i == at else item for i, item in enumerate(value)]
    return rng.choice(VALUES)


def spoiled(body: bytes, rng: random.Random) -> bytes:
    """The same with bytes changed, cut out or doubled."""
    out = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out))
        kind = rng.randrange(3)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randint(1, 20)]
        else:
            out[at:at] = out[at : at + rng.randint(1, 20)]
    return bytes(out)
