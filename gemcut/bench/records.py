"""Records: what was measured, on what, with what, and how to measure it again. Tables are made from them.

`<folder>/<device>/<name>.json`, the latest run only. README's tables and the report read the same files.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemcut.bench.timing import Ceilings

PACKAGES = ("torch", "triton", "transformers", "vllm", "sglang")


class Table(NamedTuple):
    """Cells as they are shown, the same on a terminal, in the README and in a report."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def as_text(self) -> str:
        """Columns of text, the first to the left and the others to the right."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One subject's measurement.

    name: of its file; the subject's own, unless engines were set against one another or it is a peer's.
    facts: the setting, its keys depend on the subject. notes: what a reader of the numbers has to know.
    """

    subject: str
    name: str
    device: str
    command: str
    commit: str | None
    versions: dict[str, str]
    ceilings: dict[str, float] | None
    facts: dict[str, Any]
    results: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        subject: str,
        device: torch.device,
        ceilings: Ceilings | None,
        results: Sequence[Any],
        *,
        command: str,
        facts: Mapping[str, Any],
        notes: Sequence[str] = (),
        peer: str = "",
    ) -> Record:
        """results: dataclasses, one a row. peer: whose they are, if not ours."""
        engines = {getattr(result, "engine", "") for result in results}
        return cls(
            subject=subject,
            name="-".join(filter(None, (subject, peer, "compare" if len(engines) > 1 else ""))),
            device=device_name(device),
            command=command,
            commit=_commit(),
            versions=_versions(),
            ceilings=None if ceilings is None else asdict(ceilings),
            facts=dict(facts),
            results=[rounded(asdict(result)) for result in results],
            notes=list(notes),
        )

    def write(self, folder: Path) -> Path:
        path = folder / self.device.lower().replace(" ", "-") / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record in a file; None if it is something else."""
        entry = json.loads(path.read_text())
        known = {each.name for each in fields(cls)}
        return cls(**entry) if isinstance(entry, dict) and entry.keys() == known else None


def rounded(value: Any) -> Any:
    """Floats to five digits: more is noise, and makes every run a diff of every line."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def device_name(device: torch.device) -> str:
    """The GPU's own name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _commit() -> str | None:
    """The checkout's commit, with a + if something in it was changed; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


# ---- cells


def ms(value: float | None) -> str:
    """Milliseconds, to three digits or so."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
