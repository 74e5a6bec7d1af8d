"""Kernels compile for Hopper at the sizes of 26B-A4B and fit: registers, shared memory. No GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

WORDS = (
    "add_norm T=64 H=2816",
    "add_norm_moe T=8192",
    "close_layer T=8192 H=2816",
    "close_layer_moe T=64",
    "glu T=64 I=2112",
    "linear T=8 2816x4096",
    "linear T=64 8192x2816",
    "prepare_qkv 26B S T=64",
    "prepare_qkv 26B F T=64",
    "route_experts T=64",
    "per_layer T=64",
    "per_layer_inputs T=64",
    "prepare_q E2B F T=64",
    "sample R=1 V=262144 max_top_k=64",
    "sample R=64 V=262144 max_top_k=None",
    "paged_attention prefill 256 D=256",
    "paged_attention prefill 256 D=512",
    "paged_attention prefill 1024 D=512",
    "paged_attention decode 8",
    "tower_attention 2520",
)
FEW = 32  # bytes: some scalars from one loop to the next; a tile that does not fit takes hundreds
SHARED = 232_448  # bytes that a program may have


@pytest.mark.slow
def test_kernels_fit() -> None:
    # a process of its own: this one's kernels are interpreted where there is no GPU
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "gemcut.kernels.compiled", *WORDS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) >= len(WORDS)
    found = [re.search(r"(\d+) B spilled +(\d+) B shared", line) for line in lines]
    sizes = [(int(match[1]), int(match[2])) for match in found if match]
    assert len(sizes) == len(lines)
    large = [
        line for line, (spilled, shared) in zip(lines, sizes, strict=True) if spilled > FEW or shared > SHARED
    ]
    assert not large, "\n".join(large)
