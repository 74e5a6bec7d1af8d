"""The flags that several commands share, each with its environment twin, and what they become."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from gemcut.errors import GemcutError, InvalidRequest

_UNITS = {"": 1} | {
    f"{letter}{rest}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for rest, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_bytes(text: str) -> int:
    """`8000000000`, `8GB` and `8GiB` as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower())
    unit = found and _UNITS.get("" if found[2] == "b" else found[2])
    if not found or unit is None:
        raise ValueError(f"{text!r} is no amount of memory; write 8000000000, 8GB or 8GiB.")
    amount = int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit
    if amount < 1:
        raise ValueError(f"{text!r} is no memory at all.")
    return amount


def flag(*names: str, help: str, panel: str | None = None, **rest: Any) -> Any:
    """An option whose environment twin is GEMCUT_ and its long name."""
    twin = "GEMCUT_" + names[0].removeprefix("--").upper().replace("-", "_")
    return typer.Option(*names, help=help, envvar=twin, rich_help_panel=panel, show_default=False, **rest)


ANSWER, ENGINE = "The answer", "The engine"

Model = Annotated[
    str | None,
    flag("--model", help="Checkpoint folder or hub id; by default the demo.", panel=ENGINE),
]
Revision = Annotated[str | None, flag("--revision", help="Branch, tag or commit of a hub id.", panel=ENGINE)]
Device = Annotated[
    str, flag("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.", panel=ENGINE)
]
DType = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    flag("--dtype", help="auto: the checkpoint's on a GPU, float32 on a CPU.", panel=ENGINE),
]
Kernels = Annotated[
    Literal["auto", "torch", "triton"],
    flag("--kernels", help="What computes the layers; auto: triton on a GPU, else torch.", panel=ENGINE),
]
Numerics = Annotated[
    Literal["auto", "reference", "fused"],
    flag(
        "--numerics",
        help="reference: rounds wherever the reference implementation does; fused: once a segment.",
        panel=ENGINE,
    ),
]
Graphs = Annotated[
    Literal["auto", "full", "piecewise", "off"],
    flag(
        "--graphs",
        help="CUDA graphs of whole steps, of the pieces between attention calls, or none; auto: the first "
        "that agrees with the eager forward.",
        panel=ENGINE,
    ),
]
MaxModelLen = Annotated[
    int | None,
    flag(
        "--max-model-len", help="Tokens of prompt and answer; by default the model's context.", panel=ENGINE
    ),
]
KVBytes = Annotated[
    int | None,
    flag(
        "--kv-bytes",
        help="Memory of the KV cache, such as 2GiB; by default 1 GiB on a CPU and what is free on a GPU.",
        panel=ENGINE,
        parser=parse_bytes,
        metavar="BYTES",
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    flag("--gpu-memory-utilization", help="Share of the GPU's memory to use; by default 0.9.", panel=ENGINE),
]
AllowUnknownConfig = Annotated[
    bool,
    flag(
        "--allow-unknown-config",
        help="Go on although config.json holds keys that gemcut does not know.",
        panel=ENGINE,
    ),
]
Verbose = Annotated[bool, flag("--verbose", "-v", help="Tell what was loaded and what fits.", panel=ENGINE)]

ImageTokens = Annotated[
    Literal["70", "140", "280", "560", "1120"] | None,
    flag("--image-tokens", help="The most tokens that a picture may take.", panel=ANSWER),
]
MaxTokens = Annotated[int | None, flag("--max-tokens", help="Stop after this many tokens.", panel=ANSWER)]
Temperature = Annotated[
    float | None,
    flag("--temperature", help="0: the likeliest token. Default: the checkpoint's.", panel=ANSWER),
]
TopK = Annotated[int | None, flag("--top-k", help="Draw among the k likeliest tokens; 0: all.", panel=ANSWER)]
TopP = Annotated[
    float | None, flag("--top-p", help="Draw among the tokens that make up this probability.", panel=ANSWER)
]
MinP = Annotated[
    float, flag("--min-p", help="Least probability, as a share of the likeliest token's.", panel=ANSWER)
]
Seed = Annotated[int | None, flag("--seed", help="The same seed draws the same answer.", panel=ANSWER)]
Think = Annotated[
    bool, flag("--think", help="Let the model think first; its thoughts go to stderr.", panel=ANSWER)
]
System = Annotated[str | None, flag("--system", help="Instructions for the model.", panel=ANSWER)]
Json = Annotated[bool, flag("--json", help="Print JSON.")]


@contextmanager
def usage() -> Iterator[None]:
    """What is refused in here was a mistake on the command line: exit code 2, the flag by its own name."""
    try:
        yield
    except GemcutError as error:
        message = str(error)
        name = error.param if isinstance(error, InvalidRequest) else message.partition(" ")[0]
        if name and re.fullmatch(r"[a-z_]+", name):
            message = message.replace(name, f"--{name.replace('_', '-')}", 1)
        raise typer.BadParameter(message) from error


def engine_settings(
    *,
    model: str | None,
    revision: str | None,
    device: str,
    dtype: str,
    kernels: str,
    numerics: str,
    graphs: str,
    max_model_len: int | None,
    kv_bytes: int | None,
    gpu_memory_utilization: float,
    allow_unknown_config: bool,
) -> Mapping[str, Any]:
    """The settings of an engine for one conversation, checked."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise typer.BadParameter(f"There is no device {device!r}. Choose auto, cpu, cuda or cuda:N.")
    settings: dict[str, Any] = {
        "model": model or None,
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "kernels": kernels,
        "numerics": numerics,
        "graphs": graphs,
        "max_model_len": max_model_len,
        "kv_bytes": kv_bytes,
        "gpu_memory_utilization": gpu_memory_utilization,
        "allow_unknown_config": allow_unknown_config,
        "max_num_seqs": 1,  # one conversation: no memory is kept for others
    }
    from gemcut.config import EngineConfig  # brings in numpy: not for --help

    with usage():
        EngineConfig(**settings)
    return settings
