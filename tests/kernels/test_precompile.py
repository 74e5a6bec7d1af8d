"""Kernels are compiled side by side before they are launched, under the keys that launches look for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# a process of its own: this one's kernels are interpreted where there is no GPU. Nothing is launched
SCRIPT = """
import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gemcut.kernels import Backend
from gemcut.kernels.case import all_cases
from gemcut.kernels.compiled import _NoDevice
from gemcut.kernels.precompile import precompile

driver.set_active(_NoDevice())
names = "glu T=5 I=96", "prepare_qkv demo T=4", "paged_attention mixed D=16 G=2 W=12"
cases = [case for case in all_cases() if str(case) in names]
made_of = torch.Generator().manual_seed(0), torch.device("cpu"), torch.bfloat16
inputs = [case.make_inputs(*made_of) for case in cases]


def run():
    for case, given in zip(cases, inputs, strict=True):
        case.run(given, Backend("triton"))


print(len(cases), precompile(run))
missed = []
knobs.runtime.jit_cache_hook = lambda **found: missed.append(found["fn"].name)
launch = JITFunction.run
JITFunction.run = lambda self, *given, warmup, **named: launch(self, *given, warmup=True, **named)
run()
print(missed, precompile(run))
"""


def test_kernels_are_compiled_under_the_keys_of_their_launches(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    # chunks and single rows are two kernels; a process that has kernels compiles no more at once
    assert run.stdout.split("\n")[:2] == ["3 4", "[] 0"]
