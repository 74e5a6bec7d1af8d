"""What is made of records: the README's tables, and a page with tables, plots and the environment."""

from __future__ import annotations

import html
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gemcut.bench import kernels, overhead, startup
from gemcut.bench.records import Record, Table
from gemcut.bench.session import tables as session_tables
from gemcut.errors import ConfigError

BEGIN, END = "<!-- bench tables: gemcut bench report -->", "<!-- end of bench tables -->"
# in the README, in this order; a profile is for those who optimise, kernels are too many
OTHERS = ("", "-transformers", "-vllm", "-sglang")
IN_README = (
    *(f"{subject}{other}" for subject in ("prefill", "decode", "vision", "batch") for other in OTHERS),
    "startup",
    *(
        f"{subject}{other}-compare"
        for subject in ("prefill", "decode", "vision", "batch")
        for other in OTHERS
    ),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid #ccc; padding: .2rem .7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; } svg { max-width: 100%; height: auto; }
code { background: #eee; padding: 0 .2rem; } .note { color: #555; }
"""


def read_all(folder: Path) -> list[Record]:
    """The records of all devices below a folder; what other programs write there is left alone."""
    paths = sorted(folder.glob("*/*.json"))
    return [record for path in paths if (record := Record.read(path)) is not None]


def tables(record: Record) -> list[Table]:
    """What is shown of a record, whichever command wrote it."""
    if record.subject == "startup":
        return [startup.table(record.results)]
    if record.subject == "overhead":
        return [overhead.table(record.results)]
    if record.subject == "kernels":
        return [kernels.as_table(record.results)]
    return session_tables(record)


# ---- the README


def markdown(records: Iterable[Record]) -> str:
    """Tables by device, each with what it was measured on."""
    found = []
    by_name = {(record.device, record.name): record for record in records}
    for device in sorted({device for device, _ in by_name}):
        some = [by_name[device, name] for name in IN_README if (device, name) in by_name]
        for record, following in zip_longest(some, some[1:]):
            found += [_markdown(table, record) for table in tables(record)]
            if following is None or _source(following) != _source(record):
                found.append(_source(record))  # several subjects may come from one run
    return "\n\n".join(found)


def _markdown(table: Table, record: Record) -> str:
    table = _without_sole_engine(table)
    model = f"{record.facts['model']}, {record.facts['weights']} weights" if "model" in record.facts else ""
    lines = [
        f"**{table.title}** ({', '.join(part for part in (model, record.device) if part)})",
        "",
        "| " + " | ".join(table.header) + " |",
        "|---" + "|--:" * (len(table.header) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
    return "\n".join(lines)


def _without_sole_engine(table: Table) -> Table:
    """The column of engines says nothing where there is only ours."""
    at = table.header.index("engine") if "engine" in table.header else -1
    if at < 0 or {row[at] for row in table.rows} != {"gemcut"}:
        return table
    header, *rows = ((*cells[:at], *cells[at + 1 :]) for cells in (table.header, *table.rows))
    return Table(table.title, header, rows)


def _source(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    commit = (record.commit or "unknown")[:10]
    lines = [f"`{record.command}`; commit {commit}; {versions}."]
    if record.ceilings is not None:
        lines.append(
            f"Ceilings measured in the same run: {record.ceilings['copy_bytes'] / 1e12:.3f} TB/s, "
            f"{record.ceilings['matrix_flops'] / 1e12:.1f} TFLOP/s."
        )
    return " ".join([*lines, *(f"{note}." for note in record.notes)])


def write_into(text: str, tables: str) -> str:
    """A README with the tables between its two marks. Raises ConfigError if it has not got them."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ConfigError(
            f"The file has no place for the tables. Write {BEGIN} and {END} on lines of their own."
        )
    middle = f"{tables}\n\n" if tables else ""
    return pattern.sub(lambda _: f"{BEGIN}\n\n{middle}{END}", text)


# ---- the page


def page(records: Sequence[Record]) -> str:
    """One HTML file: plots and tables by device, and what was measured on."""
    by_device: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_device[record.device].append(record)
    parts = ["<h1>gemcut: measurements</h1>"]
    for device, some in sorted(by_device.items()):
        parts.append(f"<h2>{html.escape(device)}</h2>")
        some.sort(key=lambda record: IN_README.index(record.name) if record.name in IN_README else 99)
        parts += [_section(record) for record in some]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>gemcut: measurements</title>'
        f"<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _section(record: Record) -> str:
    parts = [f"<h3>{html.escape(record.name)}</h3>"]
    plot = _plot(record)
    if plot:
        parts.append(plot)
    parts += [_html_table(table) for table in tables(record)]
    parts.append(f'<p class="note">{_code(_source(record))}</p>')
    settings = {"engines": record.facts.get("engines"), "settings": record.facts.get("settings")}
    rows = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in settings.items() if value
    )
    if rows:
        parts.append(f"<details><summary>Settings</summary><dl>{rows}</dl></details>")
    return "\n".join(parts)


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _html_table(table: Table) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    caption = html.escape(table.title)
    return f"<table><caption>{caption}</caption>\n{row(table.header, 'th')}\n{body}\n</table>"


def _plot(record: Record) -> str:
    """Latency over size beside its floor, or nothing for a subject without a size."""
    if record.subject == "prefill":
        return _lines(record.results, "tokens", "wall", "tokens of the prompt", "ms to the first token")
    if record.subject == "decode":
        return _lines(record.results, "batch", "step", "sequences", "ms a step")
    return ""


def _lines(results: Sequence[Mapping[str, Any]], size: str, time: str, x: str, y: str) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, ScalarFormatter
    except ImportError:
        raise ConfigError("The report's plots need matplotlib: pip install 'gemcut[bench]'.") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for engine in dict.fromkeys(r["engine"] for r in results):
        own = [r for r in results if r["engine"] == engine]
        sizes = [r[size] for r in own]
        axes.plot(sizes, [r[time]["median"] for r in own], marker="o", label=engine)
        axes.fill_between(sizes, [r[time]["p20"] for r in own], [r[time]["p80"] for r in own], alpha=0.2)
    floors = {r[size]: r["floor"] for r in results}
    axes.plot(list(floors), list(floors.values()), color="black", linestyle="--", label="roofline")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_xticks(list(floors), [f"{value:,}" for value in floors])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    out = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": "gemcut", "svg.fonttype": "none"}
    ):  # the same bytes each time
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]
