"""A worker process that does on command what a decoder must not be able to do."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence

from gemcut.worker_pool import Buffer, ChildLimits, Handler, serve

GROWTH_BYTES = 1 << 30


def start(hello: memoryview) -> Handler:
    greeting = bytes(hello)
    if greeting == b"fail":
        raise SystemExit(3)

    def answer(frame: memoryview) -> Sequence[Buffer]:
        command, _, rest = bytes(frame).partition(b" ")
        if command == b"echo":
            return rest, b"!", greeting
        if command == b"print":
            print("stray output", flush=True)
            print("stray error", file=sys.stderr, flush=True)
            os.write(1, b"more")
            return (b"printed",)
        if command == b"sleep":
            time.sleep(float(rest))
            return (b"slept",)
        if command == b"exit":
            os._exit(int(rest))
        if command == b"memory":
            try:
                return (str(len(bytearray(int(rest)))).encode(),)
            except MemoryError:
                return (b"MemoryError",)
        if command == b"write":
            try:
                with open(rest, "wb") as file:
                    file.write(b"x")
            except OSError as error:
                return (type(error).__name__.encode(),)
            return (b"written",)
        if command == b"open":
            files = []
            try:
                while True:
                    files.append(open(os.devnull, "rb"))  # noqa: SIM115
            except OSError:
                return (str(len(files)).encode(),)
            finally:
                for file in files:
                    file.close()
        if command == b"cpu":
            return (str(resource.getrlimit(resource.RLIMIT_CPU)[0]).encode(),)
        if command == b"crash":
            os.abort()
        return (b"?",)

    return answer


if __name__ == "__main__":
    serve(start, ChildLimits(growth_bytes=GROWTH_BYTES, cpu_s=1.0))
