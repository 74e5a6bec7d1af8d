"""`gemcut doctor`: what this machine has, and one question to the demo checkpoint."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from gemcut.cli import options, terminal

Status = Literal["ok", "warn", "fail"]
PYTHONS = (3, 11), (3, 13)
REQUIRED = {  # as in pyproject.toml, which is not installed with the package
    "torch": "2.11", "numpy": "2.0", "pillow": "12.0", "tokenizers": "0.22", "safetensors": "0.6",
    "huggingface-hub": "1.0", "jinja2": "3.1",
}  # fmt: skip
# ISA extensions that decide how fast a CPU multiplies matrices
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve")
MIN_CAPABILITY = (8, 0)  # bfloat16 in hardware
QUESTION, EXPECTED = "What does the sign say?", "GEMCUT"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `remedy`: what to do about it, where something is to be done."""

    name: str
    status: Status
    value: str
    remedy: str = ""


def doctor(json: options.Json = False) -> None:
    """Check the machine and the installation.

    Prints the environment, and whether the demo checkpoint answers here. Every line is ok, warn or fail;
    the exit code is 1 if one is fail.
    """
    findings = []
    sections: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python, _packages, _cpu, _memory, _gpus, _hub, _self_test,
    )  # fmt: skip
    for section in sections:
        for finding in section():
            findings.append(finding)
            if not json:
                _print(finding)
    failed = any(finding.status == "fail" for finding in findings)
    if json:
        terminal.write_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    if failed:
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    mark: str = finding.status
    if terminal.has_style(sys.stdout):
        from rich.console import Console
        from rich.text import Text

        colour = {"ok": "green", "warn": "yellow", "fail": "red"}[finding.status]
        line = Text.assemble((f"{mark:<5}", colour), f"{finding.name:<16} {finding.value}")
        if finding.remedy:
            line.append(f"\n      {finding.remedy}", "bold")
        Console().print(line)
        return
    remedy = f"\n      {finding.remedy}" if finding.remedy else ""
    terminal.write(f"{mark:<5}{finding.name:<16} {finding.value}{remedy}\n")


def _python() -> Iterator[Finding]:
    import gemcut

    yield Finding("gemcut", "ok", f"{gemcut.__version__} at {Path(gemcut.__file__).parent}")
    least, most = PYTHONS
    fits = least <= sys.version_info[:2] <= most
    yield Finding(
        "python",
        "ok" if fits else "fail",
        f"{platform.python_version()} at {sys.executable}",
        "" if fits else "gemcut wants Python 3.11, 3.12 or 3.13.",
    )
    yield Finding("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    from importlib import metadata

    for name, least in REQUIRED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "fail", "is not installed", "Install gemcut again: pip install gemcut")
            continue
        old = _release(version) < _release(least)
        remedy = f"pip install -U '{name}>={least}'" if old else ""
        yield Finding(name, "fail" if old else "ok", version, remedy)
    for name, use in (("triton", "GPU kernels"), ("transformers", "only the tests use it")):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "ok", f"is not installed ({use})")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _cpu() -> Iterator[Finding]:
    lines = _read("/proc/cpuinfo").splitlines()
    facts = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    there = [flag for flag in CPU_FLAGS if flag in flags]
    name = facts.get("model name") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", "ok", f"{name}, {usable} cores usable, {' '.join(there) or 'no vector flags known'}")


def _memory() -> Iterator[Finding]:
    kib = {key: int(value) for key, value in re.findall(r"^(\w+): +(\d+) kB", _read("/proc/meminfo"), re.M)}
    if "MemTotal" not in kib:
        yield Finding("memory", "ok", "unknown on this system")
        return
    total, free = kib["MemTotal"] * 1024, kib.get("MemAvailable", 0) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    value = f"{free / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
    if limit.isdigit():
        used = _read("/sys/fs/cgroup/memory.current").strip()
        free = min(free, int(limit) - int(used or 0))
        value += f", this container may have {int(limit) / 1e9:.1f} GB"
    low = free < 2e9
    remedy = "The demo needs about 1 GB. Close something, or lower --kv-bytes." if low else ""
    yield Finding("memory", "warn" if low else "ok", value, remedy)


