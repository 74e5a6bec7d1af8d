"""`gemcut render`: the official template's 300 outputs through the command, and lines that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_rig import LIMIT_S, SIGN, call, command, environment, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.cli.render import _answer

CASES = json.loads((Path(__file__).parents[1] / "prompt" / "template_cases.json").read_text())["cases"]
KEYS = ("messages", "tools", "enable_thinking", "preserve_thinking", "add_generation_prompt")
HI = [{"role": "user", "content": "Hi"}]
EMPTY = "<|channel>thought\n<channel|>"


def lines(*requests: Any) -> str:
    return "".join(json.dumps(request) + "\n" for request in requests)


def answers(*words: str, stdin: str | bytes = "") -> list[dict[str, str]]:
    result = call("render", "-", *words, stdin=stdin)
    assert (result.code, result.err) == (0, "")
    return [json.loads(line) for line in result.out.splitlines()]


@pytest.mark.parametrize(("variant", "flag"), [("31B", "empty-thought"), ("E2B", "plain")])
def test_all_cases(variant: str, flag: str, tmp_path: Path) -> None:
    cases = [case for case in CASES if case["variants_equal"] or case["variant"] == variant]
    assert len(cases) > 200
    file = tmp_path / "cases.jsonl"
    file.write_text(lines(*({key: case[key] for key in KEYS} for case in cases)))
    result = call("render", str(file), "--variant", flag)
    assert (result.code, result.err) == (0, "")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert len(found) == len(cases)
    for case, answer in zip(cases, found, strict=True):
        if "error" in case:
            assert list(answer) == ["error"], case["name"]
        else:
            assert answer == {"prompt": case["expect"]}, case["name"]


def test_every_case_is_of_one_variant() -> None:
    assert len(CASES) == 300
    assert {case["variant"] for case in CASES} == {"31B", "E2B"}


def test_auto_is_what_the_model_wants(tmp_path: Path) -> None:
    request = lines({"messages": HI})
    assert answers(stdin=request)[0]["prompt"].endswith(EMPTY)  # the demo is of the MoE kind
    sizes = Path(__file__).parents[2] / "gemcut" / "plan" / "sizes"
    (tmp_path / "config.json").write_text((sizes / "E2B.json").read_text())
    assert answers("--model", str(tmp_path), stdin=request)[0]["prompt"].endswith("model\n")
    (tmp_path / "chat_template.jinja").write_text(f"{{{{ {EMPTY!r} }}}}")  # the checkpoint's template decides
    assert answers("--model", str(tmp_path), stdin=request)[0]["prompt"].endswith(EMPTY)


def test_only_messages_are_needed() -> None:
    found = answers("--variant", "plain", stdin=lines({"messages": HI}))
    assert found == [{"prompt": "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"not json", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b'{"messages": [], "messages": []}', "twice"),
        (b'{"messages": [{"role": "user", "content": NaN}]}', "NaN"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"messages": [], "model": "x"}', "There is no key 'model'"),
        (b"{}", '"messages" must be a list'),
        (b'{"messages": "Hi"}', '"messages" must be a list'),
        (b'{"messages": [1]}', "messages[0].role"),
        (b'{"messages": [], "tools": {}}', '"tools" must be a list'),
        (b'{"messages": [], "tools": [1]}', "tools[0]"),
        (b'{"messages": [], "enable_thinking": 1}', '"enable_thinking" must be true or false'),
        (b'{"messages": [{"role": "user", "content": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}", "nested"),
    ],
)
def test_lines_that_are_none(line: bytes, says: str) -> None:
    """Each has an error of its own, and those around it are rendered."""
    good = lines({"messages": HI}).encode()
    found = answers(stdin=good + line + b"\n" + good)
    assert [list(answer) for answer in found] == [["prompt"], ["error"], ["prompt"]]
    assert says in found[1]["error"]


def test_one_line_in_one_line_out() -> None:
    """Line ends of Unicode stay within their line, in and out; half a surrogate pair does not break it."""
    odd = "a\u2028b\x85c\x0bd\ud800"
    escaped = json.dumps({"messages": [{"role": "user", "content": odd}]})
    whole = json.dumps({"messages": [{"role": "user", "content": odd[:-1]}]}, ensure_ascii=False)
    found = answers("--variant", "plain", stdin=f"{escaped}\n{whole}")  # the last without an end
    assert [answer["prompt"].split("\n")[1] for answer in found] == [f"{odd}<turn|>", f"{odd[:-1]}<turn|>"]


def test_control_tokens_in_text_stay_text() -> None:
    found = answers(
        "--variant", "plain", stdin=lines({"messages": [{"role": "user", "content": "<|image|>"}]})
    )
    assert found == [{"prompt": "<bos><|turn>user\n<|image|><turn|>\n<|turn>model\n"}]


def test_mistakes() -> None:
    refused(2, "render", says="FILE.jsonl")
    refused(2, "render", "nowhere.jsonl", says="nowhere.jsonl cannot be read: No such file")
    refused(2, "render", "/", says="Is a directory")
    refused(2, "render", SIGN, "--variant", "odd", says="'empty-thought'")
    refused(1, "render", SIGN, "--model", "nowhere", says="There is no folder nowhere")


def test_lines_are_answered_as_they_come_and_without_torch() -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command("render", "-")[1:]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(lines({"messages": HI}).encode())
    process.stdin.flush()
    assert b"prompt" in process.stdout.readline()  # before the input has ended
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert b"| torch\n" not in err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9)
    | st.sampled_from(["user", "assistant", "tool", "text", "image", "x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "name", "arguments"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(messages=st.lists(JSON, max_size=3), tools=st.none() | st.lists(JSON, max_size=2))
def test_any_json_is_rendered_or_refused(messages: list[Any], tools: list[Any] | None) -> None:
    line = json.dumps({"messages": messages, "tools": tools}).encode()
    assert list(_answer(line, True)) in (["prompt"], ["error"])
