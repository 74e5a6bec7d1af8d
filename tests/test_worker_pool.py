"""The pool of killable processes, with a child that misbehaves on command."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from gemcut.errors import GemcutError, Overloaded
from gemcut.worker_pool import WorkerDied, WorkerOverran, WorkerPool


@pytest.fixture(autouse=True)
def _child_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def pool():
    made = WorkerPool("pool_child", count=1, deadline_s=20.0, hello=[b"he", b"llo"])
    yield made
    made.close()


def ask(pool: WorkerPool, words: str) -> str:
    return bytes(pool.submit([words.encode()]).result(30)).decode()


def stopped(pool: WorkerPool) -> int:
    """The pool's one process, frozen: whatever it is asked, it never answers."""
    ask(pool, "echo warm")
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    return pid


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_frames_of_any_size_and_several_pieces(pool):
    assert pool.pids() == []  # nothing starts before the first job
    assert ask(pool, "echo a b") == "a b!hello"
    big = bytes(range(256)) * 20_000
    answer = pool.submit([b"echo ", memoryview(big), b""]).result(30)
    assert answer == big + b"!hello"


def test_output_of_libraries_stays_out_of_the_frames(pool):
    assert ask(pool, "print") == "printed"
    assert ask(pool, "echo x") == "x!hello"


def test_what_a_child_may_not_do(pool, tmp_path):
    assert ask(pool, f"memory {1 << 20}") == str(1 << 20)
    assert ask(pool, f"memory {2 << 30}") == "MemoryError"
    target = tmp_path / "file"
    assert ask(pool, f"write {target}") == "OSError"
    assert not target.exists() or target.stat().st_size == 0
    assert int(ask(pool, "open")) < 32
    assert 1 <= int(ask(pool, "cpu")) <= 5


@pytest.mark.parametrize(("command", "cause"), [("exit 7", "exit status 7"), ("crash", "signal SIGABRT")])
def test_a_death_fails_its_job_alone(pool, command, cause):
    with pytest.raises(WorkerDied, match=cause):
        ask(pool, command)
    assert ask(pool, "echo next") == "next!hello"


def test_killed_in_the_middle(pool):
    pid = stopped(pool)
    running = pool.submit([b"echo lost"])
    following = pool.submit([b"echo kept"])
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        running.result(10)
    assert following.result(30) == b"kept!hello"
    assert gone(pid)  # reaped, no zombie


def test_killed_between_jobs_costs_nothing(pool):
    ask(pool, "echo warm")
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert ask(pool, "echo next") == "next!hello"
    assert gone(pid)


def test_deadline():
    pool = WorkerPool("pool_child", count=1, deadline_s=0.4)
    try:
        ask(pool, "echo warm")
        (pid,) = pool.pids()
        begun = time.monotonic()
        with pytest.raises(WorkerOverran, match=r"0\.4 s"):
            ask(pool, "sleep 30")
        assert time.monotonic() - begun < 2
        assert gone(pid)
        assert ask(pool, "echo next") == "next!"
        # also while the frame is still being sent
        os.kill(pool.pids()[0], signal.SIGSTOP)
        with pytest.raises(WorkerOverran):
            pool.submit([b"echo ", bytes(4 << 20)]).result(10)
    finally:
        pool.close()


def test_a_process_that_does_not_start_says_so(capfd):
    pool = WorkerPool("pool_child", count=1, deadline_s=1.0, hello=[b"fail"])
    with pytest.raises(GemcutError, match=r"did not start \(exit status 3\)"):
        ask(pool, "echo x")
    pool.close()
    missing = WorkerPool("no_such_child", count=1, deadline_s=1.0)
    with pytest.raises(GemcutError, match="no_such_child did not start"):
        ask(missing, "echo x")
    missing.close()
    assert "no_such_child" in capfd.readouterr().err  # why, is for the log


def test_cancelled_before_its_turn(pool):
    pid = stopped(pool)
    running = pool.submit([b"echo first"])
    waiting = pool.submit([b"exit 1"])
    assert waiting.cancel()
    os.kill(pid, signal.SIGCONT)
    assert running.result(10) == b"first!hello"
    assert ask(pool, "echo third") == "third!hello"
    assert pool.pids() == [pid]  # the cancelled job never ran
    with pytest.raises(CancelledError):
        waiting.result()


def test_the_queue_is_bounded():
    pool = WorkerPool("pool_child", count=1, deadline_s=20.0, max_waiting=2, max_waiting_bytes=1000)
    try:
        stopped(pool)
        running = pool.submit([b"echo 0"])
        while not running.running():
            time.sleep(0.01)
        pool.submit([b"echo 1"])
        with pytest.raises(Overloaded, match="1 jobs of 6 bytes wait") as refused:
            pool.submit([bytes(1000)])
        assert refused.value.retry_after_s > 0
        pool.submit([b"echo 2"])
        with pytest.raises(Overloaded):
            pool.submit([b"echo 3"])
    finally:
        pool.close()


def test_close_ends_what_runs_and_what_waits():
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    pool = WorkerPool("pool_child", count=1, deadline_s=20.0)
    pid = stopped(pool)
    running, waiting = pool.submit([b"echo 1"]), pool.submit([b"echo 2"])
    pool.close()
    for job in (running, waiting):
        with pytest.raises(GemcutError, match="were closed"):
            job.result(1)
    pool.close()
    with pytest.raises(GemcutError, match="were closed"):
        pool.submit([b"echo 3"])
    assert gone(pid)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (descriptors, threads)


def test_a_pool_that_is_forgotten_ends():
    pool = WorkerPool("pool_child", count=1, deadline_s=20.0)
    ask(pool, "echo x")
    (pid,) = pool.pids()
    del pool
    for _ in range(100):
        if gone(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the process outlived its pool")
