"""Where the questions come from: a data set on the hub, or a local folder with the same rows.

A part of a data set is one or more files: parquet, as the hub keeps them, or JSON lines or CSV. In parquet a
picture is a cell of bytes, in JSON lines the path of a file in the folder.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.errors import ConfigError, GemcutError, NotFound

KINDS = (".parquet", ".jsonl", ".csv")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """One data set. parts: the glob of each part's files in its repository, without the suffix."""

    repo: str
    parts: Mapping[str, str]

    def rows(self, part: str, folder: Path | None) -> Iterator[Row]:
        """The rows of a part, from `folder` or else from the hub.

        A folder holds the repository's own files, or one file named after the part, such as `test.jsonl`.
        Raises NotFound if there is neither, ConfigError if a library is missing, GemcutError for a file that
        cannot be read.
        """
        for path in self._files(part, folder):
            yield from _READERS[path.suffix](path)

    def _files(self, part: str, folder: Path | None) -> list[Path]:
        pattern = self.parts[part]
        if folder is None:
            root = _download(self.repo, [pattern + kind for kind in KINDS])
        else:
            root = folder.expanduser()
            if not root.is_dir():
                raise NotFound(f"There is no folder {root} to read {self.repo} from.")
        for stem in (pattern, part):
            for kind in KINDS:
                if found := sorted(root.glob(stem + kind)):
                    return found
        raise NotFound(
            f"{root} holds no {pattern}.parquet of {self.repo}, and no {part}.parquet, {part}.jsonl or "
            f"{part}.csv with its rows."
        )


def picture(row: Row, column: str) -> bytes | None:
    """The encoded picture in a cell; None if it is empty. Raises GemcutError if it is none."""
    cell = row.get(column)
    if isinstance(cell, Mapping):
        cell = cell.get("bytes")
    if cell is None or isinstance(cell, bytes):
        return cell
    raise GemcutError(f"The column {column} holds {type(cell).__name__} where a picture should be.")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"To read {path.name}: pip install gemcut[eval].") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise GemcutError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise GemcutError(f"{path}, line {number}, is no JSON: {error}.") from error
                if not isinstance(row, dict):
                    raise GemcutError(f"{path}, line {number}, holds no JSON object, a row by its columns.")
                yield {name: _opened(path, cell) for name, cell in row.items()}


def _opened(path: Path, cell: Any) -> Any:
    """The content of `{"path": ...}`, a picture beside the JSON lines; any other cell as it is."""
    if not isinstance(cell, dict) or cell.keys() != {"path"}:
        return cell
    root = path.parent.resolve()
    file = (root / cell["path"]).resolve()
    if not file.is_relative_to(root):
        raise GemcutError(f"{path} names {cell['path']}, which lies outside of its folder.")
    try:
        return {"bytes": file.read_bytes()}
    except OSError as error:
        raise GemcutError(f"{path} names {cell['path']}, which cannot be read: {error.strerror}.") from error


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


_READERS = {".parquet": _parquet, ".jsonl": _json_lines, ".csv": _csv}


def _download(repo: str, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub library lets through the errors of the HTTP libraries it uses
        raise NotFound(
            f"The data set {repo} could not be had from the hub: {type(error).__name__}. The hub may be out "
            "of reach, or the data set want a licence accepted there and HF_TOKEN set; or name a folder that "
            "holds it with --data."
        ) from error
