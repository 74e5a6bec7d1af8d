"""`gemcut bench`: how fast the engine is on this machine, beside how fast it could be."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from gemcut.cli import bench_serve, options, terminal
from gemcut.errors import GemcutError

if TYPE_CHECKING:
    from gemcut.bench.against import PeerName
    from gemcut.bench.contender import Setup
    from gemcut.bench.profile import Kind
    from gemcut.bench.records import Record, Table
    from gemcut.bench.session import Session, Sizes

app = typer.Typer(
    help="Measure the engine on this machine, beside what the machine could do.", no_args_is_help=True
)

app.command("serve")(bench_serve.serve)

COMPARED = ("kernels", "numerics", "graphs")
SUBJECTS = ("prefill", "decode", "vision", "batch", "memory", "profile")
MEASURED, RECORD = "What is measured", "The record"


def whole_numbers(text: str) -> list[int]:
    """`16,64,256`"""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no list of whole numbers such as 16,64,256.") from None
    if min(numbers) < 1:
        raise ValueError(f"{text!r} holds a number below 1.")
    return numbers


def differences(text: str) -> dict[str, str]:
    """`kernels=torch,graphs=off`"""
    pairs = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        pairs[name] = value
        if name not in COMPARED or not value:
            raise ValueError(f"{text!r}: compare by {', '.join(COMPARED)}, as in kernels=torch,graphs=off.")
    return pairs


def numbers(name: str, help: str) -> Any:
    """An option that takes several whole numbers."""
    return options.flag(name, help=help, parser=whole_numbers, metavar="NUMBERS", panel=MEASURED)


Records = Annotated[
    Path | None,
    options.flag("--records", help="Folder for the JSON records, bench/records in a checkout.", panel=RECORD),
]
Rounds = Annotated[int, options.flag("--rounds", help="Measurements of each row.", min=1, panel=MEASURED)]
Tokens = Annotated[Any, numbers("--tokens", "Lengths of the prompts, such as 16,256.")]
Batches = Annotated[Any, numbers("--batches", "Sequences at once, such as 1,64.")]
Cached = Annotated[int, options.flag("--cached", help="Tokens of a prompt.", min=1, panel=MEASURED)]
NewTokens = Annotated[int, options.flag("--new", help="Tokens of an answer.", min=2, panel=MEASURED)]
Requests = Annotated[int, options.flag("--requests", help="Prompts of the batch.", min=1, panel=MEASURED)]
Against = Annotated[
    Literal["transformers", "vllm", "sglang"] | None,
    options.flag(
        "--against",
        help="Measure another engine as well: by turns if both fit on the GPU, else after gemcut.",
        panel=MEASURED,
    ),
]
Pictures = Annotated[Any, numbers("--pictures", "Pictures at once, such as 1,4.")]


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the options shared by the commands come to."""

    setup: Setup
    records: Path | None
    json: bool

    @property
    def command(self) -> str:
        """How to measure this again. Where the record went is nobody's business."""
        words = iter(sys.argv[1:])
        kept = [word for word in words if not (word == "--records" and next(words, None))]
        return shlex.join(["gemcut", *(word for word in kept if not word.startswith("--records="))])

    def run(self, subjects: Sequence[str], sizes: Sizes, against: PeerName | None = None) -> None:
        """Measure, and print a table for each subject as soon as it is there. One that fails does not keep
        the others from being measured; its error comes at the end."""
        from gemcut.bench.against import check_peer
        from gemcut.bench.session import Session

        shared = [] if against is None else check_peer(against, self.setup, subjects)
        session = Session(
            self.setup,
            command=self.command,
            records=self.records,
            tell=tell,
            against=against,
            pictures="vision" in shared,
        )
        failures = self._measure(session, subjects, sizes)
        if against is not None and not session.together:
            session.change_sides()
            failures += self._measure(session, shared, sizes)
        session.close()
        if failures:
            raise failures[0]

    def _measure(self, session: Session, subjects: Sequence[str], sizes: Sizes) -> list[Exception]:
        failures: list[Exception] = []
        for subject in subjects:
            try:
                self.show(*session.run(subject, sizes))
            except GemcutError as error:
                tell(f"{subject} failed: {error}")
                failures.append(error.with_traceback(None))
            except Exception as error:
                tell(f"{subject} failed:\n{traceback.format_exc()}")
                failures.append(error.with_traceback(None))  # its frames hold engines, and these the memory
        return failures

    def show(self, record: Record, tables: Sequence[Table]) -> None:
        if self.json:
            terminal.write_json(asdict(record))
            return
        for table in tables:
            terminal.write_table(table.title, table.header, table.rows)


def tell(line: str) -> None:
    """A line for whoever waits."""
    terminal.write_dim(f"{line}\n")