def _gpus() -> Iterator[Finding]:
    from importlib import metadata

    driver = re.search(r"Kernel Module[^\d]*([\d.]+)", _read("/proc/driver/nvidia/version"))
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = "Install it again: pip install --force-reinstall torch"
        yield Finding("torch import", "fail", f"{type(error).__name__}: {error}".splitlines()[0], remedy)
        return
    told = f"driver {driver[1] if driver else 'unknown'}, torch built for CUDA {torch.version.cuda or 'none'}"
    if not torch.cuda.is_available():
        if driver is None and not Path("/dev/nvidiactl").exists():
            yield Finding("gpu", "ok", "none; gemcut runs on the CPU")
        elif torch.version.cuda is None:
            remedy = "pip install a torch with CUDA: see https://pytorch.org/get-started"
            yield Finding("gpu", "warn", f"there is one, but torch was built without CUDA ({told})", remedy)
        else:
            remedy = "Is the driver new enough, and CUDA_VISIBLE_DEVICES not empty? Try nvidia-smi."
            yield Finding("gpu", "warn", f"there is one, but torch cannot use it ({told})", remedy)
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(torch, index, told)
    try:
        metadata.version("triton")
    except metadata.PackageNotFoundError:
        yield Finding("gpu kernels", "warn", "triton is not installed", "pip install triton")


def _gpu(torch: Any, index: int, told: str) -> Finding:
    facts = torch.cuda.get_device_properties(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return Finding(f"gpu {index}", "fail", f"{facts.name}: {first}", "Is another process holding it?")
    value = (
        f"{facts.name}, {free / 1e9:.1f} GB free of {total / 1e9:.1f} GB, compute capability "
        f"{facts.major}.{facts.minor}, {told}"
    )
    if (facts.major, facts.minor) < MIN_CAPABILITY:
        return Finding(f"gpu {index}", "warn", value, "It has no bfloat16: pass --dtype float16 or float32.")
    if free < total / 10:
        return Finding(f"gpu {index}", "warn", value, "Other processes hold most of it: see nvidia-smi.")
    return Finding(f"gpu {index}", "ok", value)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    where = cache
    while not where.exists() and where != where.parent:
        where = where.parent
    free = shutil.disk_usage(where).free
    value = f"{cache}, {free / 1e9:.0f} GB free"
    if not os.access(where, os.W_OK):
        yield Finding("hub cache", "warn", f"{value}, not writable", "Set HF_HOME to a folder of yours.")
    else:
        yield Finding("hub cache", "ok", value)
    names = sorted(name for name in os.environ if name.startswith(("HF_", "GEMCUT_")))
    # a token is a secret, whatever its variable is called
    shown = [f"{name}={'(set)' if 'TOKEN' in name else os.environ[name]}" for name in names]
    yield Finding("settings", "ok", " ".join(shown) or "no HF_* or GEMCUT_* variable is set")


def _self_test() -> Iterator[Finding]:
    """One greedy answer to a picture, through everything that a user's question goes through."""
    import time

    from gemcut.demo import PICTURES
    from gemcut.errors import GemcutError

    began = time.perf_counter()
    try:
        from gemcut.llm import LLM
        from gemcut.sampling import SamplingParams

        llm = LLM(max_num_seqs=1)
        content = [{"type": "image", "path": str(PICTURES / "sign.png")}, {"type": "text", "text": QUESTION}]
        params = SamplingParams(temperature=0.0, max_tokens=16)
        output = llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)[0]
    except (GemcutError, ImportError, OSError, RuntimeError) as error:  # RuntimeError: whatever a GPU says
        first = (str(error) or type(error).__name__).splitlines()[0]
        yield Finding("demo", "fail", first, 'Run GEMCUT_DEVICE=cpu gemcut run "What is 2 + 2?" for more.')
        return
    text = output.outputs[0].text.strip()
    seconds = time.perf_counter() - began
    value = f"{QUESTION} {text!r} in {seconds:.1f} s on {llm.used.device}"
    right = text == EXPECTED
    remedy = (
        "" if right else f"{EXPECTED!r} was expected: something computes wrongly here. Please report this."
    )
    yield Finding("demo", "ok" if right else "fail", value, remedy)


def _read(path: str) -> str:
    """A file of the kernel's, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
