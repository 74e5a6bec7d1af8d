"""Compiles kernels side by side. One after another, as they are first launched, costs a start a minute.

Enters: a function that launches kernels. Leaves: the same kernels, compiled by several threads, in the
process and in Triton's cache on disk. The compiler holds Python's lock only while it reads a kernel's source.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton import knobs
from triton.runtime.jit import JITFunction

log = logging.getLogger(__name__)

MOST_THREADS = 16


def precompile(run: Callable[[], object]) -> int:
    """Compile what `run` launches, and return how many kernels that were.

    `run` is called without launching anything: whatever kernels should have computed is left as it was, so it
    must not act on values. That holds only as long as no kernel of ours is compiled: in a process that
    has launched some, nothing is done, and the rest is compiled at its first launch. A kernel that does not
    compile raises there, with its caller in sight.
    """
    if any(any(caches[0] for caches in kernel.device_caches.values()) for kernel in _kernels()):
        return 0
    found: dict[tuple[str, str], tuple[JITFunction[Any], str]] = {}

    def note(*, key: str, fn: Any, compile: Any, **_: Any) -> bool:
        found[fn.name, key] = fn.jit_function, compile["specialization_data"]
        return True  # neither compile nor launch

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        run()
    finally:
        knobs.runtime.jit_cache_hook = before
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        # an error is met again where the kernel is launched
        list(pool.map(lambda entry: _compile(*entry), found.values()))
    return len(found)


def _compile(kernel: JITFunction[Any], data: str) -> None:
    try:
        kernel.preload(data)
    except Exception:  # whatever it is, the kernel's own launch meets it again
        log.debug("%s is left to its first launch", kernel.__name__, exc_info=True)


def _kernels() -> Iterator[JITFunction[Any]]:
    """All kernels that are imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("gemcut.kernels."):
            yield from (value for value in vars(module).values() if isinstance(value, JITFunction))
