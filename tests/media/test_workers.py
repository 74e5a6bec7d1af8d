"""Pictures in worker processes: the same bytes, and nothing that a file does reaches this process."""

from __future__ import annotations

import asyncio
import io
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gemcut
from gemcut.errors import GemcutError, InvalidRequest
from gemcut.media.image import MAX_BYTES, patches
from gemcut.media.workers import MediaWorkers


def encoded(width: int = 90, height: int = 60, kind: str = "PNG", seed: int = 0, mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 4), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, kind)
    return out.getvalue()


@dataclass(frozen=True)
class Part:
    part: dict[str, Any]
    param: str = "messages.0.content.0"
    kind: str = "image"


@pytest.fixture(scope="module")
def workers():
    with MediaWorkers(count=2, deadline_s=20.0) as made:
        yield made


def same(a, b) -> bool:
    return (
        np.array_equal(a.pixels, b.pixels)
        and (a.rows, a.columns, a.digest) == (b.rows, b.columns, b.digest)
        and a.pixels.dtype == b.pixels.dtype
    )


def frozen(workers: MediaWorkers) -> int:
    """The process of a pool of one, stopped: it will not answer."""
    workers.patches(encoded()).result(30)
    (pid,) = workers.pids()
    os.kill(pid, signal.SIGSTOP)
    return pid


def children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_equal_to_in_process(workers, tmp_path):
    sources = [
        encoded(kind=kind, mode=mode, seed=i)
        for i, (kind, mode) in enumerate(
            [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "LA"), ("JPEG", "RGB"), ("WEBP", "RGBA")]
        )
    ]
    for budget in (70, 280, 1120):
        futures = [workers.patches(source, budget) for source in sources]
        for source, future in zip(sources, futures, strict=True):
            assert same(future.result(30), patches(source, budget))
    path = tmp_path / "picture.png"
    path.write_bytes(sources[0])
    picture = Image.open(path)
    for source in (
        path,
        str(path),
        bytearray(sources[0]),
        memoryview(sources[0]),
        picture,
        np.array(picture),
    ):
        assert same(workers.patches(source).result(30), patches(source))
    assert workers.patches(path).result(30).pixels.flags.writeable  # torch warns of others


def test_decoded_pictures_start_no_process():
    with MediaWorkers() as workers:
        assert workers.patches(Image.new("L", (50, 50))).done()
        assert workers.pids() == []


