"""The experts' kernel for Hopper, whose warps share the work: on such a card, and what its compiler says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gemcut.kernels import Backend
from gemcut.kernels.case import Case
from gemcut.kernels.experts import triton as experts
from gemcut.kernels.experts.cases import case

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

COMPILE = """
import torch
from gemcut.kernels.compiled import compiled
from gemcut.kernels.experts.cases import case

size = dict(glu=False, experts=2, top_k=1, full_size=True)
for made in case(1000, hidden=512, width=704, **size), case(1000, hidden=400, width=64, **size):
    for found in compiled([made], torch.bfloat16):
        print(found.kernel, found.spilled, found.shared <= 232448)
"""


@pytest.mark.skipif(not HOPPER, reason="Gluon's kernels have no interpreter")
@pytest.mark.parametrize(
    "made",
    [
        case(
            700, glu=False, padding=5, hidden=400, width=128, experts=5
        ),  # a strip of 144; tails; NaN behind
        case(6000, glu=False, hidden=1024, width=64),  # more tiles than programs
        case(1000, glu=False, hidden=512, width=704, experts=3, top_k=1, full_size=True),
        case(3, glu=False, padding=2, hidden=256, width=64, experts=40),  # experts without rows
    ],
    ids=str,
)
def test_fetchers(made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "find_config", lambda *_: experts.FETCHERS)
    monkeypatch.setattr(experts, "SINGLE_PAIRS", 0)
    device = torch.device("cuda")
    inputs = made.make_inputs(torch.Generator(device).manual_seed(1), device, torch.bfloat16)
    want, got = made.run(inputs, Backend())["t"], made.run(inputs, Backend("triton"))["t"]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    for _ in range(5):
        assert torch.equal(made.run(inputs, Backend("triton"))["t"], got)


def test_fetchers_fit() -> None:
    # a process of its own: this one's kernels are interpreted where there is no GPU
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["_grouped_rows 0 True"] * 2
