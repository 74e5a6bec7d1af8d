"""The command as a whole: help at once and without torch, the version, an environment twin for every flag."""

from __future__ import annotations

import resource
import subprocess
import sys
import typing

import pytest
import typer
from cli_rig import call, environment, refused

import gemcut
from gemcut.cli.app import app
from gemcut.config import EngineConfig

COMMANDS = ("run", "chat", "serve", "render", "inspect", "doctor", "download", "eval")


def test_help_needs_no_rooms_and_little_time() -> None:
    code = (
        "import sys; from gemcut.cli import main; assert main(['--help']) == main(['run', '-h']) == 0; "
        "heavy = {'torch', 'numpy', 'PIL', 'tokenizers', 'huggingface_hub', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    took = []
    for _ in range(3):
        began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=False, env=environment()
        )
        took.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began)
        assert found.returncode == 0, found.stderr
        assert b"\x1b" not in found.stdout
    assert min(took) < 0.4  # seconds of the processor: a busy machine does not decide the test


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    for flag in ("-h", "--help"):
        result = call(command, flag)
        assert (result.code, result.err) == (0, "")
        assert "Usage: gemcut" in result.out


def test_without_a_command_there_is_help() -> None:
    result = call()
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)


def test_version() -> None:
    result = call("--version")
    assert (result.code, result.out) == (0, f"gemcut {gemcut.__version__}\n")


def test_every_flag_has_its_twin() -> None:
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.name == "help" or parameter.param_type_name == "argument":
                continue
            twin = "GEMCUT_" + parameter.opts[0].removeprefix("--").upper().replace("-", "_")
            assert parameter.envvar == twin, (name, parameter.name)


def test_choices_are_those_of_the_engine() -> None:
    from gemcut.cli import options

    config = typing.get_type_hints(EngineConfig)
    for field, flag in (("dtype", options.DType), ("kernels", options.Kernels)):
        assert typing.get_args(typing.get_args(flag)[0]) == typing.get_args(config[field]), field


def test_no_command_of_that_name() -> None:
    refused(2, "serv", says="No such command")


def test_a_download_of_a_folder_names_the_folder(tmp_path: object) -> None:
    assert call("download", str(tmp_path)).out == f"{tmp_path}\n"
    refused(1, "download", "nowhere", says="There is no folder nowhere")
    refused(2, "download", says="MODEL")


@pytest.mark.parametrize("module", ["gemcut", "gemcut.cli"])
def test_modules_end_with_the_commands_status(module: str) -> None:
    """Both ways to call the command without its script: a mistake shows in the exit code."""
    command = [sys.executable, "-m", module, "run", "hi", "--graphs", "half"]
    found = subprocess.run(command, capture_output=True, check=False, env=environment())
    assert found.returncode == 2, found.stderr
    assert b"--graphs" in found.stderr
