"""What becomes of an error over HTTP: one table from its class to status, type and code.

Texts are ours and hold what the caller sent at most; addresses, paths and tracebacks stay in the log.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from gemcut.errors import GemcutError, InvalidRequest, NotFound, Overloaded
from gemcut.server.engine_client import EngineDied


class Unauthorized(GemcutError):
    """No key, or a wrong one."""


class Forbidden(GemcutError):
    """A page or a name that may not reach this server."""


class NoRoute(GemcutError):
    """There is nothing at this path."""


class WrongMethod(GemcutError):
    """There is, but not for this method."""


class TooSlow(GemcutError):
    """The body did not arrive in time."""


class TooLarge(GemcutError):
    """The body is larger than bodies may be."""


class NotJson(GemcutError):
    """The body is declared to be something else than JSON."""


class TooMany(Overloaded):
    """This key has as many requests in flight as one key may have."""


class NotReady(Overloaded):
    """The engine is starting again, or the server is shutting down."""


class TookTooLong(GemcutError):
    """The answer was not complete within the time for a request."""


class ModelFailed(GemcutError):
    """The model gave nothing usable for this request."""


@dataclass(frozen=True, slots=True)
class Status:
    """HTTP status, and OpenAI's and Anthropic's words for it."""

    status: int
    type: str
    code: str | None
    anthropic: str


_BAD = "invalid_request_error"
TABLE: dict[type[GemcutError], Status] = {
    InvalidRequest: Status(400, _BAD, None, _BAD),
    Unauthorized: Status(401, _BAD, "invalid_api_key", "authentication_error"),
    Forbidden: Status(403, "permission_error", "forbidden", "permission_error"),
    NotFound: Status(404, _BAD, "model_not_found", "not_found_error"),
    NoRoute: Status(404, _BAD, "not_found", "not_found_error"),
    WrongMethod: Status(405, _BAD, "method_not_allowed", _BAD),
    TooSlow: Status(408, _BAD, "body_timeout", _BAD),
    TooLarge: Status(413, _BAD, "body_too_large", "request_too_large"),
    NotJson: Status(415, _BAD, "not_json", _BAD),
    TooMany: Status(429, "rate_limit_error", "too_many_requests", "rate_limit_error"),
    Overloaded: Status(503, "overloaded_error", "overloaded", "overloaded_error"),
    NotReady: Status(503, "overloaded_error", "not_ready", "overloaded_error"),
    EngineDied: Status(503, "server_error", "engine_died", "api_error"),
    TookTooLong: Status(504, "timeout_error", "timeout", "timeout_error"),
    ModelFailed: Status(500, "server_error", "model_failed", "api_error"),
    GemcutError: Status(500, "server_error", "internal_error", "api_error"),
}
_INTERNAL = "The server failed on this request. The log has the details under its request id."


def status_of(error: BaseException) -> Status:
    """The row of an error's class, or of the nearest class above it."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    return TABLE[GemcutError]


def message_of(error: BaseException) -> str:
    """What the caller is told."""
    text = str(error) if status_of(error) is not TABLE[GemcutError] else _INTERNAL
    return text.encode(errors="backslashreplace").decode()  # half a surrogate pair is no JSON


def openai_error(error: BaseException) -> dict[str, Any]:
    """OpenAI's error body."""
    row = status_of(error)
    param = error.param if isinstance(error, InvalidRequest) else None
    if param is not None:
        param = param.encode(errors="backslashreplace").decode()
    return {"error": {"message": message_of(error), "type": row.type, "param": param, "code": row.code}}


def anthropic_error(error: BaseException) -> dict[str, Any]:
    """Anthropic's error body."""
    return {"type": "error", "error": {"type": status_of(error).anthropic, "message": message_of(error)}}


def headers_of(error: BaseException) -> list[tuple[bytes, bytes]]:
    """Headers that go with an error."""
    headers = []
    if isinstance(error, Overloaded):
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    elif isinstance(error, EngineDied):
        headers.append((b"retry-after", b"5"))
    elif isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, TooSlow | TooLarge):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return headers


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*?)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object (?P<how>contains unknown|missing required) field `(?P<name>.*)`$", re.DOTALL)

# of a field that may say what gemcut does anyway, and nothing else
_CONSTANT = re.compile(r"^Invalid enum value (?P<given>True|False)$|^Expected `null`, got ")


def schema_error(error: Exception, within: str = "") -> InvalidRequest:
    """A body that is no JSON or breaks the schema, with the field named. within: the part that was read."""
    if isinstance(error, RecursionError):
        return InvalidRequest("The body is nested too deeply.")
    if not isinstance(error, msgspec.ValidationError):
        return InvalidRequest(f"The body is not valid JSON: {error}")
    found = _AT.match(str(error))
    assert found is not None, "every text matches"
    what, path = found["what"], found["path"] or ""
    path = f"{within}{'.' if within and path and path[0] != '[' else ''}{path}"
    if (field := _FIELD.match(what)) is not None:
        param = f"{path}.{field['name']}" if path else field["name"]
        if field["how"] == "missing required":
            return InvalidRequest(f"{param} is required.", param)
        return InvalidRequest(f"{param} is not a field that gemcut supports. Leave it out.", param)
    if path and (constant := _CONSTANT.match(what)) is not None:
        given = f": {constant['given'].lower()}" if constant["given"] else ""
        return InvalidRequest(f"{path}{given} is not supported. Leave it out.", path)
    return InvalidRequest(f"{path or 'The body'}: {what[:1].lower()}{what[1:]}.", path or None)