def test_errors_are_those_of_in_process(workers, tmp_path):
    png = encoded()
    for source, budget in [
        (b"", 280),
        (b"BM nothing", 280),
        (png[: len(png) // 2], 280),
        (png, 71),
        (png, -1),
        (bytes(MAX_BYTES + 1), 280),
        (tmp_path / "none.png", 280),
        (tmp_path, 280),
        (3.5, 280),
    ]:
        with pytest.raises(InvalidRequest) as here:
            patches(source, budget)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest) as there:
            workers.patches(source, budget).result(30)
        if budget != -1:  # no field for it: refused all the same
            assert str(here.value) == str(there.value)
        assert here.value.param == there.value.param


def test_bombs_cost_this_process_nothing(workers):
    bombs = []
    for side in (9_900, 10_001):  # below and above the limit of pixels; both compress to some 10 KB
        out = io.BytesIO()
        Image.new("1", (side, side)).save(out, "PNG")
        bombs.append(out.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken, refused = [workers.patches(bomb) for bomb in bombs]
    assert taken.result(30).soft_tokens == 256
    with pytest.raises(InvalidRequest, match=r"100,020,001 pixels; at most 100,000,000"):
        refused.result(30)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.slow
def test_a_picture_has_256_mb(workers):
    """What phones take fits, turned too; what does not is refused, and the process has grown by no more."""

    def file(kind: str, mode: str, size: tuple[int, int], **options: Any) -> bytes:
        out = io.BytesIO()
        Image.new(mode, size, (9, 9, 9, 128)[: len(mode)]).save(out, kind, **options)
        return out.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    fit = [
        file("JPEG", "RGB", (8_160, 6_120), exif=turned),
        file("PNG", "RGBA", (8_000, 5_000), compress_level=1),
        file("WEBP", "RGB", (4_500, 3_000), method=0),
    ]
    for data in fit:
        assert workers.patches(data).result(60).soft_tokens > 0
    for data, why in (
        (file("JPEG", "RGB", (9_900, 9_900)), "more than the 256 MB of memory"),
        (file("PNG", "RGBA", (9_900, 9_900), compress_level=1), "more than the 256 MB of memory"),
        (file("WEBP", "RGB", (8_000, 6_000), method=0), "48,000,000 pixels; at most 15,000,000"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            workers.patches(data).result(60)
    lines = [line for pid in workers.pids() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    assert max(peaks) < (256 + 64) << 10  # KiB; Python, numpy and Pillow have less than 64 MB


def test_memory_is_limited():
    code = """
        import io, resource
        from PIL import Image
        from gemcut.media import worker_main
        out = io.BytesIO()
        Image.new("RGB", (9000, 9000)).save(out, "PNG", compress_level=1)
        frame = memoryview(worker_main.JOB.pack(280, 10**9) + out.getvalue())
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
        answer = worker_main.answer(frame)
        print(answer[0][0], bytes(answer[1]).decode())
    """
    said = run(code)
    assert said.startswith("1 Decoding the picture of")
    assert "MB of memory" in said


def test_killed_in_a_decode():
    with MediaWorkers(count=1, deadline_s=20.0) as workers:
        pid = frozen(workers)
        lost, kept = workers.patches(encoded()), workers.patches(encoded(seed=1))
        time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InvalidRequest, match=r"picture of [\d,]+ bytes ended \(signal SIGKILL\)"):
            lost.result(10)
        assert same(kept.result(30), patches(encoded(seed=1)))


def test_deadline():
    with MediaWorkers(count=1, deadline_s=1.0) as workers:
        pid = frozen(workers)
        with pytest.raises(InvalidRequest, match=r"took longer than 1 s and was ended. Send a smaller one."):
            workers.patches(encoded()).result(10)
        assert workers.pids() != [pid]
        assert workers.patches(encoded()).result(30).soft_tokens > 0


def test_cancel():
    with MediaWorkers(count=1, deadline_s=20.0) as workers:
        pid = frozen(workers)
        first, second = workers.patches(encoded()), workers.patches(encoded(seed=1))
        assert second.cancel()
        assert first.cancel()  # it runs on, but nobody waits for it
        os.kill(pid, signal.SIGCONT)
        assert workers.patches(encoded(seed=2)).result(30).soft_tokens > 0
        assert workers.pids() == [pid]


def test_asyncio(workers):
    async def several():
        futures = [asyncio.wrap_future(workers.patches(encoded(seed=i))) for i in range(5)]
        return await asyncio.gather(*futures)

    for i, picture in enumerate(asyncio.run(several())):
        assert same(picture, patches(encoded(seed=i)))


def test_load_keeps_the_order_and_names_the_part(workers, tmp_path):
    path = tmp_path / "local.png"
    path.write_bytes(encoded(seed=99))
    parts = [Part({"type": "image", "image": encoded(seed=i)}) for i in range(12)]
    parts.append(Part({"type": "image", "path": str(path)}))
    loaded = workers.load(parts, 70)
    for i, picture in enumerate(loaded[:12]):
        assert same(picture, patches(encoded(seed=i), 70))
    assert same(loaded[12], patches(path, 70))
    for bad in ({"type": "image", "image": b"no"}, {"type": "image", "url": "http://x/"}):
        with pytest.raises(InvalidRequest) as refused:
            workers.load([*parts, Part(bad, "messages.7.content.1")], 70)
        assert refused.value.param == "messages.7.content.1"
    with pytest.raises(InvalidRequest, match="takes no audio"):
        workers.load([Part({"type": "audio"}, kind="audio")], 70)
    with pytest.raises(InvalidRequest, match="cannot name a local file"):
        workers.load_request([parts[12]], 70)


def test_200_jobs_with_random_kills_leave_nothing():
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    before = set(children())
    dice = random.Random(0)
    data = [encoded(seed=i) for i in range(8)]
    expected = [patches(d).digest for d in data]
    ended, killed = 0, 0
    with MediaWorkers(count=2, deadline_s=20.0) as workers:
        for _ in range(20):
            futures = [(i, workers.patches(data[i])) for i in dice.choices(range(8), k=10)]
            for i, future in futures:
                if dice.random() < 0.1 and (pids := workers.pids()):
                    os.kill(dice.choice(pids), signal.SIGKILL)
                    killed += 1
                try:
                    assert future.result(30).digest == expected[i]
                except InvalidRequest as error:
                    ended += "SIGKILL" in str(error)
        assert workers.patches(data[0]).result(30).digest == expected[0]
    assert killed > 5
    assert ended <= killed
    assert set(children()) == before  # zombies would be among them
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (descriptors, threads)


def test_closed():
    workers = MediaWorkers(count=1)
    workers.close()
    workers.close()
    with pytest.raises(GemcutError, match="were closed"):
        workers.patches(encoded())


def run(code: str, *arguments: str) -> str:
    root = Path(gemcut.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
    )
    return done.stdout


def test_a_worker_is_light(tmp_path):
    said = run("""
        import sys
        import gemcut.media.worker_main
        print([m for m in ("torch", "transformers", "jinja2", "asyncio", "tokenizers") if m in sys.modules])
    """)
    assert said.strip() == "[]"


def test_an_unguarded_script_and_its_death(tmp_path):
    # a file of the user's that bears the name of a module must not come between
    (tmp_path / "struct.py").write_text("raise SystemExit('the wrong struct')")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import io, os, sys
            sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
            from PIL import Image
            from gemcut.media.workers import MediaWorkers
            print("once")
            out = io.BytesIO()
            Image.new("RGB", (60, 40)).save(out, "PNG")
            workers = MediaWorkers(count=2)
            print(workers.patches(out.getvalue()).result(30).soft_tokens)
            print(*workers.pids(), flush=True)
            if sys.argv[1] == "kill":
                os.kill(os.getpid(), 9)
        """)
    )
    root = Path(gemcut.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for how, code in (("end", 0), ("kill", -9)):  # without close: the processes see that their pipe ended
        done = subprocess.run(
            [sys.executable, str(script), how],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == code, done.stderr
        once, tokens, pids = done.stdout.splitlines()
        assert (once, int(tokens) > 0) == ("once", True)
        for pid in pids.split():
            for _ in range(100):
                state = Path(f"/proc/{pid}/stat")
                if not state.exists() or state.read_text().rsplit(")")[1].split()[0] == "Z":
                    break  # a zombie is the init process's to reap
                time.sleep(0.05)
            else:
                raise AssertionError(f"process {pid} outlived its parent")
