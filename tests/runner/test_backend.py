"""Which kernels an engine runs: what is named is taken or refused, what is left open is chosen and said."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch

from gemcut.config import EngineConfig
from gemcut.errors import ConfigError
from gemcut.kernels import Backend
from gemcut.runner import start

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def choose(device: torch.device, **settings: Any) -> tuple[Backend, tuple[tuple[str, str], ...]]:
    return start.choose_backend(EngineConfig(**settings), device)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of the H100's kind, and triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(start, "find_spec", lambda name: ModuleSpec(name, None))


@pytest.mark.usefixtures("card")
def test_a_gpu_runs_the_triton_kernels() -> None:
    assert choose(GPU) == (Backend("triton"), ())
    assert choose(GPU, numerics="fused") == (Backend("triton", "fused"), ())
    assert choose(GPU, deterministic=True) == (Backend("triton", deterministic=True), ())
    assert choose(GPU, kernels="torch") == (Backend("torch"), ())


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [("find_spec", None, "not installed"), ("get_device_capability", (7, 5), "7.5, they need 8.0")],
)
def test_a_gpu_that_cannot_says_why(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, reason: str
) -> None:
    owner = start if attribute == "find_spec" else torch.cuda
    monkeypatch.setattr(owner, attribute, lambda _: value)
    backend, without = choose(GPU)
    assert backend == Backend("torch")
    [(what, why)] = without
    assert what == "triton kernels"
    assert reason in why
    with pytest.raises(ConfigError, match=reason):
        choose(GPU, kernels="triton")
    with pytest.raises(ConfigError, match=reason):
        choose(GPU, deterministic=True)


@pytest.mark.usefixtures("card")
def test_torch_kernels_are_not_deterministic_on_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs the triton kernels"):
        choose(GPU, kernels="torch", deterministic=True)


def test_a_cpu_runs_the_torch_kernels_and_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU, deterministic=True) == (Backend("torch", deterministic=True), ())
    assert choose(CPU, kernels="triton")[0] == Backend("triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="need a GPU"):
        choose(CPU, kernels="triton")


def test_fused_numerics_need_triton() -> None:
    with pytest.raises(ConfigError, match="fused numerics need triton"):
        choose(CPU, numerics="fused")
