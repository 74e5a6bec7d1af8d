"""The names that a user may import, and that importing the package alone brings no torch."""

from __future__ import annotations

import subprocess
import sys

import gemcut

PUBLIC = {
    *("LLM", "AsyncLLM", "SamplingParams", "StructuredOutputs", "RequestOutput", "CompletionOutput"),
    *("GemcutError", "InvalidRequest", "NotFound", "Overloaded", "ConfigError", "CheckpointError"),
}


def test_public_names() -> None:
    assert set(gemcut.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(gemcut, name).__name__ == name


def test_importing_gemcut_imports_no_torch() -> None:
    code = "import gemcut, sys; gemcut.SamplingParams; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
