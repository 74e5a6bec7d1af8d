"""Orders from other threads: what happens while a grammar is compiled."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

from gemcut.data import Prompt
from gemcut.engine.loop import Engine, Job
from gemcut.engine.model_files import ChatPrompt
from gemcut.engine.service import Service
from gemcut.errors import GemcutError
from gemcut.sampling import SamplingParams, StructuredOutputs


class StuckEngine:
    """Its grammars are compiled when the test says so, by name."""

    def __init__(self) -> None:
        self.grammars = self
        self.gates = {name: threading.Event() for name in ("first", "second")}
        self.added: SimpleQueue[tuple[Job, Any]] = SimpleQueue()
        self.idle = True

    def known(self, wanted: StructuredOutputs) -> None:
        return None

    def compile(self, wanted: StructuredOutputs) -> Any:
        assert wanted.choice is not None
        assert self.gates[wanted.choice[0]].wait(10)
        return SimpleNamespace(name=wanted.choice[0])

    def add(self, job: Job, grammar: Any) -> None:
        self.added.put((job, grammar))

    def stats(self) -> None:
        return None


def job(name: str) -> Job:
    params = SamplingParams(structured_outputs=StructuredOutputs(choice=(name,)))
    return Job(request_id="mine", prompt=ChatPrompt(Prompt((2,), ()), (), False), params=params)


def test_an_id_that_is_used_again_is_not_taken_for_the_one_before() -> None:
    engine = StuckEngine()
    service = Service(cast(Engine, engine), lambda _: None)
    refused: SimpleQueue[GemcutError] = SimpleQueue()
    service.submit(job("first"), refused.put)
    service.abort("mine")
    service.submit(job("second"), lambda error: None)
    runner = threading.Thread(target=service.run)
    runner.start()
    engine.gates["first"].set()
    assert "aborted" in str(refused.get(timeout=10))
    assert engine.added.empty()
    engine.gates["second"].set()
    _, grammar = engine.added.get(timeout=10)
    assert grammar.name == "second"
    service.stop()
    runner.join(10)
