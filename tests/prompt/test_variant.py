"""Which generation prompt a checkpoint wants."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from gemcut.prompt.variant import MAX_TEMPLATE_BYTES, carries_empty_thought, read_chat_template, render_once

TURNS = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] | trim }}<turn|>\n"
    "{% endfor %}"
)
DOUBLING = "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
SMALL = TURNS + "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
BIG = (
    TURNS
    + "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% if not enable_thinking | default(false) %}"
    + "{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("per_layer", [True, False])
def test_the_template_decides(per_layer: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert carries_empty_thought(BIG, per_layer)
    assert not carries_empty_thought(SMALL, per_layer)
    assert not caplog.records


@pytest.mark.parametrize("per_layer", [True, False])
def test_without_a_template_the_kind_decides(per_layer: bool) -> None:
    assert carries_empty_thought(None, per_layer) is not per_layer


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("x" * (MAX_TEMPLATE_BYTES + 1), "limit"),
        (DOUBLING + "{{ n.s }}", "MemoryError"),
    ],
)
def test_a_broken_template_is_reported(template: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert carries_empty_thought(template, False)
    assert reason in caplog.text


def test_an_endless_template_is_stopped() -> None:
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    assert render_once(loops, timeout_s=0.5) == (None, "it ran for more than 0.5 s")


def test_where_the_template_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{")
    assert read_chat_template(tmp_path) is None
    assert "not valid JSON" in caplog.text
    config.write_text(json.dumps({"chat_template": "one"}))
    assert read_chat_template(tmp_path) == "one"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert read_chat_template(tmp_path) == "three"
