"""schemathesis against our own OpenAPI document: whatever it admits is answered, never with a 5xx."""

from __future__ import annotations

import hypothesis
import schemathesis
from server_rig import Server

from gemcut.server import openapi


def test_the_document_names_every_route(scripted: Server) -> None:
    document = scripted.get("/openapi.json").json
    posts = {path for path, verbs in document["paths"].items() if "post" in verbs}
    assert posts == set(openapi.BODIES)
    assert {"/live", "/ready", "/metrics", "/v1/models"} <= set(document["paths"])


def test_what_the_document_admits_is_answered(scripted: Server) -> None:
    document = scripted.get("/openapi.json").json
    statuses: dict[tuple[str, int], int] = {}
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            # most of what the document admits contradicts itself, the more so the more fields there are
            max_examples=60 if operation.path == "/v1/chat/completions" else 20,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            derandomize=True,
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "scripted"  # a made-up name would hide all that comes after it
            response = case.call(base_url=scripted.url)
            key = (case.path, response.status_code)
            statuses[key] = statuses.get(key, 0) + 1
            assert response.status_code < 500, (case.path, case.body, response.text)

        check()
    assert {path for path, _ in statuses} == set(document["paths"])
    assert any(status == 200 and path == "/v1/chat/completions" for path, status in statuses), statuses
    assert any(status == 400 for _, status in statuses), statuses
