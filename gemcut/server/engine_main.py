"""`python -m gemcut.server.engine_main SOCKET`: the engine's process.

Three threads: one reads orders, one computes, one writes news. Signals are for the front end, which the
process outlives by no more than a moment. What no single request can be blamed for ends the process; the
front end starts another one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from gemcut.engine.loop import Engine, Job, Update
from gemcut.engine.model_files import ChatPrompt, ModelFiles
from gemcut.engine.service import Service
from gemcut.errors import GemcutError, InvalidRequest
from gemcut.sampling import SamplingParams
from gemcut.server import logs, wire

log = logging.getLogger("gemcut.engine")

FAILED, CRASHED = 1, 70
MOST_AT_ONCE = 64  # frames that are joined to one write

Start = Callable[[wire.Start], tuple[Engine, wire.Started]]


class Orders:
    """The reading end of the socket. bad_frames: how many were dropped."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb", buffering=1 << 16)
        self.bad_frames = 0

    def next(self) -> wire.ToEngine | None:
        """The next message, None when the front end is gone."""
        while True:
            head = self._file.read(wire.HEAD.size)
            if len(head) < wire.HEAD.size:
                return None
            (length,) = wire.HEAD.unpack(head)
            if length > wire.MAX_FRAME:
                log.error("a frame of %d bytes was announced; the connection is given up", length)
                return None
            body = self._file.read(length)
            if len(body) < length:
                return None
            try:
                return wire.read_order(body)
            except wire.BadFrame as error:
                self.drop(error)

    def close(self) -> None:
        """Let go of the connection."""
        self._file.close()

    def drop(self, error: wire.BadFrame) -> None:
        """Count a frame that says nothing."""
        self.bad_frames += 1
        log.warning("a frame was dropped: %s", error)


class Desk:
    """Between a `Service` and the socket: turns updates to frames, and knows who wants deltas."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._outbox: SimpleQueue[wire.ToFrontEnd | None] = SimpleQueue()
        self._streamed: set[str] = set()
        self._writer = threading.Thread(target=self._write, name="gemcut-news", daemon=True)
        self._writer.start()

    def send(self, message: wire.ToFrontEnd) -> None:
        """Queue a message."""
        self._outbox.put(message)

    def publish(self, updates: Sequence[Update]) -> None:
        """The news of a step, in the engine's thread."""
        streamed = self._streamed
        deltas, outputs = [], []
        for update in updates:
            if update.request_id in streamed:
                deltas.append((update.request_id, update.delta))
            if update.output is not None:
                streamed.discard(update.request_id)
                # the front end made the prompt; it need not come back
                outputs.append(dataclasses.replace(update.output, prompt_token_ids=()))
        if deltas or outputs:
            self.send(wire.News(tuple(deltas), tuple(outputs)))

    def take(self, service: Service, message: wire.Submit) -> None:
        """Hand a job to the engine. Raises BadFrame."""
        job = wire.read_job(message)
        if message.streamed:
            self._streamed.add(job.request_id)

        def refuse(error: GemcutError) -> None:
            self._streamed.discard(job.request_id)
            self.send(wire.write_refusal(job.request_id, error))

        service.submit(job, refuse)

    def close(self) -> None:
        """Send what is queued."""
        self._outbox.put(None)
        self._writer.join(timeout=2.0)

    def _write(self) -> None:
        while True:
            messages = [self._outbox.get()]
            while len(messages) < MOST_AT_ONCE and not self._outbox.empty():
                messages.append(self._outbox.get())
            pieces = [piece for message in messages if message is not None for piece in wire.frame(message)]
            try:
                self._connection.sendall(b"".join(pieces))
            except OSError:
                return  # the front end is gone, which the reader notices
            if None in messages:
                return


def start_engine(message: wire.Start) -> tuple[Engine, wire.Started]:
    """Load the model and prove it with one forward pass. Torch comes in here."""
    from gemcut import llm

    files = llm.open_files(message.config)
    engine, used = llm.start_engine(message.config, files, max_waiting=message.max_waiting)
    warm_up(engine, files)
    prepare_grammars(engine)
    facts = {field.name: str(getattr(used, field.name)) for field in dataclasses.fields(used)}
    return engine, wire.Started(engine.scheduler.limits.max_model_len, facts)


def warm_up(engine: Engine, files: ModelFiles) -> None:
    """One token of an empty prompt. Raises GemcutError if the model cannot give it."""
    prompt = ChatPrompt(files.tokenizer.encode_raw(""), (), False)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    engine.add(Job(request_id="warm-up", prompt=prompt, params=params, chat=False))
    while not engine.idle:
        for update in engine.step():
            if update.output is not None and update.output.outputs[0].finish_reason != "length":
                raise GemcutError(f"The first forward pass failed: {update.output.outputs[0].error}")


def prepare_grammars(engine: Engine) -> None:
    """Read the vocabulary before anybody waits for it, or for a step beside it."""
    try:
        engine.grammars.prepare()
    except InvalidRequest as error:
        log.warning("requests for a form of the answer will be refused: %s", error)


def read_orders(orders: Orders, desk: Desk, service: Service) -> None:
    """The reading thread: until the front end quits or is gone."""
    while (message := orders.next()) is not None:
        if isinstance(message, wire.Submit):
            try:
                desk.take(service, message)
            except wire.BadFrame as error:
                orders.drop(error)
        elif isinstance(message, wire.Abort):
            service.abort(message.request_id)
        elif isinstance(message, wire.Ping):
            began = service.step_began_s
            age = 0.0 if began is None else time.monotonic() - began
            desk.send(wire.Pong(service.stats, age, orders.bad_frames))
        elif isinstance(message, wire.Quit):
            break
    service.stop()
    # a step that hangs must not keep a process without a front end alive
    time.sleep(3.0)
    os._exit(0)


def main(path: str, start: Start = start_engine) -> int:
    """Serve the front end that listens at `path`. Returns the exit status."""
    # Ctrl-C and systemd's SIGTERM reach all processes; this one ends when the front end has drained
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        orders, desk = Orders(connection), Desk(connection)
        message = orders.next()
        if not isinstance(message, wire.Start):
            return FAILED
        try:
            engine, started = start(message)
            service = Service(engine, desk.publish)
            desk.send(started)
            reader = threading.Thread(
                target=read_orders, args=(orders, desk, service), name="gemcut-orders", daemon=True
            )
            reader.start()
            service.run()
        except GemcutError as error:
            desk.send(wire.Failed(type(error).__name__, str(error)))
            desk.close()
            return FAILED
        except BaseException as error:
            log.exception("the engine failed")
            desk.send(wire.Failed("crash", f"{type(error).__name__}: {error}"))
            desk.close()
            return CRASHED
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    logging.shutdown()
    # threads of libraries may still be busy; nothing of this process is worth waiting for
    os._exit(status)
