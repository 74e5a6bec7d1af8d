"""A run from its first item to its score: answers kept, gone on with, asked of engines and servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from gemcut.demo import evaluate
from gemcut.demo.evaluate import SEED
from gemcut.errors import ConfigError, GemcutError
from gemcut.evaluate import answerers
from gemcut.evaluate.answerers import EngineAnswerer, ServerAnswerer, Wish, first_model
from gemcut.evaluate.benchmarks import BENCHMARKS, Benchmark
from gemcut.evaluate.demo import Demo
from gemcut.evaluate.run import run
from gemcut.evaluate.task import Item, Reply
from gemcut.llm import AsyncLLM

FIXTURES = Path(__file__).parent / "fixtures"
ASKED = {"model": "fake"}


def mmmu() -> Benchmark:
    found = next(each for each in BENCHMARKS if each.name == "mmmu")
    return replace(found, folder=FIXTURES / "mmmu")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def always_c(item: Item) -> Reply:
    return Reply(text="C")


def test_a_run_scores_by_group_and_keeps_every_answer(tmp_path: Path) -> None:
    advanced: list[int] = []
    replies = {"Marketing": "C", "Accounting": "373", "Art_Theory": "none"}
    task = mmmu()
    result = run(task, lambda item: Reply(text=replies[item.group]), tmp_path, ASKED, advance=advanced.append)
    drawn = {entry["group"]: entry["points"] for entry in lines(tmp_path)}["Art_Theory"]
    assert {name: each.mean for name, each in result.groups.items()} == {
        "Accounting": 0.0,
        "Art_Theory": drawn,
        "Marketing": 1.0,
    }
    assert result.score.mean == pytest.approx((1.0 + drawn) / 3)
    assert result.guessed == 1
    assert sum(advanced) == 3
    assert {entry["group"]: entry["text"] for entry in lines(tmp_path)} == replies
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["score"]["count"] == 3
    assert [each["model"] for each in kept["baselines"]] == ["31B", "26B-A4B", "12B", "E4B", "E2B"]


def test_a_run_that_broke_off_goes_on(tmp_path: Path) -> None:
    run(mmmu(), always_c, tmp_path, ASKED, items=2)
    path = tmp_path / "answers.jsonl"
    path.write_text(path.read_text()[:-20])  # as a kill would leave it
    asked: list[str] = []

    def note(item: Item) -> Reply:
        asked.append(item.id)
        return Reply(text="C")

    result = run(mmmu(), note, tmp_path, ASKED, concurrency=1)
    assert len(asked) == 2  # the torn one, and the one that was never asked
    assert result.score.count == 3
    assert run(mmmu(), note, tmp_path, ASKED).score == result.score
    assert len(asked) == 2


def test_kept_replies_are_marked_anew(tmp_path: Path) -> None:
    run(mmmu(), always_c, tmp_path, ASKED)
    path = tmp_path / "answers.jsonl"
    path.write_text(path.read_text().replace('"points": 1.0', '"points": 0.0'))
    assert run(mmmu(), always_c, tmp_path, ASKED).groups["Marketing"].mean == 1.0


def test_other_answers_are_not_mixed_with_these(tmp_path: Path) -> None:
    run(mmmu(), always_c, tmp_path, ASKED)
    with pytest.raises(ConfigError, match="model 'fake', now 'other'"):
        run(mmmu(), always_c, tmp_path, {"model": "other"})


def test_answers_to_another_form_are_not_mixed_with_these(tmp_path: Path) -> None:
    pro = next(each for each in BENCHMARKS if each.name == "mmmu_pro")
    pro = replace(pro, folder=FIXTURES / "mmmu_pro")
    assert run(pro, always_c, tmp_path, ASKED).asked["form"] == "cot"
    with pytest.raises(ConfigError, match="form 'cot', now 'direct'"):
        run(replace(pro, form="direct"), always_c, tmp_path, ASKED)


def test_failed_requests_are_left_out_and_asked_again(tmp_path: Path) -> None:
    def fails_once(item: Item) -> Reply:
        if item.group == "Accounting":
            raise GemcutError("busy")
        return Reply(text="C", complete=False)

    result = run(mmmu(), fails_once, tmp_path, ASKED)
    assert (result.score.count, result.failed, result.errors, result.cut_off) == (2, 1, ["busy"], 2)
    assert run(mmmu(), always_c, tmp_path, ASKED).score.count == 3

    def fails(item: Item) -> Reply:
        raise GemcutError("busy")

    with pytest.raises(GemcutError, match="None of 3 items was answered: busy"):
        run(mmmu(), fails, tmp_path / "other", ASKED)


def test_an_empty_data_set_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").touch()
    with pytest.raises(GemcutError, match="mmmu has no items"):
        run(replace(mmmu(), folder=tmp_path), always_c, tmp_path / "out", ASKED)


def test_orders_of_one_question_count_once_in_the_error(tmp_path: Path) -> None:
    """The first question always right, the second always wrong: two draws, not eight."""
    gpqa = next(each for each in BENCHMARKS if each.name == "gpqa")
    gpqa = replace(gpqa, folder=FIXTURES / "gpqa")
    right = {item.repeats for item in islice(gpqa.items(), 1)}

    def half(item: Item) -> Reply:
        letter = item.target["letter"] if item.repeats in right else "none"
        return Reply(text=f"Answer: {letter}")

    score = run(gpqa, half, tmp_path, ASKED).score
    assert (score.mean, score.error, score.count) == (0.5, pytest.approx(0.5), 8)


def test_as_many_questions_as_asked_for_are_under_way(tmp_path: Path) -> None:
    meet = threading.Barrier(3, timeout=20)  # passes only if three come at once

    def together(item: Item) -> Reply:
        meet.wait()
        return Reply(text="C")

    assert run(mmmu(), together, tmp_path, ASKED, concurrency=3).score.count == 3


# ---- engines


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(device="cpu", kv_bytes=64 << 20)
    yield llm
    llm.close()


def test_the_demos_lots_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `LOT` pictures of one seed come those of the next."""
    monkeypatch.setattr(evaluate, "LOT", 5)
    first, second = (list(evaluate.held_out_items(SEED + i, 5, signs=False)) for i in range(2))
    asked = list(islice(Demo(signs=False).items(), len(first) + len(second)))
    assert [item.messages for item in asked] == [item.messages for item in first + second]
    assert asked[len(first)].id == f"{SEED + 1}-shapes-0"


