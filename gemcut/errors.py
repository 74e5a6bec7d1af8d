"""The error tree. A message says what is wrong, how much, and the remedy.

GemcutError
├── InvalidRequest   the caller's input (HTTP 400); `param` names the field
├── NotFound         a model, file or route that is not there (404)
├── Overloaded       no room now, later perhaps (503); `retry_after_s`
├── ConfigError      a setting, or a model config, that cannot be honoured
└── CheckpointError  weights or tokenizer files that are not what the config promises
"""

from __future__ import annotations


class GemcutError(Exception):
    """Base of every error that gemcut raises on purpose."""


class InvalidRequest(GemcutError):
    """The caller's input cannot be served. `param` names the offending field, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotFound(GemcutError):
    """Something the caller named does not exist."""


class Overloaded(GemcutError):
    """The queue is full. Try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConfigError(GemcutError):
    """A setting or a model config that cannot be honoured."""


class CheckpointError(GemcutError):
    """Checkpoint files that are damaged, incomplete, or not what their config promises."""
