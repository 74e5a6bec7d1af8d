"""Which members of the family can be run. No torch here: `gemcut inspect` asks as well."""

from __future__ import annotations

from gemcut.errors import ConfigError
from gemcut.plan import ModelPlan


def missing_parts(plan: ModelPlan) -> list[str]:
    """What a model needs and the code has not got yet, each in words; empty if it runs."""
    missing = []
    if plan.text.per_layer_input is not None and any(layer.experts for layer in plan.text.layers):
        missing.append("per-layer embeddings beside experts")
    if plan.vision is not None and plan.vision.clipped:
        missing.append("clipped linears in the vision tower (E2B, E4B)")
    if plan.patch_embedder is not None:
        missing.append("the encoder-free picture and audio embedders (12B)")
    elif plan.audio is not None:
        missing.append("the audio tower (E2B, E4B)")
    return missing


def refuse_unbuilt(plan: ModelPlan) -> None:
    """Raise ConfigError for a model that needs parts which are not built."""
    missing = missing_parts(plan)
    if missing:
        raise ConfigError(
            f"gemcut does not run this model yet: it needs {', '.join(missing)}. "
            "It runs 26B-A4B, 31B and text-only models of the family; `gemcut inspect` plans all sizes."
        )
