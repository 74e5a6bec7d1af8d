"""gemcut: a Gemma 4 engine. Pictures and text in, text out.

from gemcut import LLM
LLM().chat([{"role": "user", "content": "Hello"}])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gemcut.errors import (
        CheckpointError,
        ConfigError,
        GemcutError,
        InvalidRequest,
        NotFound,
        Overloaded,
    )
    from gemcut.llm import LLM, AsyncLLM
    from gemcut.outputs import CompletionOutput, RequestOutput
    from gemcut.sampling import SamplingParams, StructuredOutputs

# Looked up on first use: `import gemcut` costs nothing, torch comes with LLM.
_HOMES = {
    **dict.fromkeys(("LLM", "AsyncLLM"), "gemcut.llm"),
    **dict.fromkeys(("CompletionOutput", "RequestOutput"), "gemcut.outputs"),
    **dict.fromkeys(("SamplingParams", "StructuredOutputs"), "gemcut.sampling"),
    **dict.fromkeys(
        ("CheckpointError", "ConfigError", "GemcutError", "InvalidRequest", "NotFound", "Overloaded"),
        "gemcut.errors",
    ),
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "GemcutError",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gemcut' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