def invocation(
    model: options.Model = None,
    random_weights: Annotated[
        str | None,
        options.flag(
            "--random-weights",
            help="Random values for a size (26B-A4B, 31B), a config.json or a folder's, not a checkpoint.",
            panel=MEASURED,
        ),
    ] = None,
    compare: Annotated[
        list[Any] | None,
        options.flag(
            "--compare",
            help="Settings to set against others, as in kernels=torch,graphs=off; given twice or more.",
            panel=MEASURED,
            parser=differences,
            metavar="SETTINGS",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    kernels: options.Kernels = "auto",
    numerics: options.Numerics = "auto",
    graphs: options.Graphs = "auto",
    max_num_seqs: Annotated[
        int, options.flag("--max-num-seqs", help="Sequences that run at once; 128.", panel=options.ENGINE)
    ] = 128,
    max_num_batched_tokens: Annotated[
        int,
        options.flag("--max-num-batched-tokens", help="Tokens of a step; 8192.", panel=options.ENGINE),
    ] = 8192,
    max_model_len: Annotated[
        int | None,
        options.flag("--max-model-len", help="Tokens of prompt and answer; 8,448.", panel=options.ENGINE),
    ] = 8448,
    kv_bytes: options.KVBytes = None,
    gpu_memory_utilization: Annotated[
        float,
        options.flag(
            "--gpu-memory-utilization",
            help="Share of the GPU's memory to use; 0.94, as nobody else is there.",
            panel=options.ENGINE,
        ),
    ] = 0.94,
    allow_unknown_config: options.AllowUnknownConfig = False,
    seed: Annotated[int, options.flag("--seed", help="Of the random weights; 0.", panel=MEASURED)] = 0,
    records: Records = None,
    json: options.Json = False,
) -> Invocation:
    """The options that all commands share."""
    from gemcut.bench.contender import Setup
    from gemcut.config import EngineConfig

    if model is not None and random_weights is not None:
        raise typer.BadParameter("--random-weights takes the place of --model's weights; give one of them.")
    if compare is not None and len(compare) == 1:
        raise typer.BadParameter("--compare wants two settings or more, each after a --compare of its own.")
    with options.usage():
        config = EngineConfig(
            model=model,
            device=device,
            dtype=dtype,
            kernels=kernels,
            numerics=numerics,
            graphs=graphs,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_bytes=kv_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            allow_unknown_config=allow_unknown_config,
            enable_prefix_caching=False,  # every prompt is to be read
            seed=seed,
        )
    versus = {" ".join(f"{k}={v}" for k, v in settings.items()): settings for settings in compare or ()}
    return Invocation(Setup(config=config, random_weights=random_weights, versus=versus), records, json)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that takes an `Invocation` first, whose options stand behind its own."""
    own = [*inspect.signature(function).parameters.values()][1:]
    shared = inspect.signature(invocation).parameters

    @functools.wraps(function)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in shared}
        function(invocation(**given), **values)

    hints = get_type_hints(invocation, include_extras=True) | get_type_hints(function, include_extras=True)
    parameters = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in (*own, *shared.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return app.command(function.__name__.rstrip("_"))(run)


@command
def prefill(bench: Invocation, tokens: Tokens = None, rounds: Rounds = 10, against: Against = None) -> None:
    """One prompt, one new token: 16 to 8,192 tokens."""
    from gemcut.bench.session import Sizes

    bench.run(["prefill"], Sizes(tokens=tokens, prefill_rounds=rounds), against)


@command
def decode(
    bench: Invocation,
    batches: Batches = None,
    cached: Cached = 1024,
    new: NewTokens = 128,
    rounds: Rounds = 3,
    against: Against = None,
) -> None:
    """A token more for each of 1, 8, 32 or 64 sequences with 1,024 tokens cached."""
    from gemcut.bench.session import Sizes

    sizes = Sizes(batches=batches, cached=cached, new_tokens=new, decode_rounds=rounds)
    bench.run(["decode"], sizes, against)


@command
def batch(
    bench: Invocation,
    requests: Requests = 256,
    cached: Cached = 1024,
    new: NewTokens = 128,
    rounds: Rounds = 1,
    against: Against = None,
) -> None:
    """An offline batch: 256 prompts of 1,024 tokens, 128 new tokens each."""
    from gemcut.bench.session import Sizes

    sizes = Sizes(requests=requests, cached=cached, new_tokens=new, batch_rounds=rounds)
    bench.run(["batch"], sizes, against)


@command
def vision(
    bench: Invocation, pictures: Pictures = None, rounds: Rounds = 10, against: Against = None
) -> None:
    """The vision tower, and the first token of a prompt with a picture."""
    from gemcut.bench.session import Sizes

    sizes = Sizes(vision_rounds=rounds)
    bench.run(["vision"], sizes if pictures is None else replace(sizes, pictures=pictures), against)


@command
def memory(bench: Invocation) -> None:
    """What the engine holds on its device, part by part."""
    from gemcut.bench.session import Sizes

    bench.run(["memory"], Sizes())


@command
def profile(
    bench: Invocation,
    steps: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STEPS",
            help="prefill and tokens, decode and sequences, encode and pictures: prefill 256 8192 decode 1.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """The time of one step, kernel by kernel."""
    from gemcut.bench.session import Sizes

    bench.run(["profile"], Sizes(profiled=profiled_steps(steps or [])))


def profiled_steps(words: Sequence[str]) -> list[tuple[Kind, int]]:
    """`prefill 256 8192 decode 1` as pairs."""
    kind: Kind | None = None
    steps: list[tuple[Kind, int]] = []
    for word in words:
        if word in ("prefill", "decode", "encode"):
            kind = word
        elif kind is None or not word.isdecimal() or not int(word):
            raise typer.BadParameter(f"{word!r}: name steps as in prefill 256 8192 decode 1 64.")
        else:
            steps.append((kind, int(word)))
    if words and not steps:
        raise typer.BadParameter(f"How many? Name steps as in {words[0]} 64.")
    return steps


@command
def startup(
    bench: Invocation,
    warm: Annotated[
        bool, options.flag("--warm", help="Start a second time, with Triton's cache filled.", panel=MEASURED)
    ] = False,
) -> None:
    """A new process, from its spawn to the first token, with a cold Triton cache."""
    from gemcut.bench import startup

    if bench.setup.versus:
        raise typer.BadParameter("startup measures one engine: --compare does not apply.")
    bench.show(*startup.run(bench.setup, warm=warm, command=bench.command, records=bench.records, tell=tell))


@command
def overhead(
    bench: Invocation,
    streams: Annotated[int, options.flag("--streams", help="Answers at a time.", min=1, panel=MEASURED)] = 64,
    words: Annotated[int, options.flag("--words", help="Words of a prompt.", min=1, panel=MEASURED)] = 32,
    new: NewTokens = 128,
    rounds: Rounds = 5,
) -> None:
    """A server over HTTP beside LLM in one process: tokens a second, time to the first token."""
    from gemcut.bench import overhead

    if bench.setup.versus or bench.setup.random_weights is not None:
        raise typer.BadParameter("overhead starts a server: --compare and --random-weights do not apply.")
    sizes = {"streams": streams, "words": words, "new": new, "rounds": rounds}
    bench.show(*overhead.run(bench.setup, **sizes, command=bench.command, records=bench.records, tell=tell))


@command
def all_(
    bench: Invocation,
    only: Annotated[
        str | None,
        options.flag("--only", help=f"Some of {','.join(SUBJECTS)}.", panel=MEASURED, metavar="SUBJECTS"),
    ] = None,
    tokens: Tokens = None,
    batches: Batches = None,
    cached: Cached = 1024,
    new: NewTokens = 128,
    requests: Requests = 256,
    against: Against = None,
) -> None:
    """Several subjects in one process, on one set of weights."""
    from gemcut.bench.session import SUBJECTS, Sizes

    wanted = only.split(",") if only else list(SUBJECTS)
    if unknown := [word for word in wanted if word not in SUBJECTS]:
        raise typer.BadParameter(f"There is no {', '.join(unknown)}. Choose from {', '.join(SUBJECTS)}.")
    subjects = [subject for subject in SUBJECTS if subject in wanted]
    sizes = Sizes(tokens=tokens, batches=batches, cached=cached, new_tokens=new, requests=requests)
    bench.run(subjects, sizes, against)


@app.command()
def report(
    records: Annotated[
        Path, options.flag("--records", help="Folder of the records; bench/records.", panel=RECORD)
    ] = Path("bench/records"),
    out: Annotated[
        Path, options.flag("--out", help="The page to write; bench-report.html.", panel=RECORD)
    ] = Path("bench-report.html"),
    readme: Annotated[
        Path | None,
        options.flag("--readme", help="Write the tables into this file as well.", panel=RECORD),
    ] = None,
) -> None:
    """Make a page of all records: tables, plots, what was measured on what."""
    from gemcut.bench import report
    from gemcut.errors import NotFound

    found = report.read_all(records)
    if not found:
        raise NotFound(f"There are no records in {records}. Measure something with --records {records}.")
    out.write_text(report.page(found))
    tell(f"written to {out}")
    if readme is not None:
        readme.write_text(report.write_into(readme.read_text(), report.markdown(found)))
        tell(f"tables written into {readme}")


@app.command()
def kernels(
    words: Annotated[
        list[str] | None, typer.Argument(help="Only cases whose names hold one of these.", show_default=False)
    ] = None,
    numerics: Annotated[
        Literal["reference", "fused"], options.flag("--numerics", help="How the kernels round.")
    ] = "reference",
    records: Records = None,
) -> None:
    """Every kernel at a real model's sizes, beside its torch reference (needs a GPU)."""
    import torch

    from gemcut.bench import kernels
    from gemcut.errors import ConfigError

    if not torch.cuda.is_available():
        raise ConfigError("The kernels are timed on a GPU, and torch sees none.")
    arguments = [*(words or []), "--numerics", numerics]
    kernels.main(arguments if records is None else [*arguments, "--records", str(records)])
