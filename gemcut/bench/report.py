"""What is made of records: the README's tables, and a page with tables, plots and the environment."""

from __future__ import annotations

import html
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
TITLES = {
    "prefill": "Prefill",
    "decode": "Decode",
    "vision": "Pictures",
    "batch": "Offline batch",
    "startup": "Start-up",
    "memory": "Memory",
    "overhead": "The server's overhead",
    "profile": "A step, kernel by kernel",
    "kernels": "Kernels",
}
FOLDED = ("profile", "kernels")  # long tables, behind lines to click on
STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h2 { margin-top: 3rem; border-bottom: 2px solid var(--line); } h3 { margin: 2.5rem 0 .5rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.wide { overflow-x: auto; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots svg { background: white; border-radius: 6px; flex: 1 1 24rem; max-width: 34rem; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .7rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; white-space: nowrap; }
code { background: #8882; padding: 0 .2rem; overflow-wrap: anywhere; } .note { color: var(--quiet); }
details { margin: .5rem 0; } summary { cursor: pointer; }
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
    return " ".join([*lines, *(f"{note.rstrip('.')}." for note in record.notes)])


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
    """One HTML file: plots and tables by device and subject, and what was measured on."""
    by_device: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_device[record.device][record.subject].append(record)
    parts = [
        "<h1>gemcut: measurements</h1>",
        "<p>Every time stands beside its floor: the bytes and products that the work needs at least, at the "
        "rates of a large copy and a large product, measured in the same run. <i>Of the roofline</i> is "
        "floor / time. p20 and p80 are fifths of the repetitions.</p>",
    ]
    for number, (device, subjects) in enumerate(sorted(by_device.items())):
        order = [subject for subject in TITLES if subject in subjects]
        links = "".join(f'<a href="#{subject}-{number}">{TITLES[subject]}</a>' for subject in order)
        parts.append(f"<h2>{html.escape(device)}</h2>\n<nav>{links}</nav>")
        for subject in order:
            parts.append(f'<h3 id="{subject}-{number}">{TITLES[subject]}</h3>')
            parts.append(_section(sorted(subjects[subject], key=_place)))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>gemcut: measurements</title><style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _place(record: Record) -> tuple[int, str]:
    """Ours before others, comparisons last."""
    return IN_README.index(record.name) if record.name in IN_README else len(IN_README), record.name


def _section(records: Sequence[Record]) -> str:
    """All records of one subject. Engines that were measured one after another share a plot."""
    apart = [record for record in records if not record.name.endswith("-compare")]
    plotted = [apart, *([record] for record in records if record not in apart)]
    parts = ["\n".join(_plots(some)) for some in plotted if some]
    for record in records:
        parts += [_table(table, record) for table in tables(record)]
        parts.append(f'<p class="note">{_code(_source(record))}</p>')
        parts.append(_environment(record))
    return "\n".join(part for part in parts if part)


def _table(table: Table, record: Record) -> str:
    """With the model in its title, and without a column that says nothing."""
    table = _without_sole_engine(table)
    if record.subject in FOLDED:
        return _folded(table.title, Table("", table.header, table.rows))
    model = f": {record.facts['model']}, {record.facts['weights']} weights" if "model" in record.facts else ""
    return _html_table(Table(table.title + model, table.header, table.rows))


def _environment(record: Record) -> str:
    """The settings, and what each engine really ran with."""
    facts = {name: record.facts[name] for name in ("settings", "engines") if record.facts.get(name)}
    rows = [(name, str(value)) for name, value in _flat(facts)]
    if not rows:
        return ""
    return _folded("Settings and environment", Table("", ("setting", "value"), rows))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, with dots in their names; what is not set is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif value is not None and value != {}:
        yield name, value


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _html_table(table: Table) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    caption = f"<caption>{html.escape(table.title)}</caption>\n" if table.title else ""
    return f'<div class="wide"><table>{caption}{row(table.header, "th")}\n{body}\n</table></div>'


def _folded(title: str, table: Table) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{_html_table(table)}</details>"


# ---- plots

FIFTHS = ("median", "p20", "p80")
Curve = dict[int, tuple[float, float, float]]  # those of a time or rate, by size


def _plots(records: Sequence[Record]) -> list[str]:
    """Times over size beside their floor, and for decode the tokens a second; none without a size."""
    results = [result for record in records for result in record.results]
    if not results or records[0].subject not in ("prefill", "decode"):
        return []
    if records[0].subject == "prefill":
        wall = _curves(results, "tokens", lambda r: r["wall"])
        figures = [_lines(wall, _floors(results, "tokens"), "tokens of the prompt", "ms to the first token")]
    else:
        steps = _curves(results, "batch", lambda r: r["step"] or dict.fromkeys(FIFTHS, r["slope"]))
        floors = _floors(results, "batch")
        figures = [
            _lines(steps, floors, "sequences", "ms a step"),
            _lines(
                {engine: _rate(curve) for engine, curve in steps.items()},
                _rate(floors),
                "sequences",
                "tokens a second",
            ),
        ]
    return [f'<div class="plots">{"".join(figures)}</div>']


def _curves(
    results: Sequence[Mapping[str, Any]], size: str, time: Callable[[Mapping[str, Any]], Mapping[str, float]]
) -> dict[str, Curve]:
    """By engine, in milliseconds."""
    found: dict[str, Curve] = defaultdict(dict)
    for result in results:
        median, p20, p80 = (time(result)[name] for name in FIFTHS)
        found[result["engine"]][result[size]] = median, p20, p80
    return found


def _floors(results: Sequence[Mapping[str, Any]], size: str) -> Curve:
    return {result[size]: (result["floor"], result["floor"], result["floor"]) for result in results}


def _rate(curve: Curve) -> Curve:
    """Tokens a second, of milliseconds a step of so many sequences."""
    return {
        batch: (batch / median * 1e3, batch / p20 * 1e3, batch / p80 * 1e3)
        for batch, (median, p20, p80) in curve.items()
    }


def _lines(curves: Mapping[str, Curve], floors: Curve, x: str, y: str) -> str:
    """An SVG, the same bytes each time."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator
    except ImportError:
        raise ConfigError("The report's plots need matplotlib: pip install 'gemcut[bench]'.") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for engine, curve in curves.items():
        sizes = sorted(curve)
        median, p20, p80 = zip(*(curve[each] for each in sizes), strict=True)
        axes.plot(sizes, median, marker="o", label=engine)
        axes.fill_between(sizes, p20, p80, alpha=0.2)
    sizes = sorted(floors)
    axes.plot(sizes, [floors[each][0] for each in sizes], color="black", linestyle="--", label="roofline")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_xticks(sizes, [f"{value:,}" for value in sizes])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"gemcut {y}", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]
