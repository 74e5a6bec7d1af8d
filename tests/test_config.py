"""EngineConfig: every setting is checked, and none is inert."""

from __future__ import annotations

from typing import Any

import pytest

from gemcut.config import EngineConfig
from gemcut.errors import ConfigError
from gemcut.llm import LLM, open_files


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int8"),
        ("kernels", "cuda"),
        ("numerics", "exact"),
        ("graphs", "half"),
        ("kv_bytes", 0),
        ("gpu_memory_utilization", 1.5),
        ("max_num_batched_tokens", 0),
        ("max_num_seqs", True),
        ("max_model_len", -1),
        ("page_size", 0),
        ("image_tokens", 100),
        ("seed", "x"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: value})


def test_the_default_picture_budget_is_the_engines() -> None:
    assert open_files(EngineConfig()).image_tokens == 70  # the demo's own
    assert open_files(EngineConfig(image_tokens=140)).image_tokens == 140


def test_what_was_not_taken_is_said() -> None:
    used = LLM(device="cpu", max_num_seqs=1, max_model_len=128).used
    assert (used.device, used.dtype, used.kernels, used.graphs) == ("cpu", "float32", "torch", "off")
    assert used.switched_off == ()
