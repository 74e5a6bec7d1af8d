"""JSON schemas to test with, made from a seed. Small enough that a random walk completes most of them.

`schema(seed)` mixes nested objects and arrays, $ref (also recursive), anyOf, allOf, enum, const, patterns,
formats and bounds; `features` says which a schema has.
"""

from __future__ import annotations

import json
import random
from typing import Any

NAMES = ("id", "name", "kind", "size", "colour", "tags", "a", "b", "left", "right", "näme", 'qu"ote')
PATTERNS = (
    "^[a-f0-9]{2,4}$",
    "^(red|green|blue)$",
    "^[A-Z][a-z]{0,5}$",
    r"^\d{1,3}-\d{2}$",
    "^x?y+z$",
    "[0-9]",
)
FORMATS = ("date", "ipv4", "time")


def schema(seed: int) -> dict[str, Any]:
    """An object schema; the same for the same seed."""
    dice = random.Random(seed)
    made = _object(dice, 0)
    made["$defs"] = {
        "point": {
            "type": "object",
            "properties": {"x": _leaf(dice), "y": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
        "tree": {
            "type": "object",
            "properties": {
                "value": {"enum": [1, "two", None]},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        },
        "word": {"type": "string", "pattern": dice.choice(PATTERNS[:-1])},
    }
    return made


def features(made: dict[str, Any]) -> set[str]:
    """Which of $ref, anyOf, allOf, pattern and nesting a schema has outside its definitions."""
    text = json.dumps({key: value for key, value in made.items() if key != "$defs"})
    found = {word for word in ("$ref", "anyOf", "allOf", "pattern", "enum", "format") if f'"{word}"' in text}
    return found | ({"nesting"} if text.count('"properties"') > 1 or '"items"' in text else set())


def _object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(NAMES, dice.randint(1, 4 - depth))
    return {
        "type": "object",
        "properties": {name: _value(dice, depth + 1) for name in names},
        "required": names[: dice.randint(1, len(names))],
        "additionalProperties": False,
    }


def _value(dice: random.Random, depth: int) -> dict[str, Any]:
    if depth > 2 or dice.random() < 0.35:
        return _leaf(dice)
    kind = dice.randrange(6)
    if kind == 0:
        return _object(dice, depth)
    if kind == 1:
        return {
            "type": "array",
            "items": _value(dice, depth + 1),
            "minItems": dice.randint(0, 1),
            "maxItems": 2,
        }
    if kind == 2:
        return {"anyOf": [_value(dice, depth + 1), _leaf(dice), {"type": "boolean"}]}
    if kind == 3:
        return {"allOf": [{"type": "integer", "minimum": dice.randint(-9, 0)}, {"maximum": 50}]}
    if kind == 4:
        return {
            "type": "array",
            "prefixItems": [_leaf(dice), {"const": dice.choice([True, 0, "end", [1]])}],
            "items": False,
            "minItems": 2,
        }
    return {"$ref": f"#/$defs/{dice.choice(['point', 'tree', 'word'])}"}


def _leaf(dice: random.Random) -> dict[str, Any]:
    return dice.choice(
        [
            {"type": "string", "maxLength": dice.randint(0, 6)},
            {"type": "string", "pattern": dice.choice(PATTERNS[:-1])},
            {"type": "string", "format": dice.choice(FORMATS)},
            {"type": "integer", "minimum": dice.randint(-20, 0), "maximum": dice.randint(1, 2000)},
            {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["red", "green", "b\\lue", 3.5, None]},
            {"const": "fixed"},
            {"type": ["integer", "null"], "minimum": 5, "maximum": 15},
        ]
    )
