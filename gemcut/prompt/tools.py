"""Tool declarations and values in Gemma 4's own syntax (spec 6.3).

Enters: JSON-like Python values and function schemas. Leaves: segments, through a `SegmentWriter`.
It must not know about turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gemcut.errors import InvalidRequest
from gemcut.prompt.writer import SegmentWriter

MAX_DEPTH = 64  # nested values and schemas; far beyond real ones, far below Python's recursion limit
SCHEMA_KEYS = frozenset({"description", "type", "properties", "required", "nullable"})


def by_key(mapping: Mapping[str, Any], at: str) -> list[tuple[str, Any]]:
    """Items sorted by lower-cased key; equal keys keep their order, as Jinja's dictsort does."""
    for key in mapping:
        if not isinstance(key, str):
            raise InvalidRequest(f"{at} has the key {key!r}. Keys must be strings.", at)
    return sorted(mapping.items(), key=lambda item: item[0].lower())


def write_value(out: SegmentWriter, value: Any, at: str, *, quote_keys: bool = False, depth: int = 0) -> None:
    """Write one JSON value. Calls and responses leave keys bare, declarations quote them."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{at} is nested more than {MAX_DEPTH} levels deep. Flatten it.", at)
    if isinstance(value, str):
        out.quoted(value)
    elif value is None:
        out.text("null")
    elif isinstance(value, bool):
        out.text("true" if value else "false")
    elif isinstance(value, int | float):
        out.text(_number(value, at))
    elif isinstance(value, Mapping):
        out.text("{")
        write_members(out, value, at, quote_keys=quote_keys, depth=depth + 1)
        out.text("}")
    elif _is_list(value):
        out.text("[")
        for i, item in enumerate(value):
            out.text("," if i else "")
            write_value(out, item, at, quote_keys=quote_keys, depth=depth + 1)
        out.text("]")
    else:
        raise InvalidRequest(f"{at} holds a {type(value).__name__}. Only JSON values can be rendered.", at)


def write_members(
    out: SegmentWriter, mapping: Mapping[str, Any], at: str, *, quote_keys: bool = False, depth: int = 0
) -> None:
    """Write `key:value,key:value` without the braces around."""
    for i, (key, value) in enumerate(by_key(mapping, at)):
        out.text("," if i else "")
        if quote_keys:
            out.quoted(key)
        else:
            out.text(key)
        out.text(":")
        write_value(out, value, at, quote_keys=quote_keys, depth=depth)


def write_declaration(out: SegmentWriter, tool: Any, at: str) -> None:
    """Write one `<|tool>declaration:NAME{...}<tool|>`.

    Schemas without a `type` leave their brace open, and a list of types prints as Python prints it:
    the official template does so, and the model sees the same prompt from every engine.
    """
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequest(f'{at} must be {{"type": "function", "function": {{...}}}}.', at)
    at = f"{at}.function"
    out.control("<|tool>")
    out.text(f"declaration:{function_name(function, at)}{{description:")
    out.quoted(_description(function, at))
    parameters = _mapping_or_none(function, "parameters", at)
    if parameters:
        out.text(",parameters:{")
        _write_parameters(out, parameters, f"{at}.parameters")
    if "response" in function:
        response = _mapping_or_none(function, "response", at) or {}
        out.text(",response:{")
        if description := _description(response, f"{at}.response"):
            out.text("description:")
            out.quoted(description)
            out.text(",")
        if _type_name(response, f"{at}.response") == "OBJECT":
            out.text("type:")
            out.quoted("OBJECT")
            out.text("}")
    out.text("}")
    out.control("<tool|>")


def function_name(function: Mapping[str, Any], at: str) -> str:
    """The function's name, which must be a string with something in it."""
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{at}.name must be a non-empty string, got {name!r}.", f"{at}.name")
    return name


def _write_parameters(out: SegmentWriter, parameters: Mapping[str, Any], at: str) -> None:
    if properties := _mapping_or_none(parameters, "properties", at):
        out.text("properties:{")
        _write_properties(out, properties, f"{at}.properties", depth=0)
        out.text("},")
    if parameters.get("required"):
        out.text("required:")
        _write_required(out, parameters["required"], at)
        out.text(",")
    if parameters.get("type"):
        out.text("type:")
        out.quoted(_type_name(parameters, at))
        out.text("}")


