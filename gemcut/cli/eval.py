"""`gemcut eval`: how well a model answers, and whether two settings answer the same."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gemcut.cli import options, terminal
from gemcut.errors import ConfigError

if TYPE_CHECKING:
    from gemcut.config import EngineConfig
    from gemcut.evaluate.answerers import Answerer, Wish
    from gemcut.evaluate.compare import Comparison
    from gemcut.evaluate.run import Result
    from gemcut.evaluate.statistics import Estimate
    from gemcut.evaluate.task import Task

TaskName = Literal["demo", "mmmu", "mmmu_pro", "mmlu_pro", "gsm8k", "gpqa", "mathvision", "docvqa"]
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
    task: Annotated[TaskName, typer.Argument(help="What is asked.", show_default=False)],
    model: options.Model = None,
    revision: options.Revision = None,
    base_url: Annotated[
        str | None,
        options.flag(
            "--base-url", help="Ask a server with OpenAI's interface, such as http://127.0.0.1:8000/v1."
        ),
    ] = None,
    api_key: Annotated[
        str | None, options.flag("--api-key", help="For that server; OPENAI_API_KEY, too.")
    ] = None,
    items: Annotated[
        int | None,
        options.flag(
            "--items", help="Only the first so many; the demo's default is 500.", min=1, panel=ASKED
        ),
    ] = None,
    data: Annotated[
        Path | None,
        options.flag(
            "--data", help="Folder with the data set, instead of the hub.", panel=ASKED, file_okay=False
        ),
    ] = None,
    fonts: Annotated[
        str | None, options.flag("--fonts", help="Folder of fonts for the demo's signs.", panel=ASKED)
    ] = None,
    no_signs: Annotated[
        bool, options.flag("--no-signs", help="Leave the demo's signs out: no fonts are needed.", panel=ASKED)
    ] = False,
    form: Annotated[
        str | None,
        options.flag("--form", help="How mmmu_pro asks: cot, step by step, or direct; cot.", panel=ASKED),
    ] = None,
    orders: Annotated[
        int | None,
        options.flag("--orders", help="Orders of its options that gpqa asks; 4.", min=1, panel=ASKED),
    ] = None,
    max_tokens: Annotated[
        int | None,
        options.flag(
            "--max-tokens", help="Of an answer; by default the task's.", min=1, panel=options.ANSWER
        ),
    ] = None,
    think: options.Think = False,
    temperature: Annotated[
        float,
        options.flag("--temperature", help="0, by default: the likeliest token.", panel=options.ANSWER),
    ] = 0.0,
    seed: Annotated[
        int | None, options.flag("--seed", help="Of draws, and of the demo's pictures.", panel=options.ANSWER)
    ] = None,
    concurrency: Annotated[
        int, options.flag("--concurrency", help="Questions under way at once; 64.", min=1, panel=ASKED)
    ] = 64,
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
            help="Run the torch kernels in this dtype, too: a judge where answers part, and a yardstick for "
            "distributions.",
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
            help="Nats that the answers' distributions may be apart on average; 0.002.",
            min=0.0,
            panel=COMPARED,
        ),
    ] = 0.002,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    kernels: options.Kernels = "auto",
    numerics: options.Numerics = "auto",
    graphs: options.Graphs = "auto",
    image_tokens: options.ImageTokens = None,
    max_num_seqs: Annotated[
        int, options.flag("--max-num-seqs", help="Sequences that run at once; 64.", panel=options.ENGINE)
    ] = 64,
    max_model_len: options.MaxModelLen = None,
    kv_bytes: options.KVBytes = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    allow_unknown_config: options.AllowUnknownConfig = False,
    out: Annotated[
        Path | None,
        options.flag(
            "--out",
            help="Folder for answers and results; eval-results, for a comparison none.",
            panel=TOLD,
            file_okay=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Score a model's answers, or compare the answers of two settings.

    gemcut eval mmmu --model google/gemma-4-31B-it

    gemcut eval demo --compare kernels=torch,graphs=off kernels=triton,graphs=full

    A run that broke off goes on where it was. A comparison that finds more than rounding ends with exit code
    1, as does a run in which requests failed.
    """
    from gemcut.config import EngineConfig

    asked = chosen_task(task, data=data, fonts=fonts, signs=not no_signs, seed=seed, form=form, orders=orders)
    if items is None and task == "demo":
        from gemcut.evaluate.demo import ITEMS

        items = ITEMS
    next(iter(asked.items()), None)  # what is wrong with the data is said before a model is loaded
    longest = max_tokens or asked.max_tokens
    if base_url is not None:
        if compare is not None:
            raise typer.BadParameter(
                "--compare sets engines of this process against one another: no --base-url."
            )
        wish = wish_of(longest, temperature, seed, think)
        ask_server(asked, base_url, model, api_key, wish, items, concurrency, out, as_json)
        return
    with options.usage():
        config = EngineConfig(
            model=model or None,
            revision=revision,
            device=device,
            dtype=dtype,
            kernels=kernels,
            numerics=numerics,
            graphs=graphs,
            image_tokens=None if image_tokens is None else int(image_tokens),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_bytes=kv_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            allow_unknown_config=allow_unknown_config,
            enable_prefix_caching=compare is None,  # what is compared is computed
        )
        sides = None if compare is None else (settings(compare[0]), settings(compare[1]))
        for side in sides or ():
            replace(config, **side)
    if compare is None or sides is None:
        wish = wish_of(longest, temperature, seed, think)
        ask_engine(asked, config, wish, items, concurrency, out, as_json)
        return
    from gemcut.evaluate.compare import Limits
    from gemcut.evaluate.compare import compare as run

    tell(f"items of {task} are read")
    result = run(
        asked,
        list(itertools.islice(asked.items(), items)),
        config,
        sides,
        compare,
        max_tokens=longest,
        reference=None
        if margin_dtype is None
        else {"dtype": margin_dtype, "kernels": "torch", "numerics": "auto", "graphs": "off"},
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
        show_comparison(result)
    if result.findings:
        raise typer.Exit(1)


def chosen_task(
    name: str,
    *,
    data: Path | None,
    fonts: str | None,
    signs: bool,
    seed: int | None,
    form: str | None,
    orders: int | None,
) -> Task:
    """The task of a name, with what was said of its questions."""
    if orders is not None and name != "gpqa":
        raise typer.BadParameter("--orders is for gpqa, whose authors shuffle the options.")
    if form is not None and name != "mmmu_pro":
        raise typer.BadParameter("--form is for mmmu_pro, whose authors ask in two ways.")
    if name == "demo":
        from gemcut.demo.evaluate import SEED
        from gemcut.evaluate.demo import Demo

        if data is not None:
            raise typer.BadParameter("--data is for data sets; the demo draws its questions.")
        return Demo(seed=SEED if seed is None else seed, font_folder=fonts, signs=signs)
    from gemcut.evaluate.benchmarks import BENCHMARKS

    if fonts is not None or not signs:
        raise typer.BadParameter("--fonts and --no-signs are for the demo's questions.")
    found = next(benchmark for benchmark in BENCHMARKS if benchmark.name == name)
    if form is not None and form not in found.forms:
        raise typer.BadParameter(f"--form {form}: {name} asks by {' or '.join(found.forms)}.")
    return replace(found, folder=data, form=form or found.form, orders=orders or found.orders)


def wish_of(max_tokens: int, temperature: float, seed: int | None, thinking: bool) -> Wish:
    from gemcut.evaluate.answerers import Wish
    from gemcut.sampling import SamplingParams

    with options.usage():
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    return Wish(max_tokens=max_tokens, temperature=temperature, seed=seed, thinking=thinking)


def ask_server(
    task: Task,
    base_url: str,
    model: str | None,
    api_key: str | None,
    wish: Wish,
    items: int | None,
    concurrency: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run a task on a server."""
    from gemcut.evaluate.answerers import ServerAnswerer, first_model

    key = api_key or os.environ.get("OPENAI_API_KEY")
    name = model or first_model(base_url, key)
    answerer = ServerAnswerer(base_url=base_url, model=name, wish=wish, key=key)
    asked = {"base_url": base_url, "model": name, **asdict(wish)}
    finish(task, answerer, name, asked, items, concurrency, out, as_json)


def ask_engine(
    task: Task,
    config: EngineConfig,
    wish: Wish,
    items: int | None,
    concurrency: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run a task on an engine of this process."""
    from gemcut.evaluate.answerers import EngineAnswerer
    from gemcut.llm import AsyncLLM

    given = {each.name: getattr(config, each.name) for each in fields(config)}
    llm = AsyncLLM(max_waiting=max(concurrency, 1024), **given)
    try:
        name = config.model or "demo"
        used = {key: getattr(llm.used, key) for key in ("device", "dtype", "kernels", "numerics")}
        asked = {"model": name, "image_tokens": llm.files.image_tokens, **used, **asdict(wish)}
        finish(task, EngineAnswerer(llm, wish), name, asked, items, concurrency, out, as_json)
    finally:
        llm.close()


def finish(
    task: Task,
    answerer: Answerer,
    name: str,
    asked: Mapping[str, Any],
    items: int | None,
    concurrency: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run a task, and tell what came of it."""
    from tqdm import tqdm

    from gemcut.evaluate.run import run

    folder = (
        out or Path("eval-results")
    ) / f"{task.name}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-')}"
    with tqdm(total=items, unit="answer", disable=None) as bar:  # silent unless stderr is a terminal
        result = run(task, answerer, folder, asked, items=items, concurrency=concurrency, advance=bar.update)
    tell(f"answers and result: {folder}")
    if as_json:
        terminal.write_json(asdict(result))
    else:
        show_result(result)
    for error in result.errors:
        terminal.complain(f"a request failed: {error}")
    if result.failed:
        terminal.complain(f"{result.failed} items have no answer. The same command asks them again.")
        raise typer.Exit(1)


def tell(line: str) -> None:
    """A line for whoever waits."""
    terminal.write_dim(f"{line}\n")


def show_result(result: Result) -> None:
    """A score by groups, beside what others report."""
    rows = [(name, *cells(each)) for name, each in result.groups.items()]
    total = ("all", *cells(result.score))
    terminal.write_table(
        f"{result.task}: {result.asked['model']}",
        (result.task, "items", "score", "error"),
        [*rows, total] if len(rows) > 1 else [total],
    )
    for count, what in (
        (result.guessed, "answers could not be read and were drawn, as the benchmark's authors do"),
        (result.cut_off, "answers were cut off at --max-tokens"),
    ):
        if count:
            terminal.write(f"{count} {what}.\n")
    if result.baselines:
        terminal.write_table(
            "Reported by others: compare within one harness and one form of the question only",
            ("model", "score", "source"),
            [(each.model, f"{each.score:.2%}", each.source) for each in result.baselines],
        )


def cells(score: Estimate) -> tuple[str, str, str]:
    return f"{score.count:,}", f"{score.mean:.2%}", f"{score.error:.2%}"


def show_comparison(result: Comparison) -> None:
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
    pairs = [("first and second", result.divergences)]
    if result.from_reference is not None:
        pairs += zip(("reference and first", "reference and second"), result.from_reference, strict=True)
    terminal.write_table(
        "Distance of the next token's distributions, in nats: a lower bound, from 20 tokens and the rest",
        ("between", "where", "positions", "mean", "p99", "largest", "same likeliest", "listed"),
        [
            (
                between,
                each.where,
                f"{each.positions:,}",
                *(f"{value:.2e}" for value in (each.mean, each.p99, each.most)),
                f"{each.same:.2%}",
                f"{each.listed:.2%}",
            )
            for between, divergences in pairs
            for each in divergences
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
