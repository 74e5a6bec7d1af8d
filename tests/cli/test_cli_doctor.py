"""`gemcut doctor`: a line for everything, secrets kept, and a failure that is one."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from cli_rig import call

from gemcut.cli import doctor


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = call("doctor", "--json")
    assert result.code == 0, result
    report = result.json
    assert report["ok"]
    found = {finding["name"]: finding for finding in report["findings"]}
    assert {"gemcut", "python", "torch", "triton", "cpu", "memory", "hub cache", "settings", "demo"} <= set(
        found
    )
    assert {finding["status"] for finding in found.values()} <= {"ok", "warn"}
    assert "HF_TOKEN=(set)" in found["settings"]["value"]
    assert "hf_secret" not in result.out


def test_plain_lines() -> None:
    result = call("doctor")
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    assert all(
        line.split()[0] in ("ok", "warn", "fail") for line in result.out.splitlines() if line[0] != " "
    )


def test_a_wrong_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXPECTED", "plaid")
    result = call("doctor")
    assert result.code == 1
    assert "fail demo" in result.out
    assert "'plaid' was expected" in result.out


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name in ("jinja2", "triton"):
            raise metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "numpy" else version(name)

    monkeypatch.setattr(metadata, "version", without)
    found = {finding.name: finding for finding in doctor._packages()}
    assert (found["jinja2"].status, found["triton"].status) == ("fail", "ok")
    assert (found["numpy"].status, found["numpy"].remedy) == ("fail", "pip install -U 'numpy>=2.0'")


def test_the_versions_are_those_of_the_project() -> None:
    """One more place that states them; it must not drift from the other."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    least = {
        match[1]: match[2]
        for text in project["dependencies"]
        if (match := re.match(r"([\w-]+)>=([\d.]+)", text))
    }
    assert {name: least[name] for name in doctor.REQUIRED} == doctor.REQUIRED
