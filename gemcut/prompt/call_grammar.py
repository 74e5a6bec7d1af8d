"""Tools -> a grammar that admits calls of them and nothing else, in Gemma 4's call syntax (spec 6.3).

Enters: names and JSON schemas. Leaves: Lark text for `StructuredOutputs.grammar`, in which control tokens
stand by their ids. What it admits is written as the template writes calls: no spaces, keys in the order of
their lower case.

The arguments of an admitted call satisfy their schema. Keywords that a grammar cannot enforce are refused by
name; annotations (`format` is one) and keywords that JSON Schema does not know say nothing here. Where a
schema leaves names of members open beside declared ones, only the declared ones are admitted, unless
`additionalProperties` asks for more. One thing no grammar can see: a model may give a free name twice, and
that call is then reported as malformed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from gemcut.data import Text
from gemcut.errors import InvalidRequest
from gemcut.prompt.grammar import WHITESPACE
from gemcut.prompt.tools import MAX_DEPTH, by_key, write_value
from gemcut.prompt.writer import QUOTE, SegmentWriter

TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")
# assertions of JSON Schema that no rule here stands for
UNENFORCED = (
    *("not", "if", "then", "else", "patternProperties", "propertyNames", "minProperties", "maxProperties"),
    *("dependentRequired", "dependentSchemas", "dependencies", "contains", "minContains", "maxContains"),
    *("uniqueItems", "unevaluatedProperties", "unevaluatedItems", "additionalItems", "$dynamicRef"),
)
_OF_OBJECTS = ("properties", "required", "additionalProperties")
_OF_ARRAYS = ("items", "prefixItems", "minItems", "maxItems")
_OF_STRINGS = ("pattern", "minLength", "maxLength")
_OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COMBINING = ("anyOf", "oneOf")
# what cannot stand beside `enum`, `$ref` or a choice: one rule stands for each of these
_ALONE = ("const", "enum", "$ref", *_COMBINING, *_OF_OBJECTS, *_OF_ARRAYS, *_OF_STRINGS, *_OF_NUMBERS)

# Every number is finite, and none is so long that a model could go on with it to the end of its budget.
LARGEST = 10**18
NEXT = 1e-9  # from an exclusive bound to the nearest number admitted, relative to it above 1
# a bare key: the reader of calls ends it at a colon, comma or brace, and strips spaces (prompt/calls.py)
KEY_LETTER = r"[^\s\x00-\x1f:,{}\[\]]"
_TERMINALS = rf"""
INTEGER: /-?(0|[1-9][0-9]{{0,17}})/
NUMBER: /-?(0|[1-9][0-9]{{0,17}})(\.[0-9]{{1,17}})?([eE][+-]?[0-9]{{1,2}})?/
TEXT: /(?s:.+)/
KEY: /{KEY_LETTER}([^\x00-\x1f:,{{}}\[\]]{{0,126}}{KEY_LETTER})?/
"""


class CalledTool(NamedTuple):
    """A tool that may be called. parameters: None for no arguments. at: where they stand in the request."""

    name: str
    parameters: Mapping[str, Any] | None
    at: str


def call_grammar(
    tools: Sequence[CalledTool],
    control_id: Callable[[str], int],
    *,
    otherwise: Mapping[str, Any] | Literal["text"] | None = None,
) -> str:
    """Lark text of one call or several of these tools, with `<|tool_response>` to end them.

    otherwise: what the model may write if it does not call: JSON of a schema, or text, which may also precede
    the calls. None: nothing. Raises InvalidRequest naming the keyword or name that cannot be honoured.
    """
    rules = _Rules(control_id)
    calls = [rules.call(tool) for tool in tools]
    opening, closing, end = map(rules.control, ("<|tool_call>", "<tool_call|>", "<|tool_response>"))
    if otherwise is None:
        start = [f"start: call+ {end}"]
    elif otherwise == "text":
        start = [f"start: TEXT? call+ {end} | TEXT"]
    else:
        options = {"lenient": False, "whitespace_pattern": WHITESPACE}
        schema = json.dumps({**otherwise, "x-guidance": options}, ensure_ascii=False)
        start = [f"start: call+ {end} | json", f"json: %json {schema}"]
    start.append(f"call: {opening} ({' | '.join(calls)}) {closing}")
    return "\n".join([*start, *rules.lines, _TERMINALS])


class _Rules:
    """Collects the rules of one grammar. Methods return an expression for their place in another rule."""

    def __init__(self, control_id: Callable[[str], int]) -> None:
        self.lines: list[str] = []
        self._control_id = control_id
        self._root: Mapping[str, Any] = {}  # of the tool at hand: what `$ref` refers to
        self._references: dict[tuple[str, str], str] = {}
        self._quote = self.control(QUOTE)
        self._any = ""

    def control(self, token: str) -> str:
        return f"<[{self._control_id(token)}]>"

    def call(self, tool: CalledTool) -> str:
        if "{" in tool.name or tool.name != tool.name.strip():
            raise InvalidRequest(
                f"A call of {tool.name[:80]!r} cannot be forced: its name holds a brace or ends in a space.",
                tool.at,
            )
        self._root = {"properties": {}} if tool.parameters is None else tool.parameters
        self._references = {}
        arguments = self._value(_typed(self._root, "object", tool.at), tool.at, 0)
        return f"{_literal(f'call:{tool.name}')} {arguments}"

    def _rule(self, body: str) -> str:
        """A rule of its own."""
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    # ---- one schema

    def _value(self, schema: Any, at: str, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{at} is nested more than {MAX_DEPTH} levels deep. Flatten it.", at)
        if schema is True:
            return self._anything()
        if not isinstance(schema, Mapping):
            raise InvalidRequest(f"{at} admits no value that a call could hold: it is no schema.", at)
        for keyword in UNENFORCED:
            if schema.get(keyword) not in (None, False):
                raise _unenforced(at, f"{keyword!r}")
        if "allOf" in schema:
            return self._value(self._merged(schema, at, depth), at, depth + 1)
        given = [keyword for keyword in _ALONE if keyword in schema]
        for keyword in ("const", "enum", "$ref", *_COMBINING):
            if keyword in given:
                if len(given) > 1:
                    others = ", ".join(repr(other) for other in given if other != keyword)
                    raise _unenforced(at, f"{keyword!r} together with {others}")
                return self._alone(keyword, schema, at, depth)
        kinds = _kinds(schema, at)
        if kinds is None:
            return self._anything()
        return _either([self._kind(kind, schema, at, depth) for kind in kinds])

    def _alone(self, keyword: str, schema: Mapping[str, Any], at: str, depth: int) -> str:
        if keyword in ("const", "enum"):
            return self._listed(schema, at)
        kind = schema.get("type")
        if keyword == "$ref":
            return _nullable(self._reference(schema["$ref"], kind, at, depth), schema)
        branches = _branches(schema, keyword, at)
        if keyword == "oneOf" and not self._are_apart(branches, at):
            raise _unenforced(at, "'oneOf' of schemas that one value may satisfy together (use anyOf)")
        expressions = [
            self._value(_typed(branch, kind, at), f"{at}.{keyword}[{i}]", depth + 1)
            for i, branch in enumerate(branches)
        ]
        return _nullable(_either(expressions), schema)

    def _listed(self, schema: Mapping[str, Any], at: str) -> str:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        kinds = _kinds(schema, at)
        fitting = [v for v in values if kinds is None or _type_of(v) & set(kinds)]
        if not fitting:
            raise InvalidRequest(f"{at} lists no value of its type.", at)
        return _nullable(_either([self._written(value, at) for value in fitting]), schema)

    def _written(self, value: Any, at: str) -> str:
        out = SegmentWriter()
        write_value(out, value, at)
        return " ".join(
            _literal(piece.text) if isinstance(piece, Text) else self._quote for piece in out.segments()
        )

    def _kind(self, kind: str, schema: Mapping[str, Any], at: str, depth: int) -> str:
        if kind == "string":
            return self._string(schema, at)
        if kind in ("integer", "number"):
            return self._number(kind, schema, at)
        if kind == "boolean":
            return '("true" | "false")'
        if kind == "null":
            return '"null"'
        return self._object(schema, at, depth) if kind == "object" else self._array(schema, at, depth)

    def _string(self, schema: Mapping[str, Any], at: str) -> str:
        least, most = _count(schema, "minLength", at) or 0, _count(schema, "maxLength", at)
        regexes = []
        if "pattern" in schema:
            regexes.append(_search(schema["pattern"], at))
        if least or most is not None:
            regexes.append(rf"(?s:.{{{least},{'' if most is None else most}}})")
        if not regexes:
            return f"{self._quote} TEXT? {self._quote}"
        name = f"S{len(self.lines)}"
        self.lines.append(f"{name}: {' & '.join(_regex(regex) for regex in regexes)}")
        return f"{self._quote} {name} {self._quote}"

    def _number(self, kind: str, schema: Mapping[str, Any], at: str) -> str:
        bounds = {keyword: schema[keyword] for keyword in _OF_NUMBERS if keyword in schema}
        if not bounds:
            return kind.upper()
        for keyword, bound in bounds.items():
            if isinstance(bound, bool) or not isinstance(bound, int | float) or abs(bound) > LARGEST:
                raise InvalidRequest(f"{at}.{keyword} must be a number within 1e18, got {bound!r}.", at)
        if kind == "number":
            # llguidance 1.9 admits some spellings of an exclusive bound of floats; the next number will do
            for exclusive, bound, sign in (
                ("exclusiveMinimum", "minimum", 1),
                ("exclusiveMaximum", "maximum", -1),
            ):
                if exclusive in bounds:
                    value = bounds.pop(exclusive)
                    inner = value + sign * NEXT * max(1, abs(value))
                    tighter = max if sign > 0 else min
                    bounds[bound] = tighter(inner, bounds.get(bound, inner))
        if not bounds.keys() & {"minimum", "exclusiveMinimum"}:
            bounds["minimum"] = -LARGEST
        if not bounds.keys() & {"maximum", "exclusiveMaximum"}:
            bounds["maximum"] = LARGEST
        return self._rule("%json " + json.dumps({"type": kind, **bounds}))

    def _array(self, schema: Mapping[str, Any], at: str, depth: int) -> str:
        least, most = _count(schema, "minItems", at) or 0, _count(schema, "maxItems", at)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise InvalidRequest(f"{at}.prefixItems must be a list of schemas.", at)
        items = schema.get("items", True)
        if items is False:
            most = len(first) if most is None else min(most, len(first))
        if most is not None and most < least:
            raise InvalidRequest(f"{at} asks for {least} items or more, and for {most} at most.", at)
        first = first[:most]
        rest = ""
        if most is None or most > len(first):
            item = self._rule(self._value(items, f"{at}.items", depth + 1))
            behind = f'("," {item})'
            few, many = max(0, least - len(first)), None if most is None else most - len(first)
            if first:
                rest = _repeated(behind, few, many)
            else:
                rest = f"{item} {_repeated(behind, max(0, few - 1), None if many is None else many - 1)}"
                rest = rest if few else f"({rest})?"
        # from the last to the first: each may be the end of the list if enough came before it
        for i in reversed(range(len(first))):
            value = self._value(first[i], f"{at}.prefixItems[{i}]", depth + 1)
            rest = f"{'' if i == 0 else _literal(',')} {value} {rest}"
            rest = f"({rest})" if i < least else f"({rest})?"
        return self._rule(f'"[" {rest} "]"')

    def _object(self, schema: Mapping[str, Any], at: str, depth: int) -> str:
        declared = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(declared, Mapping) or not isinstance(required, list):
            raise InvalidRequest(f"{at}: properties must be an object, and required a list of names.", at)
        others = schema.get("additionalProperties", "properties" not in schema)
        missing = {name: others for name in required if name not in declared}
        members = []
        for name, inner in by_key({**declared, **missing}, at):
            value = self._value(inner, f"{at}.properties.{name}", depth + 1)
            members.append((f"{self._key(name)} {value}", name in required))
        # members from the i-th on: behind others, and as the first ones
        others_too = self._others(others, [*declared, *missing], f"{at}.additionalProperties", depth)
        behind = self._rule(f'("," {others_too})*' if others_too else '""')
        as_first = self._rule(f'({others_too} ("," {others_too})*)?' if others_too else '""')
        for member, is_required in reversed(members):
            alone = f"{member} {behind}"
            as_first = self._rule(alone if is_required else f"{alone} | {as_first}")
            behind = self._rule(f'"," {alone}' if is_required else f'"," {alone} | {behind}')
        return self._rule(f'"{{" {as_first} "}}"')

    def _key(self, name: str) -> str:
        """A key and its colon, quoted where the bare one could not be read back."""
        if name and name == name.strip() and not set(name) & set(':,{}[]"'):
            return _literal(f"{name}:")
        return f'{self._quote} {_literal(name) if name else ""} {self._quote} ":"'

    def _others(self, schema: Any, names: Sequence[str], at: str, depth: int) -> str:
        """A member with a name that is not one of these; empty if there may be none."""
        if schema is False:
            return ""
        key = "KEY"
        if names:
            key = f"K{len(self.lines)}"
            self.lines.append(f"{key}: KEY & ~({' | '.join(_literal(name) for name in names if name)})")
        return self._rule(f'{key} ":" {self._value(schema, at, depth + 1)}')

    def _anything(self) -> str:
        """Any JSON value."""
        if not self._any:
            self._any = "anything"
            words = '"true" | "false" | "null"'
            self.lines += [
                f"anything: {self._quote} TEXT? {self._quote} | NUMBER | {words} | list | map",
                'list: "[" (anything ("," anything)*)? "]"',
                'map: "{" (KEY ":" anything ("," KEY ":" anything)*)? "}"',
            ]
        return self._any

    # ---- references

    def _merged(self, schema: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        """One schema in place of `allOf` and what stands beside it, if no keyword is in two of them."""
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{at} is nested more than {MAX_DEPTH} levels deep. Flatten it.", at)
        merged = {key: value for key, value in schema.items() if key != "allOf"}
        for branch in _branches(schema, "allOf", at):
            if (
                isinstance(branch, Mapping)
                and "$ref" in branch
                and any(k in branch for k in _ALONE if k != "$ref")
            ):
                raise _unenforced(at, "'allOf' of a '$ref' together with other keywords")
            part = self._followed(branch, at)
            if "allOf" in part:
                part = self._merged(part, at, depth + 1)
            for inner, outer in (("properties", "additionalProperties"), ("prefixItems", "items")):
                if (inner in part and outer in merged) or (outer in part and inner in merged):
                    raise _unenforced(at, f"'allOf' with {outer!r} in one schema and {inner!r} in another")
            for key, value in part.items():
                old = merged.get(key, value)
                if key == "required" and isinstance(old, list) and isinstance(value, list):
                    value = [*old, *(name for name in value if name not in old)]
                elif key == "properties" and isinstance(old, Mapping) and isinstance(value, Mapping):
                    if any(old.get(name, value[name]) != value[name] for name in value):
                        raise _unenforced(at, "'allOf' with a property in two schemas")
                    value = {**old, **value}
                elif old != value and key in ("type", *_ALONE):
                    raise _unenforced(at, f"'allOf' with {key!r} in two schemas")
                merged[key] = value
        return merged

    def _reference(self, pointer: Any, kind: Any, at: str, depth: int) -> str:
        key = (str(pointer), str(kind))
        if key not in self._references:
            name = self._references[key] = f"d{len(self._references)}_{len(self.lines)}"
            target = _typed(self._target(pointer, at), kind, at)
            self.lines.append(f"{name}: {self._value(target, f'{at} ({pointer})', depth + 1)}")
        return self._references[key]

    def _target(self, pointer: Any, at: str) -> Any:
        found: Any = self._root
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise InvalidRequest(f"{at}.$ref must point into its own schema, as in #/$defs/name.", at)
        for part in pointer[2:].split("/") if pointer != "#" else ():
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part[:9]) < len(found):
                found = found[int(part[:9])]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                raise InvalidRequest(f"{at}.$ref: there is no {pointer[:200]!r}.", at)
        return found

    def _are_apart(self, branches: Sequence[Any], at: str) -> bool:
        """No value satisfies two of the schemas, by their types or by a required property of one value."""
        found = [self._followed(branch, at) for branch in branches]
        kinds = [_kinds(schema, at) for schema in found]
        if all(_are_disjoint(a, b) for a, b in combinations(kinds, 2)):
            return True
        tags = [_tags(schema) for schema in found]
        shared = set(tags[0]).intersection(*tags[1:])
        return any(all(not set(a[name]) & set(b[name]) for a, b in combinations(tags, 2)) for name in shared)

    def _followed(self, schema: Any, at: str) -> Mapping[str, Any]:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._target(schema["$ref"], at)
        return schema if isinstance(schema, Mapping) else {}


def _branches(schema: Mapping[str, Any], keyword: str, at: str) -> list[Any]:
    branches = schema[keyword]
    if not isinstance(branches, list) or not branches:
        raise InvalidRequest(f"{at}.{keyword} must be a list of schemas.", at)
    return branches


def _unenforced(at: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{at} uses {what}, which a forced call cannot be held to. Leave it out, or let tool_choice be auto.",
        at,
    )


def _kinds(schema: Mapping[str, Any], at: str) -> list[str] | None:
    """The types that a schema admits, as far as it says; None for all."""
    given = schema.get("type")
    if given is None:
        for kind, keywords in (
            ("object", _OF_OBJECTS),
            ("array", _OF_ARRAYS),
            ("string", _OF_STRINGS),
            ("number", _OF_NUMBERS),
        ):
            if any(keyword in schema for keyword in keywords):
                given = kind
                break
        else:
            return None
    kinds = list(given) if isinstance(given, list) else [given]
    if not kinds or not all(kind in TYPES for kind in kinds):
        raise InvalidRequest(f"{at}.type must be one of {', '.join(TYPES)}, or a list of these.", at)
    if schema.get("nullable") is True:
        kinds.append("null")
    return list(dict.fromkeys(kinds))


def _typed(schema: Any, kind: Any, at: str) -> Any:
    """A schema that also demands this type, which stood beside it."""
    if kind is None or not isinstance(schema, Mapping) or schema.get("type") == kind:
        return {"type": kind} if schema is True and kind is not None else schema
    if "type" in schema:
        raise InvalidRequest(f"{at} must be of type {kind}, and also of type {schema['type']}.", at)
    return {**schema, "type": kind}


def _type_of(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return {"integer", "number"}
    kinds = {str: "string", float: "number", list: "array", dict: "object"}
    return {kinds.get(type(value), "null")}


def _are_disjoint(some: Sequence[str] | None, others: Sequence[str] | None) -> bool:
    if some is None or others is None:
        return False
    wide = [{"number" if kind == "integer" else kind for kind in kinds} for kinds in (some, others)]
    return not wide[0] & wide[1]


def _tags(schema: Mapping[str, Any]) -> dict[str, list[str]]:
    """Required properties that have listed values: name -> the values as JSON."""
    properties, required = schema.get("properties"), schema.get("required")
    tags = {}
    for name, inner in properties.items() if isinstance(properties, Mapping) else ():
        if isinstance(inner, Mapping) and isinstance(required, list) and name in required:
            values = [inner["const"]] if "const" in inner else inner.get("enum")
            if isinstance(values, list):
                tags[name] = [json.dumps(value, sort_keys=True) for value in values]
    return tags


def _count(schema: Mapping[str, Any], keyword: str, at: str) -> int | None:
    value = schema.get(keyword)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InvalidRequest(f"{at}.{keyword} must be a whole number of 0 or more, got {value!r}.", at)
    return value


def _search(pattern: Any, at: str) -> str:
    """A pattern, which JSON Schema looks for anywhere in a string, as one for the whole string."""
    if not isinstance(pattern, str):
        raise InvalidRequest(f"{at}.pattern must be a string.", at)
    starts = pattern.startswith("^")
    ends = pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2 == 1
    if (starts or ends) and _has_branches(pattern):
        raise _unenforced(
            at, "'pattern' with an anchor in one of several branches (put them into parentheses)"
        )
    body = pattern[1 if starts else 0 : -1 if ends else None]
    return f"{'' if starts else '(?s:.*)'}({body}){'' if ends else '(?s:.*)'}"


def _has_branches(pattern: str) -> bool:
    """Whether there is a `|` outside of parentheses and brackets."""
    depth = 0
    for piece, in_class in _pieces(pattern):
        if piece == "|" and depth == 0 and not in_class:
            return True
        depth += 0 if in_class else (piece == "(") - (piece == ")")
    return False


def _pieces(pattern: str) -> Iterator[tuple[str, bool]]:
    """The letters of a pattern, escaped ones with their backslash, and whether each is within brackets."""
    in_class = False
    for piece in re.findall(r"\\.|.", pattern, re.DOTALL):
        yield piece, in_class and piece != "]"
        in_class = piece != "]" if in_class else piece == "["


def _regex(pattern: str) -> str:
    """A regex as Lark writes it: between slashes, on one line. Digits and words are ECMAScript's: ASCII."""
    spelled = {"/": "\\/", "\n": "\\n", "\r": "\\r"}
    classes = {"\\d": "0-9", "\\w": "0-9A-Za-z_"}
    written = []
    for piece, in_class in _pieces(pattern):
        if piece in classes:
            written.append(classes[piece] if in_class else f"[{classes[piece]}]")
        else:
            written.append(spelled.get(piece, piece))
    return f"/{''.join(written)}/"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _either(expressions: Sequence[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"({' | '.join(expressions)})"


def _repeated(expression: str, least: int, most: int | None) -> str:
    """most: None for any number."""
    if most == 0:
        return ""
    return f"{expression}{{{least},{'' if most is None else most}}}"


def _nullable(expression: str, schema: Mapping[str, Any]) -> str:
    return f'({expression} | "null")' if schema.get("nullable") is True else expression
