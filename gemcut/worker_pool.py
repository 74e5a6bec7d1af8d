"""Worker processes for work that may crash, hang or eat memory: a frame goes in, a frame comes out.

The parent's half is `WorkerPool`, the child's is `serve`. A job that overruns its deadline, or whose process
dies, fails alone: its process is replaced and the others go on. Frames are bytes with a length before them,
over the child's standard pipes; what is in them is for the two ends to say, and nothing is ever unpickled.

Processes start as `python -m MODULE`, on the first job that finds no idle one, so a script without the guard
`if __name__ == "__main__"` is never run twice. They end when their pipe does: with `close`, or with the
parent, however it dies.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from gemcut.errors import GemcutError, Overloaded

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20
_READY = b"ready"

Buffer = bytes | bytearray | memoryview


class WorkerDied(GemcutError):
    """The process of a job ended before its answer. `cause`: how, in words."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"The worker process ended: {cause}.")
        self.cause = cause


class WorkerOverran(GemcutError):
    """A job took longer than its deadline, and its process was killed."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"The worker process took longer than {deadline_s:g} s and was ended.")
        self.deadline_s = deadline_s


class _PipeEnded(Exception):
    """The other end is gone."""


@dataclass(slots=True, eq=False)
class _Job:
    frame: Sequence[Buffer]
    result: Future[bytearray]
    size: int


@dataclass(slots=True)
class _Shared:
    """What the pool and its threads hold in common; a pool that is forgotten can still be closed."""

    lock: threading.Condition
    jobs: deque[_Job] = field(default_factory=deque)
    waiting_bytes: int = 0
    num_idle: int = 0
    closed: bool = False
    threads: list[threading.Thread] = field(default_factory=list)
    children: set[_Child] = field(default_factory=set)


class WorkerPool:
    """Up to `count` processes that run `module`. Safe to use from several threads.

    deadline_s: for one job. start_s: for a process until it is ready. hello: sent to each process first.
    max_waiting, max_waiting_bytes: jobs, and bytes of their frames, that may wait for a process.
    """

    def __init__(
        self,
        module: str,
        *,
        count: int,
        deadline_s: float,
        start_s: float = 60.0,
        hello: Sequence[Buffer] = (),
        max_waiting: int = 256,
        max_waiting_bytes: int = 512 << 20,
    ) -> None:
        self.module, self.count, self.deadline_s = module, count, deadline_s
        self._start_s, self._hello = start_s, tuple(hello)
        self._max_waiting, self._max_waiting_bytes = max_waiting, max_waiting_bytes
        self._shared = _Shared(threading.Condition())
        self._finalizer = weakref.finalize(self, _shut, self._shared)

    def submit(self, frame: Sequence[Buffer]) -> Future[bytearray]:
        """Queue a job: the pieces of its frame. The future gives the answer's frame.

        It raises `WorkerDied` or `WorkerOverran`. A job that is cancelled before its turn costs nothing; one
        that runs goes on to its end. Raises Overloaded when too much waits.
        """
        size = sum(len(piece) for piece in frame)
        job = _Job(frame, Future(), size)
        shared = self._shared
        with shared.lock:
            if shared.closed:
                raise GemcutError("The worker processes were closed.")
            if shared.jobs and (
                len(shared.jobs) >= self._max_waiting or shared.waiting_bytes + size > self._max_waiting_bytes
            ):
                raise Overloaded(
                    f"{len(shared.jobs)} jobs of {shared.waiting_bytes:,} bytes wait for {self.count} worker "
                    "processes; that is all that may. Try again.",
                    retry_after_s=1.0,
                )
            shared.jobs.append(job)
            shared.waiting_bytes += size
            if shared.num_idle < len(shared.jobs) and len(shared.threads) < self.count:
                child = _Child(self.module, self._hello, self._start_s)
                thread = threading.Thread(
                    target=_work,
                    args=(shared, child, self.deadline_s),
                    name=f"{self.module}-{len(shared.threads)}",
                    daemon=True,
                )
                shared.threads.append(thread)
                shared.children.add(child)
                thread.start()
            shared.lock.notify()
        return job.result

    def pids(self) -> list[int]:
        """Ids of the processes that are there now."""
        with self._shared.lock:
            return [child.pid for child in self._shared.children if child.pid is not None]

    def close(self) -> None:
        """End all processes; what runs or waits fails. May be called again."""
        self._finalizer()
        for thread in self._shared.threads:
            if thread is not threading.current_thread():
                thread.join()


def _shut(shared: _Shared) -> None:
    """Kill the processes and let the threads go. No waiting: the garbage collector may call it anywhere."""
    with shared.lock:
        shared.closed = True
        jobs = list(shared.jobs)
        shared.jobs.clear()
        shared.waiting_bytes = 0
        shared.lock.notify_all()
        for child in shared.children:
            child.kill()
    for job in jobs:
        if job.result.set_running_or_notify_cancel():
            job.result.set_exception(GemcutError("The worker processes were closed."))


def _work(shared: _Shared, child: _Child, deadline_s: float) -> None:
    """The thread of one process: takes jobs in turn. It holds no reference to the pool."""
    try:
        while True:
            with shared.lock:
                shared.num_idle += 1
                while not shared.jobs and not shared.closed:
                    shared.lock.wait()
                shared.num_idle -= 1
                if shared.closed:
                    return
                job = shared.jobs.popleft()
                shared.waiting_bytes -= job.size
            if not job.result.set_running_or_notify_cancel():
                continue
            try:
                answer = child.call(job.frame, deadline_s)
            except BaseException as error:
                closed = shared.closed and not isinstance(error, WorkerOverran)
                job.result.set_exception(
                    GemcutError("The worker processes were closed.") if closed else error
                )
            else:
                job.result.set_result(answer)
            del job  # a picture is not to be kept until the next one comes
    finally:
        child.end()


class _Child:
    """One process, started when a job needs it. Used by one thread; `kill` may come from any."""

    def __init__(self, module: str, hello: Sequence[Buffer], start_s: float) -> None:
        self._module, self._hello, self._start_s = module, hello, start_s
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._lock = threading.Lock()  # between `kill` and the birth and death of the process

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def call(self, frame: Sequence[Buffer], deadline_s: float) -> bytearray:
        """Send a frame and wait for the answer."""
        process = self._process
        if process is not None and process.poll() is not None:
            self.end()  # it died between two jobs; none of them is to blame
        for tries_left in (2, 1, 0):
            if self._process is not None or self._start(tries_left):
                break
        assert self._process is not None, "the process was started"
        try:
            return self._exchange(frame, time.monotonic() + deadline_s)
        except TimeoutError:
            self._process.kill()
            self.end()
            raise WorkerOverran(deadline_s) from None
        except _PipeEnded:
            raise WorkerDied(self.end()) from None

    def kill(self) -> None:
        """End the process now, and start no other."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def end(self) -> str:
        """Kill and reap the process and close its pipes. Returns how it ended."""
        process = self._process
        if process is None:
            return "it was not running"
        try:
            # its pipe is shut, or it overran; if it is dying by itself, its own cause is wanted
            process.wait(0.2 if process.poll() is None and not self._killed else 0)
        except subprocess.TimeoutExpired:
            process.kill()
        code = process.wait()
        assert process.stdin is not None, "the process has pipes"
        assert process.stdout is not None, "the process has pipes"
        process.stdin.close()
        process.stdout.close()
        with self._lock:
            self._process = None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def _start(self, tries_left: int) -> bool:
        """Whether the process is there. False if a signal ended it before it was ready: no job is to blame,
        and it may be tried again."""
        with self._lock:
            if self._killed:
                raise GemcutError("The worker processes were closed.")
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],  # -P: a file of the user's folder is no module
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=_environment(),
            )
        process = self._process
        assert process.stdin is not None, "the process has pipes"
        assert process.stdout is not None, "the process has pipes"
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        try:
            answer = self._exchange(self._hello, time.monotonic() + self._start_s)
        except TimeoutError:
            self.end()
            raise GemcutError(
                f"The worker process {self._module} was not ready in {self._start_s:g} s."
            ) from None
        except _PipeEnded:
            how = self.end()
            if tries_left and how.startswith("signal") and not self._killed:
                return False
            raise GemcutError(f"The worker process {self._module} did not start ({how}).") from None
        assert bytes(answer) == _READY, "a worker process begins with the word ready"
        return True

    def _exchange(self, frame: Sequence[Buffer], deadline: float) -> bytearray:
        process = self._process
        assert process is not None, "there is a process"
        assert process.stdin is not None, "the process has pipes"
        assert process.stdout is not None, "the process has pipes"
        target, source = process.stdin.fileno(), process.stdout.fileno()
        head = _LENGTH.pack(sum(len(piece) for piece in frame))
        for piece in (head, *frame):
            _send(target, piece, deadline)
        (length,) = _LENGTH.unpack(_receive(source, _LENGTH.size, deadline))
        return _receive(source, length, deadline)


