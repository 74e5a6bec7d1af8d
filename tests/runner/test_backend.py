"""Kernels and graphs of an engine: what is named is taken or refused, what is open is chosen and said."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from sizes import config

from gemcut.config import EngineConfig
from gemcut.errors import ConfigError
from gemcut.kernels import Backend
from gemcut.plan import parse_config
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


# ---- graphs


def graphs(backend: Backend, device: torch.device, mode: Any) -> Any:
    return start.choose_graphs(EngineConfig(graphs=mode), backend, device)


def test_graphs_are_tried_from_whole_steps_to_pieces() -> None:
    triton = Backend("triton")
    assert graphs(triton, GPU, "auto") == (("full", "piecewise"), ())
    assert graphs(triton, GPU, "full") == (("full",), ())
    assert graphs(triton, GPU, "piecewise") == (("piecewise",), ())
    assert graphs(triton, GPU, "off") == ((), ())


def test_graphs_need_a_gpu_and_the_triton_kernels() -> None:
    kinds, [(what, why)] = graphs(Backend("torch"), GPU, "auto")
    assert (kinds, what) == ((), "CUDA graphs")
    assert "torch kernels wait" in why
    assert graphs(Backend("torch"), CPU, "auto") == ((), ()), "a CPU misses nothing"
    for mode in ("full", "piecewise"):
        with pytest.raises(ConfigError, match=r"graphs cannot be .* need a GPU"):
            graphs(Backend("torch"), CPU, mode)
        with pytest.raises(ConfigError, match=r"graphs cannot be .* torch kernels wait"):
            graphs(Backend("torch"), GPU, mode)


def test_the_cache_leaves_room_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """26B-A4B on a card of 80 GB: what is kept for graphs is missing in the cache, and nothing else is."""
    gigabyte = 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (28 * gigabyte, 80 * gigabyte))
    plan = parse_config(config("26B-A4B"))
    work = start.step_bytes(plan.text, 2048, 64, 2, fused=True)
    assert 0.3 * gigabyte < work < 1.5 * gigabyte

    def budget(graph_bytes: int) -> int:
        return start.kv_budget(EngineConfig(), plan, GPU, 2, 8192, 2048, work, graph_bytes)

    assert budget(0) == 20 * gigabyte - work
    assert budget(0) - budget(2 * gigabyte) == 2 * gigabyte
    with pytest.raises(ConfigError, match=r"graphs 20.0 GB \(--graphs off\)"):
        budget(20 * gigabyte)
