"""An engine that takes orders from other threads: the loop around `Engine.step`.

Enters: jobs, aborts and questions, from any thread. Leaves: updates, handed over after each step. One thread
runs it. It must not know where the updates go.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from gemcut.engine.loop import Engine, Job, Update
from gemcut.errors import GemcutError, InvalidRequest, Overloaded
from gemcut.outputs import Stats
from gemcut.prompt.grammar import Grammar

log = logging.getLogger(__name__)

Publish = Callable[[Sequence[Update]], None]
Refuse = Callable[[GemcutError], None]
COMPILERS = 4  # threads that wait for grammars


class Service:
    """`run` in one thread, everything else from any.

    publish: gets the updates of a step, in the engine's thread; it must not block for long.
    stats: the engine's counters as of the last step. step_began_s: on the monotonic clock, when the step
    that is being computed began; None between steps. A step that does not end shows there.
    """

    def __init__(self, engine: Engine, publish: Publish) -> None:
        self._engine, self._publish = engine, publish
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.stats: Stats = engine.stats()
        self.step_began_s: float | None = None
        self._compilers = ThreadPoolExecutor(COMPILERS, "gemcut-grammar")
        self._compiling: dict[str, Job] = {}  # those whose grammar is not there yet
        self._lock = threading.Lock()

    def submit(self, job: Job, refuse: Refuse) -> None:
        """Queue a job. `refuse` is called instead of any update, in the engine's thread, if it is refused.

        Its grammar is compiled first, in another thread: the engine goes on, other jobs may overtake it.
        """
        wanted = job.params.structured_outputs
        grammar = None if wanted is None else self._engine.grammars.known(wanted)
        if wanted is None or grammar is not None:
            self._orders.put(lambda: self._add(job, refuse, grammar))
            return
        with self._lock:
            self._compiling[job.request_id] = job
        self._compilers.submit(self._compile, job, refuse)

    def abort(self, request_id: str) -> None:
        """End a job; its last update, or its refusal, follows. Nothing happens if it has ended."""
        with self._lock:
            if self._compiling.pop(request_id, None) is not None:
                return
            self._orders.put(lambda: self._engine.abort(request_id))

    def stop(self) -> None:
        """Let `run` return once the orders before this one are done; what still runs is left as it is."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._orders.put(None)

    def run(self) -> None:
        """Compute until `stop`. An exception of the engine, which no single request can be blamed for, ends
        it."""
        engine, orders = self._engine, self._orders
        while True:
            # sleep only when there is nothing to compute
            while engine.idle or not orders.empty():
                order = orders.get()
                if order is None:
                    return
                order()
            self.step_began_s = time.monotonic()
            updates = engine.step()
            self.step_began_s = None
            self.stats = engine.stats()
            if updates:
                self._publish(updates)

    def _compile(self, job: Job, refuse: Refuse) -> None:
        wanted, grammar, failure = job.params.structured_outputs, None, None
        assert wanted is not None, "the job has a grammar"
        try:
            grammar = self._engine.grammars.compile(wanted)
        except GemcutError as error:
            failure = error
        except Exception:
            log.exception("the grammar of request %s could not be compiled", job.request_id)
            failure = GemcutError("The engine failed on this request.")
        with self._lock:  # an abort comes before this, or finds its order behind ours
            if self._compiling.get(job.request_id) is job:  # not another one that took the id since
                del self._compiling[job.request_id]
            else:
                failure = GemcutError("The request was aborted.")
            if failure is None:
                self._orders.put(lambda: self._add(job, refuse, grammar))
            else:
                self._orders.put(lambda: refuse(failure))

    def _add(self, job: Job, refuse: Refuse, grammar: Grammar | None = None) -> None:
        try:
            self._engine.add(job, grammar)
        except (InvalidRequest, Overloaded) as error:
            refuse(error)
        except Exception:
            # `Engine.add` leaves nothing of a job behind, so the others need not end with it
            log.exception("request %s could not be taken", job.request_id)
            refuse(GemcutError("The engine failed on this request."))
