"""The front end's hold on the engine's process: starts it, talks to it, notices its death, starts it again.

Enters: jobs. Leaves: for each a `Stream` of news. One event loop owns a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemcut.config import EngineConfig
from gemcut.engine.loop import Job
from gemcut.errors import ConfigError, GemcutError
from gemcut.outputs import Delta, RequestOutput, Stats
from gemcut.server import wire

log = logging.getLogger("gemcut.server")

MODULE = "gemcut.server.engine_main"
# of `Stats`, what only grows
COUNTERS = ("steps", "preemptions", "prefix_queries", "prefix_hits", "encoder_hits", "encoder_misses")
LABELLED = ("graph_replays", "eager_forwards", "dropped_graphs")  # the same, by label
State = Literal["starting", "ready", "restarting", "failed", "closed"]
Cause = Literal["step", "silence"]
CAUSES: tuple[Cause, ...] = ("step", "silence")


class EngineDied(GemcutError):
    """The engine's process ended while a request was in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """When the engine counts as dead.

    step_s: a step that takes longer has hung; 0 sets no limit. silence_s: no answer to pings for so long,
    as when a step hangs and lets no other thread run. start_s: loading, compiling, the first forward pass;
    neither of the others counts until then. end_s: what was killed and has not ended by then, as a process
    that a driver holds, is left behind. most_deaths in `within_s` give it up. Raises ConfigError.
    """

    step_s: float = 120.0
    silence_s: float = 60.0
    start_s: float = 1800.0
    ping_s: float = 0.5
    end_s: float = 10.0
    most_deaths: int = 5
    within_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.step_s >= 0:
            raise ConfigError(f"step_seconds must be 0, which sets no limit, or more; got {self.step_s}.")


class Stream:
    """News of one job. `next` gives what came since the last call."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._deltas: list[Delta] = []
        self._output: RequestOutput | None = None
        self._error: GemcutError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self, wait_s: float | None = None) -> tuple[list[Delta], RequestOutput | None]:
        """Deltas, and the output once all deltas are there. Nothing of either after `wait_s` without news.

        Raises what ended the job: InvalidRequest, Overloaded, EngineDied.
        """
        if not self._deltas and self._output is None and self._error is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            # once a token: asyncio.timeout takes three times as long
            timer = None if wait_s is None else loop.call_later(wait_s, self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        if self._error is not None and not self._deltas:
            raise self._error
        deltas, self._deltas = self._deltas, []
        return deltas, self._output

    def push(self, delta: Delta) -> None:
        """One more delta."""
        self._deltas.append(delta)
        self._wake()

    def finish(self, output: RequestOutput) -> None:
        """The whole output."""
        self._output = output
        self._wake()

    def fail(self, error: GemcutError) -> None:
        """There will be no output."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One engine process at a time.

    stats: of the present process as of the last ping, None before the first. kills: processes that were
    killed, by what they had not done in time. gave_up: set if it died too often.
    """

    def __init__(
        self, config: EngineConfig, *, max_waiting: int, watch: Watch | None = None, module: str = MODULE
    ) -> None:
        self.config, self.max_waiting, self.module = config, max_waiting, module
        self.watch = watch or Watch()
        self.state: State = "starting"
        self.started: wire.Started | None = None
        self.stats: Stats | None = None
        # what engines that died had counted, by field or by field and label
        self.past: Counter[str | tuple[str, str]] = Counter()
        self.num_restarts = 0
        self.kills: Counter[Cause] = Counter()
        self.bad_frames = 0
        self.pid: int | None = None
        self.gave_up = asyncio.Event()
        self.heard_s = 0.0  # monotonic time of the last message
        self.step_count_s = 0.0  # when the number of steps last grew
        self._streams: dict[str, Stream] = {}
        self._deaths: deque[float] = deque()
        self._verdict: str | None = None  # why the present process was killed
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process and wait until its engine is ready. Raises GemcutError if it cannot start."""
        reader = await self._launch()
        self._keeper = asyncio.create_task(self._keep(reader), name="engine-keeper")

    async def close(self) -> None:
        """End the process. Open streams fail."""
        self.state = "closed"
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._writer is not None:
            self._send(wire.Quit())
        await self._bury(grace_s=2.0)
        self._fail_all(EngineDied("The server is shutting down."))

    @property
    def is_ready(self) -> bool:
        """There is an engine, and it answers."""
        return self.state == "ready" and time.monotonic() - self.heard_s < self.watch.silence_s

    def submit(self, job: Job, *, streamed: bool) -> Stream:
        """Hand a job over. Raises EngineDied if there is no engine now."""
        if self.state != "ready":
            raise EngineDied("The engine is being restarted. Try again in a few seconds.")
        stream = self._streams[job.request_id] = Stream(job.request_id)
        self._send(wire.write_job(job, streamed))
        return stream

    def leave(self, stream: Stream) -> None:
        """The caller is done with a stream; the job ends if it has not."""
        if self._streams.pop(stream.request_id, None) is not None and self.state == "ready":
            self._send(wire.Abort(stream.request_id))

    @property
    def num_streams(self) -> int:
        """Jobs that are in the engine."""
        return len(self._streams)

    # ---- the process

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        """Read news until the engine dies, start another, and so on."""
        while True:
            watcher = asyncio.create_task(self._watch())
            try:
                reason = await self._read(reader)
            finally:
                watcher.cancel()
            self.state = "restarting"
            if self.stats is not None:
                self.past.update({name: getattr(self.stats, name) for name in COUNTERS})
                for name in LABELLED:
                    counts = getattr(self.stats, name)
                    self.past.update({(name, label): count for label, count in counts.items()})
                self.stats = None
            self._fail_all(EngineDied("The engine died while it worked on this request. Try again."))
            status = await self._bury()
            log.error("the engine died", extra={"fields": {"reason": reason, "exit_status": status}})
            while True:
                if self._is_hopeless():
                    self.state = "failed"
                    self.gave_up.set()
                    return
                self.num_restarts += 1
                try:
                    reader = await self._launch()
                    break
                except GemcutError as error:
                    log.error("the engine did not start again: %s", error)
                    await self._bury()

    def _is_hopeless(self) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > self.watch.within_s:
            self._deaths.popleft()
        return len(self._deaths) >= self.watch.most_deaths

    async def _launch(self) -> asyncio.StreamReader:
        """Start a process and wait until it says that it is ready."""
        began = time.monotonic()
        self._verdict = None
        folder = tempfile.mkdtemp(prefix="gemcut-")  # of mode 0700
        try:
            async with asyncio.timeout(self.watch.start_s):
                reader, self._writer = await self._spawn(os.path.join(folder, "engine"))
                self._send(wire.Start(self.config, self.max_waiting))
                message = await self._next(reader)
        except TimeoutError:
            await self._bury()
            raise GemcutError(f"The engine was not ready after {self.watch.start_s:g} s.") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(message, wire.Started):
            status = await self._bury()
            if isinstance(message, wire.Failed):
                raise GemcutError(message.message)
            raise GemcutError(f"The engine's process ended before it was ready (status {status}).")
        self.started, self.state = message, "ready"
        self.heard_s = self.step_count_s = time.monotonic()
        facts = {**message.used, "pid": self.pid, "seconds": round(time.monotonic() - began, 2)}
        log.info("the engine is ready", extra={"fields": facts})
        return reader

    async def _spawn(self, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A process and its connection. Raises GemcutError if it ends before it connects."""
        joined: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        joined = asyncio.get_running_loop().create_future()

        def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if joined.done():
                writer.close()
            else:
                joined.set_result((reader, writer))

        server = await asyncio.start_unix_server(on_connect, path, limit=1 << 20)
        try:
            # -P: a file in the user's folder is no module
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", self.module, path),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # what a library prints goes to the log
                env=_environment(),
            )
            self.pid = process.pid
            ended = asyncio.ensure_future(process.wait())
            await asyncio.wait({joined, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not joined.done():
                raise GemcutError(f"The engine's process did not start (status {process.returncode}).")
            ended.cancel()
            return joined.result()
        finally:
            server.close()

    async def _bury(self, grace_s: float = 0.2) -> int | None:
        """See the process to its end, which it may be coming to by itself. Returns its exit status, None if
        it has none."""
        process, writer = self._process, self._writer
        self._process = self._writer = self.pid = None
        status = None
        if process is not None:
            status = await _status(process, grace_s)
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                status = await _status(process, self.watch.end_s)
            if status is None:
                log.error("process %d was killed and does not end; it is left behind", process.pid)
        if writer is not None:
            writer.close()
        return status

    # ---- the conversation

    def _send(self, message: wire.ToEngine) -> None:
        assert self._writer is not None, "there is a connection"
        if not self._writer.is_closing():  # a death is noticed by `_read`
            self._writer.writelines(wire.frame(message))

    async def _next(self, reader: asyncio.StreamReader) -> wire.ToFrontEnd | None:
        """The next message, None at the end of the connection."""
        while True:
            try:
                (length,) = wire.HEAD.unpack(await reader.readexactly(wire.HEAD.size))
                if length > wire.MAX_FRAME:
                    return None
                body = await reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            try:
                return wire.read_answer(body)
            except wire.BadFrame as error:
                self.bad_frames += 1
                log.warning("a frame of the engine was dropped: %s", error)

    async def _read(self, reader: asyncio.StreamReader) -> str:
        """Hand out news until the connection ends. Returns why."""
        while (message := await self._next(reader)) is not None:
            self.heard_s = time.monotonic()
            if isinstance(message, wire.News):
                streams = self._streams
                for request_id, delta in message.deltas:
                    if (stream := streams.get(request_id)) is not None:
                        stream.push(delta)
                for output in message.outputs:
                    if (stream := streams.pop(output.request_id, None)) is not None:
                        stream.finish(output)
            elif isinstance(message, wire.Refused):
                if (stream := self._streams.pop(message.request_id, None)) is not None:
                    stream.fail(wire.refusal(message))
            elif isinstance(message, wire.Pong):
                self._note(message)
            elif isinstance(message, wire.Failed):
                return f"{message.kind}: {message.message}"
        return self._verdict or "its connection ended"

    def _note(self, pong: wire.Pong) -> None:
        if self.stats is None or pong.stats.steps != self.stats.steps:
            self.step_count_s = time.monotonic()
        self.stats = pong.stats
        if 0 < self.watch.step_s < pong.step_s:
            self._kill("step", f"a step has been going on for {pong.step_s:.0f} s")

    async def _watch(self) -> None:
        """Ping, and kill a process that is silent."""
        while True:
            self._send(wire.Ping())
            await asyncio.sleep(self.watch.ping_s)
            silent = time.monotonic() - self.heard_s
            if silent > self.watch.silence_s:
                self._kill("silence", f"it has been silent for {silent:.0f} s")
                return

    def _kill(self, cause: Cause, reason: str) -> None:
        """End the process, and its connection, which `_read` sees. A process that a driver holds does not
        end, but those who wait for it must not wait longer."""
        if self._verdict is not None:
            return
        self._verdict = reason
        self.kills[cause] += 1
        log.error("the engine is killed: %s", reason)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._writer is not None:
            self._writer.transport.abort()

    def _fail_all(self, error: GemcutError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)


async def _status(process: asyncio.subprocess.Process, within_s: float) -> int | None:
    """The exit status, None if the process goes on."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            return await process.wait()
    return None


def _environment() -> dict[str, str]:
    """This process's, and gemcut to be found where it was found."""
    environment = dict(os.environ)
    home = str(Path(__file__).resolve().parents[2])
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        paths = [home, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment
