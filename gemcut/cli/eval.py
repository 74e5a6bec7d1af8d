"""`gemcut eval`: how well a model answers, and whether two settings answer the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gemcut.cli import options, terminal
from gemcut.errors import ConfigError

if TYPE_CHECKING:
    from gemcut.evaluate.compare import Comparison

COMPARED, ASKED, TOLD = "Two settings compared", "What is asked", "What is told"
SHOWN = 20  # differing answers in the table; all are in the file
PARSERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("device", "dtype", "kernels", "numerics", "graphs"), str),
    **dict.fromkeys(("max_num_batched_tokens", "max_num_seqs", "max_model_len", "page_size"), int),
    **dict.fromkeys(
        ("deterministic", "enable_prefix_caching"),
        lambda text: {"on": True, "true": True, "off": False, "false": False}[text.lower()],
    ),
    "kv_bytes": options.parse_bytes,
}


def settings(text: str) -> dict[str, Any]:
    """`kernels=torch,graphs=off,deterministic=on` as settings of an engine. Raises ConfigError."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in PARSERS:
            raise ConfigError(f"compare knows no {name!r}. Compare by {', '.join(PARSERS)}.")
        try:
            found[name] = PARSERS[name](value.strip())
        except (ValueError, KeyError):
            raise ConfigError(f"compare: {name} cannot be {value!r}.") from None
    return found


def eval(
    task: Annotated[Literal["demo"], typer.Argument(help="What is asked.", show_default=False)],
    model: options.Model = None,
    revision: options.Revision = None,
    compare: Annotated[
        tuple[str, str] | None,
        options.flag(
            "--compare",
            help="Two settings such as kernels=torch,graphs=off and kernels=triton,graphs=full.",
            panel=COMPARED,
            metavar="SETTINGS SETTINGS",
        ),
    ] = None,
    margin_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        options.flag(
            "--margin-dtype",
            help="Where answers part, let the torch kernels in this dtype judge, too.",
            panel=COMPARED,
        ),
    ] = None,
    near_tie: Annotated[
        float,
        options.flag(
            "--near-tie", help="Nats up to which either of two tokens may come; 0.5.", min=0.0, panel=COMPARED
        ),
    ] = 0.5,
    max_kl: Annotated[
        float,
        options.flag(
            "--max-kl",
            help="Nats that the distributions may be apart on average; 0.01.",
            min=0.0,
            panel=COMPARED,
        ),
    ] = 0.01,
    items: Annotated[
        int, options.flag("--items", help="How many, from the first on; 500.", min=1, panel=ASKED)
    ] = 500,
    seed: Annotated[int | None, options.flag("--seed", help="Of the demo's pictures.", panel=ASKED)] = None,
    fonts: Annotated[
        str | None, options.flag("--fonts", help="Folder of fonts for the demo's signs.", panel=ASKED)
    ] = None,
    no_signs: Annotated[
        bool, options.flag("--no-signs", help="Leave the demo's signs out: no fonts are needed.", panel=ASKED)
    ] = False,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    kernels: options.Kernels = "auto",
    numerics: options.Numerics = "auto",
    graphs: options.Graphs = "auto",
    max_num_seqs: Annotated[
        int, options.flag("--max-num-seqs", help="Sequences that run at once; 64.", panel=options.ENGINE)
    ] = 64,
    max_model_len: options.MaxModelLen = None,
    kv_bytes: options.KVBytes = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    allow_unknown_config: options.AllowUnknownConfig = False,
    out: Annotated[
        Path | None,
        options.flag("--out", help="Folder for the whole result, as JSON.", panel=TOLD, file_okay=False),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Score a model's answers, or compare the answers of two settings.

    gemcut eval demo --compare kernels=torch,graphs=off kernels=triton,graphs=full

    A comparison that finds more than rounding ends with exit code 1.
    """
    from gemcut.config import EngineConfig
    from gemcut.evaluate.compare import Limits
    from gemcut.evaluate.compare import compare as run
    from gemcut.evaluate.demo import SEED, Demo

    with options.usage():
        config = EngineConfig(
            model=model or None,
            revision=revision,
            device=device,
            dtype=dtype,
            kernels=kernels,
            numerics=numerics,
            graphs=graphs,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_bytes=kv_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            allow_unknown_config=allow_unknown_config,
            enable_prefix_caching=False,  # what is compared is computed
        )
        if compare is None:
            raise ConfigError("compare wants two settings.")
        sides = (settings(compare[0]), settings(compare[1]))
        for side in sides:
            replace(config, **side)
    demo = Demo(seed=SEED if seed is None else seed, font_folder=fonts, signs=not no_signs)
    judge = None if margin_dtype is None else {"dtype": margin_dtype, "kernels": "torch", "graphs": "off"}
    tell(f"{items} items of {task} are drawn")
    result = run(
        demo,
        list(itertools.islice(demo.items(), items)),
        config,
        sides,
        compare,
        reference=judge,
        limits=Limits(near_tie=near_tie, mean_kl=max_kl),
        tell=tell,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{task}-compare.json"
        path.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")
        tell(f"written to {path}")
    if as_json:
        terminal.write_json(asdict(result))
    else:
        show(result)
    if result.findings:
        raise typer.Exit(1)


def tell(line: str) -> None:
    """A line for whoever waits."""
    terminal.write_dim(f"{line}\n")


def show(result: Comparison) -> None:
    """The comparison as tables."""
    terminal.write_table(
        f"{result.task}: {result.items} items",
        ("side", "score", "error", "seconds", "dtype", "kernels", "numerics", "graphs", "replays", "eager"),
        [
            (
                side.name,
                f"{side.score.mean:.2%}",
                f"{side.score.error:.2%}",
                f"{side.wall_s:.1f}",
                *(str(side.used[name]) for name in ("dtype", "kernels", "numerics", "graphs")),
                str(sum(side.forwards["replays"].values())),
                str(sum(side.forwards["eager"].values())),
            )
            for side in result.sides
        ],
    )
    terminal.write(
        f"Score difference: {result.difference.mean:+.2%}, standard error {result.difference.error:.2%}. "
        f"Same answers: {result.agreeing} of {result.items}.\n"
    )
    if result.partings:
        terminal.write_table(
            "Answers that part",
            ("item", "first", "second", "token", "margin", "by the reference"),
            [
                (
                    parting.id,
                    *(shortened(answer) for answer in parting.answers),
                    f"{parting.at}: {parting.tokens[0]!r} / {parting.tokens[1]!r}",
                    nats(parting.margin),
                    nats(parting.reference_margin),
                )
                for parting in result.partings[:SHOWN]
            ],
        )
        if len(result.partings) > SHOWN:
            terminal.write(f"and {len(result.partings) - SHOWN} more; --out keeps them all.\n")
    terminal.write_table(
        "Distance of the next token's distributions, in nats: a lower bound, from 20 tokens and the rest",
        ("where", "positions", "mean", "p99", "largest", "same likeliest", "listed"),
        [
            (
                each.where,
                f"{each.positions:,}",
                *(f"{value:.2e}" for value in (each.mean, each.p99, each.most)),
                f"{each.same:.2%}",
                f"{each.listed:.2%}",
            )
            for each in result.divergences
        ],
    )
    for finding in result.findings:
        terminal.complain(finding)
    if not result.findings:
        terminal.write("Nothing beyond rounding was found.\n")


def nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def shortened(text: str, most: int = 40) -> str:
    """On one line, for a table."""
    text = text.replace("\n", " ")
    return text if len(text) <= most else text[: most - 3] + "..."
