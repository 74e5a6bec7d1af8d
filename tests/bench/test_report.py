"""What is made of records: README's tables byte for byte, a page that holds what they hold."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemcut.bench import decode, prefill, report
from gemcut.bench.records import Record
from gemcut.bench.timing import Ceilings, Times
from gemcut.cli import main
from gemcut.errors import ConfigError

ROOT = Path(__file__).parents[2]
TOKENS = (16, 256)


def record(*engines: str, peer: str = "") -> Record:
    rows = [
        prefill.Row(tokens, engine, 1.0, Times(tokens / 8, tokens / 9, tokens / 7), None, 8 / tokens)
        for tokens in TOKENS
        for engine in engines
    ]
    return Record.of(
        "prefill",
        torch.device("cpu"),
        Ceilings(1e12, 2e12),
        rows,
        command="gemcut bench prefill --model '<b>'",
        facts={"model": "31B", "weights": "random"},
        notes=["left out: 512 tokens"],
        peer=peer,
    )


def decode_record() -> Record:
    """One engine whose steps are seen, one whose steps are not."""
    common = {"cached": 1024, "new_tokens": 128, "floor": 2.0, "device": None, "experts": None, "share": 0.5}
    rows = [
        decode.Row(batch=batch, engine=engine, slope=4.0, step=step, **common)
        for batch in (1, 8)
        for engine, step in (("gemcut", Times(4.0, 3.9, 4.1)), ("sglang", None))
    ]
    facts = {"model": "31B", "weights": "random", "settings": {"graphs": "<auto>", "kv_bytes": None}}
    return Record.of("decode", torch.device("cpu"), None, rows, command="gemcut bench decode", facts=facts)


def test_the_readme_is_what_the_records_say() -> None:
    readme = (ROOT / "README.md").read_text()
    tables = report.markdown(report.read_all(ROOT / "bench" / "records"))
    assert report.write_into(readme, tables) == readme, "run gemcut bench report --readme README.md"


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    one, compared = record("gemcut"), record("graphs=off", "graphs=full")
    assert one.write(tmp_path) == tmp_path / "cpu" / "prefill.json"
    assert compared.write(tmp_path) == tmp_path / "cpu" / "prefill-compare.json"
    (tmp_path / "cpu" / "else.json").write_text('{"what": "no record"}')
    assert report.read_all(tmp_path) == [compared, one]


def test_markdown_holds_every_row_and_its_source() -> None:
    text = report.markdown([record("gemcut")])
    assert "**Prefill of one prompt, one new token** (31B, random weights, cpu)" in text
    assert "| 16 | 1.00 | 2.00 | 1.78 | 2.29 | - | 50% |" in text
    assert "| 256 | 1.00 | 32.0 |" in text
    assert "1.000 TB/s, 2.0 TFLOP/s" in text
    assert "left out: 512 tokens." in text


def test_engines_are_named_where_there_are_several() -> None:
    text = report.markdown([record("graphs=off", "graphs=full")])
    assert "| 16 | graphs=full | 1.00 |" in text


def test_the_source_of_one_run_stands_behind_its_last_table() -> None:
    first = record("gemcut")
    second = replace(first, subject="memory", name="batch", results=[])
    other = replace(second, name="startup", subject="startup", command="gemcut bench startup")
    text = report.markdown([first, replace(second, subject="batch"), other])
    assert text.count("gemcut bench prefill") == 1
    assert text.index("Offline batch") < text.index("gemcut bench prefill") < text.index("Start-up")


def test_tables_go_between_the_marks_and_replace_what_was_there() -> None:
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    once = report.write_into(text, "| new |")
    assert once == f"a\n{report.BEGIN}\n\n| new |\n\n{report.END}\nb\n"
    assert report.write_into(once, "| new |") == once
    with pytest.raises(ConfigError, match="no place for the tables"):
        report.write_into("a\nb\n", "| new |")


def test_the_page_has_a_plot_a_table_and_no_markup_from_outside() -> None:
    page = report.page([record("graphs=off", "graphs=full")])
    assert page == report.page([record("graphs=off", "graphs=full")])
    assert page.count("<svg") == 1
    assert "<td>graphs=full</td>" in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert not re.search(r'(src|href)="http', page), "the page needs no network"


def test_engines_measured_one_after_another_share_a_plot() -> None:
    page = report.page([record("vllm", peer="vllm"), record("gemcut")])
    assert page.count("<svg") == 1
    assert page.count("<table>") == 2
    assert page.index("gemcut bench prefill") < page.rindex("<td>vllm</td>")  # ours comes first
    assert ">gemcut</text>" in page
    assert ">vllm</text>" in page


def test_decode_has_a_plot_of_tokens_a_second_too() -> None:
    page = report.page([decode_record()])
    assert page.count("<svg") == 2
    assert ">tokens a second</text>" in page
    assert "<tr><td>8</td><td>sglang</td><td>2.00</td><td>-</td><td>-</td><td>-</td><td>4.00</td>" in page


def test_settings_are_a_table_of_what_is_set() -> None:
    page = report.page([decode_record()])
    assert "<td>settings.graphs</td><td>&lt;auto&gt;</td>" in page
    assert "kv_bytes" not in page


def test_the_command_writes_both(tmp_path: Path) -> None:
    record("gemcut").write(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    out = tmp_path / "report.html"
    assert (
        main(["bench", "report", "--records", str(tmp_path), "--out", str(out), "--readme", str(readme)]) == 0
    )
    assert "| 256 | 1.00 |" in readme.read_text()
    assert "<svg" in out.read_text()


def test_no_records_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", "--records", str(tmp_path)]) == 1
    assert "There are no records" in capsys.readouterr().err
