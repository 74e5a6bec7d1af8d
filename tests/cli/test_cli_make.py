"""The Makefile's set-up, as far as it can be seen without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_rig import LIMIT_S

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A target in a folder that holds the Makefile and nothing else of the project."""
    shutil.copy(ROOT / "Makefile", folder)
    if not (folder / "pyproject.toml").exists():
        (folder / "pyproject.toml").touch()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *words], cwd=folder, capture_output=True, text=True, check=False, env=clean, timeout=LIMIT_S
    )


def test_without_a_target_there_is_help(tmp_path: Path) -> None:
    found = make(tmp_path)
    assert found.returncode == 0
    assert all(f"make {target}" in found.stdout for target in ("demo", "test", "check", "clean"))


def test_what_is_installed_is_not_installed_again(tmp_path: Path) -> None:
    assert "pip install" in make(tmp_path, "-n", "test").stdout
    (tmp_path / ".venv").mkdir()
    for stamp in (".python", ".run", ".dev"):
        (tmp_path / ".venv" / stamp).touch()
    again = make(tmp_path, "-n", "test").stdout
    assert "pip install" not in again
    assert "pytest" in again
    os.utime(tmp_path / ".venv" / ".dev", (0, 0))  # older than pyproject.toml
    assert "pip install" in make(tmp_path, "-n", "test").stdout


def test_a_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 'gemcut needs Python 3.11 to 3.13; this is 3.9.' >&2; exit 1\n")
    old.chmod(0o755)
    found = make(tmp_path, "test", f"PYTHON={old}")
    assert found.returncode != 0
    assert "gemcut needs Python 3.11 to 3.13" in found.stderr
    assert not (tmp_path / ".venv").exists()
    none = make(tmp_path, "test", "PYTHON=")
    assert none.returncode != 0
    assert "gemcut needs Python 3.11, 3.12 or 3.13" in none.stderr


def test_ci_runs_the_suite() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"