def test_a_benchmark_goes_through_an_engine(llm: AsyncLLM, tmp_path: Path) -> None:
    """The demo model knows nothing of umbrellas; its answers are kept and scored all the same."""
    result = run(mmmu(), EngineAnswerer(llm, Wish(max_tokens=16)), tmp_path, ASKED)
    assert result.score.count == 3
    assert result.failed == 0
    assert all(entry["text"] for entry in lines(tmp_path))


def test_an_engines_refusal_fails_one_item(llm: AsyncLLM, tmp_path: Path) -> None:
    long = Item(id="1", group="g", messages=({"role": "user", "content": "a " * 9000},), target={})
    with pytest.raises(GemcutError):
        EngineAnswerer(llm, Wish(max_tokens=16))(long)


# ---- servers


class Script(BaseHTTPRequestHandler):
    """Answers C. Every first request of a kind meets a busy server; `bad` is refused for good."""

    seen: list[dict[str, Any]]
    busy: int

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(body | {"authorization": self.headers["Authorization"]})
        if body["model"] == "bad":
            self._answer(404, {"error": {"message": "no such model"}})
        elif type(self).busy:
            type(self).busy -= 1
            self._answer(503, {"error": {"message": "full"}})
        else:
            message = {"role": "assistant", "content": "C", "reasoning": "hm"}
            self._answer(200, {"choices": [{"message": message, "finish_reason": "length"}]})

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(answerers, "PAUSE_S", 0.01)
    Script.seen, Script.busy = [], 0
    http = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_server_is_asked_in_openais_form(server: str, tmp_path: Path) -> None:
    assert first_model(server, None) == "served"
    wish = Wish(max_tokens=9, temperature=0.5, seed=3, thinking=True)
    ask = ServerAnswerer(base_url=server, model="served", wish=wish, key="secret")
    result = run(mmmu(), ask, tmp_path, ASKED, concurrency=1)
    assert (result.score.count, result.cut_off) == (3, 3)
    assert lines(tmp_path)[0]["reasoning"] == "hm"
    first = Script.seen[0]
    assert (first["max_tokens"], first["temperature"], first["seed"]) == (9, 0.5, 3)
    assert first["chat_template_kwargs"] == {"enable_thinking": True}
    assert first["authorization"] == "Bearer secret"
    text, picture, _ = first["messages"][0]["content"]
    assert text["type"] == "text"
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_drawn_pictures_travel_as_png(server: str) -> None:
    item = next(item for item in Demo(signs=False).items() if len(item.messages[0]["content"]) > 1)
    ServerAnswerer(base_url=server, model="served", wish=Wish(max_tokens=9))(item)
    kinds = [part["type"] for part in Script.seen[0]["messages"][0]["content"]]
    assert "image_url" in kinds
    assert "image" not in kinds
    assert "chat_template_kwargs" not in Script.seen[0]


def test_what_cannot_be_sent_is_an_error(server: str) -> None:
    content = [{"type": "image", "image": b"no picture"}, {"type": "text", "text": "?"}]
    item = Item(id="1", group="g", messages=({"role": "user", "content": content},), target={})
    with pytest.raises(GemcutError, match="10 bytes is of no known format"):
        ServerAnswerer(base_url=server, model="served", wish=Wish(max_tokens=9))(item)
    with pytest.raises(ConfigError, match="begins with http"):
        first_model("127.0.0.1:8000/v1", None)


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server: str) -> None:
    item = next(iter(islice(mmmu().items(), 1)))
    Script.busy = 2
    assert ServerAnswerer(base_url=server, model="served", wish=Wish(max_tokens=9))(item).text == "C"
    assert len(Script.seen) == 3
    with pytest.raises(GemcutError, match=r"404.*no such model"):
        ServerAnswerer(base_url=server, model="bad", wish=Wish(max_tokens=9))(item)
    assert len(Script.seen) == 4
    Script.busy = 99
    with pytest.raises(GemcutError, match=r"503.*full"):
        ServerAnswerer(base_url=server, model="served", wish=Wish(max_tokens=9))(item)
    assert len(Script.seen) == 4 + answerers.TRIES