def _send(target: int, piece: Buffer, deadline: float) -> None:
    view = memoryview(piece).cast("B")
    while view:
        try:
            view = view[os.write(target, view[:_CHUNK]) :]
        except BlockingIOError:
            _wait(target, select.POLLOUT, deadline)
        except BrokenPipeError:
            raise _PipeEnded from None


def _receive(source: int, length: int, deadline: float) -> bytearray:
    frame = bytearray(length)
    view = memoryview(frame)
    while view:
        try:
            count = os.readv(source, [view[:_CHUNK]])
        except BlockingIOError:
            _wait(source, select.POLLIN, deadline)
            continue
        if count == 0:
            raise _PipeEnded
        view = view[count:]
    return frame


def _wait(pipe: int, event: int, deadline: float) -> None:
    left = deadline - time.monotonic()
    poll = select.poll()
    poll.register(pipe, event)
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError


def _environment() -> dict[str, str]:
    """The parent's, with one thread for the numeric libraries, and gemcut to be found where it was found."""
    environment = dict(os.environ)
    environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    home = str(Path(__file__).resolve().parents[1])
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        paths = [home, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


# ---------------------------------------------------------------------------------- in the child


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildLimits:
    """What a worker process may use: bytes of address space beyond what it has when it is ready, seconds of
    CPU for one job, descriptors, and bytes of stack where recursion is to be caught early."""

    growth_bytes: int
    cpu_s: float
    descriptors: int = 32
    stack_bytes: int | None = None


Handler = Callable[[memoryview], Sequence[Buffer]]


def _mapped_bytes() -> int:
    """Address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def serve(start: Callable[[memoryview], Handler], limits: ChildLimits) -> None:
    """The life of a worker process. `start` gets the hello frame and gives what answers the jobs' frames.

    A handler does not raise: an exception ends the process, and the parent sees a death.
    """
    source, target = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # what a library prints must not get between the frames
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    hello = _read_frame(source)
    if hello is None:
        return
    handler = start(hello)
    os.dup2(nowhere, 2)  # from here on libraries would write about hostile input
    os.close(nowhere)
    for what, most in (
        (resource.RLIMIT_AS, _mapped_bytes() + limits.growth_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, limits.descriptors),
    ):
        resource.setrlimit(what, (most, most))
    if limits.stack_bytes is not None:  # the main thread's stack grows on demand, up to the limit of now
        resource.setrlimit(resource.RLIMIT_STACK, (limits.stack_bytes, limits.stack_bytes))
    _write_frame(target, [_READY])
    while (frame := _read_frame(source)) is not None:
        # The parent has its own clock; this one counts if the parent is gone.
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime + limits.cpu_s) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        answer = handler(frame)
        del frame
        _write_frame(target, answer)


def _read_frame(source: int) -> memoryview | None:
    """The next frame, None when the parent is gone."""
    head = _read(source, _LENGTH.size)
    if head is None:
        return None
    return _read(source, _LENGTH.unpack(head)[0])


def _read(source: int, length: int) -> memoryview | None:
    frame = bytearray(length)
    view = memoryview(frame)
    while view:
        count = os.readv(source, [view[:_CHUNK]])
        if count == 0:
            return None
        view = view[count:]
    return memoryview(frame)


def _write_frame(target: int, frame: Sequence[Buffer]) -> None:
    for piece in (_LENGTH.pack(sum(len(piece) for piece in frame)), *frame):
        view = memoryview(piece).cast("B")
        while view:
            view = view[os.write(target, view[:_CHUNK]) :]
