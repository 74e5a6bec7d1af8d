"""What Hopper does that its predecessors do not.

Programmatic dependent launch: a kernel's start hides behind the end of the one before it.

A decode step launches some 400 kernels. Each would wait until the one before has drained, and then for its
own first loads. One that is launched with `**overlap(device)` may start earlier. Until `after_previous` it
may touch nothing but the model's parameters, which no kernel writes. Every kernel launched so must call it
in every program that reads or writes anything else: what came before the previous kernel is known to be over
only because the previous kernel waited for it.

So a kernel may look at results of the kernel before the previous one without waiting, if the previous kernel
let it start only after its own wait (`wait_for_previous`, then `start_next`). It reads them past the L1 cache
(".cg"), where an earlier run's may still lie.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import cuda

log = logging.getLogger(__name__)

GLUON = "3.6."  # the version of triton that kernels in Gluon are written for, and were measured with


@cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options and the constant OVERLAP: on from Hopper on."""
    able = device.type == "cuda" and copies_tiles(device)
    return {"OVERLAP": able, "launch_pdl": able}


@cache
def copies_tiles(device: torch.device) -> bool:
    """Whether the copy engine fetches whole tiles: from Hopper on, and in the interpreter."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def is_hopper(device: torch.device) -> bool:
    """Capability 9.0 exactly, for kernels in Gluon; also a CPU on which kernels are only compiled.

    Gluon's interface changes with every version of triton: another one than `GLUON` runs the plain kernels.
    """
    if device.type == "cpu":
        return not knobs.runtime.interpret and triton.__version__.startswith(GLUON)
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if not triton.__version__.startswith(GLUON):
        log.warning(
            "triton %s: the kernels made for Hopper want %sx, slower ones run in their place",
            triton.__version__,
            GLUON,
        )
        return False
    return True


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """Let the next kernel start once every program has come here."""
    if OVERLAP:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the previous kernel is over and its writes can be read."""
    if OVERLAP:
        cuda.gdc_wait()


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Let the next kernel start; wait until the previous one is over and its writes can be read."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