def _write_properties(
    out: SegmentWriter, properties: Mapping[str, Any], at: str, depth: int, skip: frozenset[str] = frozenset()
) -> None:
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{at} is nested more than {MAX_DEPTH} levels deep. Flatten it.", at)
    first = True
    for name, schema in by_key(properties, at):
        if name in skip:
            continue
        out.text(f"{name}:{{" if first else f",{name}:{{")
        first = False
        # `true` and `false` are JSON schemas too; like other non-objects they say nothing here
        _write_schema(out, schema if isinstance(schema, Mapping) else {}, f"{at}.{name}", depth)
        out.text("}")


def _write_schema(out: SegmentWriter, schema: Mapping[str, Any], at: str, depth: int) -> None:
    """description, what the kind adds, nullable, and the type last."""
    kind = _type_name(schema, at)
    if description := _description(schema, at):
        out.text("description:")
        out.quoted(description)
        out.text(",")
    if kind == "STRING" and schema.get("enum"):
        out.text("enum:")
        write_value(out, schema["enum"], f"{at}.enum", quote_keys=True)
        out.text(",")
    items = schema.get("items")
    if kind == "ARRAY" and isinstance(items, Mapping) and items:
        out.text("items:{")
        _write_items(out, items, f"{at}.items", depth)
        out.text("},")
    if schema.get("nullable"):
        out.text("nullable:true,")
    if kind == "OBJECT":
        out.text("properties:{")
        inner = schema.get("properties")
        if isinstance(inner, Mapping):
            _write_properties(out, inner, f"{at}.properties", depth + 1)
        else:  # the template then lists the remaining keys as if they were properties
            _write_properties(out, schema, at, depth + 1, skip=SCHEMA_KEYS)
        out.text("},")
        if schema.get("required"):
            out.text("required:")
            _write_required(out, schema["required"], at)
            out.text(",")
    out.text("type:")
    out.quoted(kind)


def _write_items(out: SegmentWriter, items: Mapping[str, Any], at: str, depth: int) -> None:
    first = True
    for key, value in by_key(items, at):
        if value is None:
            continue
        out.text(f"{key}:" if first else f",{key}:")
        first = False
        if key == "properties":
            out.text("{")
            if isinstance(value, Mapping):
                _write_properties(out, value, f"{at}.properties", depth + 1)
            out.text("}")
        elif key == "required":
            _write_required(out, value, at)
        elif key == "type":
            _check_type(value, at)
            write_value(out, value.upper() if isinstance(value, str) else [t.upper() for t in value], at)
        else:
            write_value(out, value, f"{at}.{key}", quote_keys=True)


def _write_required(out: SegmentWriter, names: Any, at: str) -> None:
    if not _is_list(names) or not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"{at}.required must be a list of property names.", f"{at}.required")
    write_value(out, names, at)


def _description(schema: Mapping[str, Any], at: str) -> str:
    text = schema.get("description")
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InvalidRequest(f"{at}.description must be a string, got {type(text).__name__}.", at)
    return text


def _type_name(schema: Mapping[str, Any], at: str) -> str:
    kind = schema.get("type")
    if kind is None:
        return ""
    _check_type(kind, at)
    return kind.upper() if isinstance(kind, str) else str(list(kind)).upper()


def _check_type(kind: Any, at: str) -> None:
    if not isinstance(kind, str) and not (_is_list(kind) and all(isinstance(k, str) for k in kind)):
        raise InvalidRequest(f"{at}.type must be a string or a list of strings.", f"{at}.type")


def _mapping_or_none(holder: Mapping[str, Any], key: str, at: str) -> Mapping[str, Any] | None:
    value = holder.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise InvalidRequest(f"{at}.{key} must be an object, got {type(value).__name__}.", f"{at}.{key}")
    return value


def _number(value: int | float, at: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"{at} holds {value}, which is no JSON number.", at)
    try:
        return repr(value)
    except ValueError as error:  # Python refuses to print integers of more than 4,300 digits
        raise InvalidRequest(f"{at} holds an integer that is too long to print.", at) from error


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
