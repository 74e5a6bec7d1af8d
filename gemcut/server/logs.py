"""Logs as one JSON object a line, on stderr. What a user wrote is never among it."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


class JsonLines(logging.Formatter):
    """time, level, logger, message, the `fields` of the record and, for an exception, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(_clean(line)).decode()


def _clean(line: dict[str, Any]) -> dict[str, Any]:
    # half a surrogate pair, as a header can smuggle in, is no JSON
    return {
        key: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
        for key, value in line.items()
    }


def configure(level: int = logging.INFO) -> None:
    """Send all logs of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("gemcut").handlers.clear()  # the command's, for people
    logging.captureWarnings(True)
