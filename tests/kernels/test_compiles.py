"""Kernels compile for Hopper at the sizes of 26B-A4B without spilling; no GPU is needed."""

from __future__ import annotations

import os
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
    "sample R=1 V=262144 max_top_k=64",
    "paged_attention prefill 256 D=256",
    "paged_attention prefill 256 D=512",
    "paged_attention decode 8",
    "tower_attention 2520",
)


@pytest.mark.slow
def test_no_kernel_spills() -> None:
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
    assert not [line for line in lines if " 0 B spilled" not in line]
