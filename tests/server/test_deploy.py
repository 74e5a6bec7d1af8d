"""What deploy/ says of the server is so: its metrics, flags, variables, paths and times."""

from __future__ import annotations

import json
import re
from typing import Any

import typer.main
from prometheus_client.parser import text_string_to_metric_families
from server_rig import ROOT, Server

from gemcut.cli.app import app
from gemcut.server.settings import ServerConfig

DEPLOY = ROOT / "deploy"
FILES = ("Dockerfile", "compose.yaml", "gemcut.service")


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text()


def serve_options() -> tuple[set[str], set[str]]:
    """Flags and variables of `gemcut serve`."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    return flags, {str(parameter.envvar) for parameter in command.params if parameter.envvar}


def test_every_metric_of_the_dashboard_exists(scripted: Server) -> None:
    assert scripted.chat("hello", stream=True).status == 200  # so that all histograms have samples
    text = scripted.get("/metrics").body.decode()
    families = list(text_string_to_metric_families(text))
    known = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    known |= {f"{family.name}_total": set() for family in families if family.type == "counter"}
    dashboard: dict[str, Any] = json.loads(text_of("grafana/dashboard.json"))
    panels = dashboard["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    expressions.append(dashboard["templating"]["list"][0]["query"]["query"])
    used = {name for expression in expressions for name in re.findall(r"gemcut:\w+", expression)}
    assert used <= set(known)
    assert len(used) > 15
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells))  # no panel lies over another
    assert max(x for x, _ in cells) < 24


def test_flags_and_variables_exist() -> None:
    flags, variables = serve_options()
    for name in FILES:
        lines = [line for line in text_of(name).splitlines() if not line.lstrip().startswith("#")]
        commands = [line for line in lines if "serve" in line]
        named = {flag for line in commands for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
        assert named <= flags, name
        assert set(re.findall(r"\bGEMCUT_[A-Z_]+", "\n".join(lines))) <= variables, name
    assert "--api-key-file" in text_of("compose.yaml")
    assert "--api-key-file" in text_of("gemcut.service")


def test_those_in_flight_have_the_time_that_the_server_gives_them() -> None:
    drain_s = ServerConfig(served_model_names=("x",)).drain_s
    for name, pattern in (
        ("compose.yaml", r"stop_grace_period: (\d+)s"),
        ("gemcut.service", r"TimeoutStopSec=(\d+)"),
    ):
        found = re.search(pattern, text_of(name))
        assert found is not None
        assert int(found[1]) > drain_s


def test_paths_are_there(scripted: Server) -> None:
    for path in re.findall(r"COPY (?!--from)(.+) \S+\n", text_of("Dockerfile")):
        assert all((ROOT / part).exists() for part in path.split())
    for path in re.findall(r"- (\./\S+?):", text_of("compose.yaml")):
        assert (DEPLOY / path).exists(), path
    (probe,) = re.findall(r"127\.0\.0\.1:8000(/\w+)", text_of("Dockerfile"))
    assert scripted.get(probe).status == 200
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for path in ("pyproject.toml", "README.md", "LICENSE", "gemcut"):
        assert f"!{path}" in ignored
