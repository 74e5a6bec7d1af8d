"""The interface as an OpenAPI document, made from the very schemas that requests are read with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

import gemcut
from gemcut.server import anthropic, protocol, responses

BODIES: dict[str, type] = {
    "/v1/chat/completions": protocol.ChatRequest,
    "/v1/completions": protocol.CompletionRequest,
    "/v1/responses": responses.ResponsesRequest,
    "/v1/messages": anthropic.MessagesRequest,
    "/v1/messages/count_tokens": anthropic.CountRequest,
    "/tokenize": protocol.TokenizeRequest,
    "/detokenize": protocol.DetokenizeRequest,
}
_REFUSALS = {"400": "What was sent cannot be served; `error.param` names the field.", "401": "No key.",
             "404": "No such model.", "408": "The body came too slowly.", "413": "The body is too large.",
             "415": "The body is not declared to be JSON.", "429": "Too many requests of this key.",
             "503": "No room now; see Retry-After.", "504": "It took too long."}  # fmt: skip
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(paths: Iterable[str]) -> dict[str, Any]:
    """The OpenAPI document for these paths."""
    (schemas, components) = msgspec.json.schema_components(
        list(BODIES.values()), ref_template="#/components/schemas/{name}"
    )
    bodies = dict(zip(BODIES, schemas, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {"title": "gemcut", "version": gemcut.__version__},
        "paths": {path: _path(path, bodies.get(path)) for path in paths},
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _path(path: str, body: Any) -> dict[str, Any]:
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "Done."}}
    if body is None:
        responses |= {status: {"description": _REFUSALS[status]} for status in ("401", "503")}
        return {"get": {"operationId": path, "responses": responses}}
    responses |= {status: {"description": text, "content": refused} for status, text in _REFUSALS.items()}
    content = {"application/json": {"schema": body}}
    request = {"required": True, "content": content}
    return {"post": {"operationId": path, "requestBody": request, "responses": responses}}
