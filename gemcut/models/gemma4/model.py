"""A whole Gemma 4: decoder, vision tower and projector, under the checkpoint's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gemcut.errors import ConfigError
from gemcut.kernels import Backend
from gemcut.models.batch import Batch, LayerKV, Patches
from gemcut.models.checkpoint import Destination
from gemcut.models.gemma4.built import refuse_unbuilt
from gemcut.models.gemma4.text import Decoder
from gemcut.models.gemma4.vision import VisionTower
from gemcut.nn.linear import FusedLinear, Linear
from gemcut.plan import ModelPlan


class Projector(nn.Module):
    """Vision features to soft tokens of the decoder's width."""

    def __init__(self, inputs: int, outputs: int, backend: Backend) -> None:
        super().__init__()
        self.embedding_projection = Linear(inputs, outputs, backend)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.embedding_projection(features)


class Gemma4(nn.Module):
    """The dense and MoE members of the family, with or without their vision tower.

    Build it under `torch.device("meta")`; `checkpoint.load` gives it its weights.
    Raises ConfigError for members whose parts are not built.
    """

    def __init__(self, plan: ModelPlan, backend: Backend) -> None:
        super().__init__()
        refuse_unbuilt(plan)
        self.language_model = Decoder(plan.text, plan.ids.pad, backend)
        if plan.vision is not None:
            self.vision_tower = VisionTower(plan.vision, backend)
            self.embed_vision = Projector(plan.vision.hidden, plan.text.hidden, backend)
        self.plan = plan

    def text_backbone(self) -> Decoder:
        """The decoder, for a runner that captures it alone."""
        return self.language_model

    def encode_images(self, patches: Patches) -> torch.Tensor:
        """Soft tokens [S, H] of all pictures of `patches`, in order."""
        if self.plan.vision is None:
            raise ConfigError("This checkpoint has no vision tower: it takes text only.")
        return self.embed_vision(self.vision_tower(patches))

    def forward(self, batch: Batch, kv: Sequence[LayerKV]) -> torch.Tensor:
        """Final normed hidden states [T, H] of one step; K and V go to the pages of `kv`."""
        return self.language_model(batch, kv)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Soft-capped logits [L, V] fp32 of the hidden states [L, H] of the tokens that need them."""
        return self.language_model.logits(h)[0]

    def checkpoint_map(self) -> dict[str, Destination]:
        """Checkpoint tensor name -> the rows of the parameter that it fills."""
        own_prefix = "language_model."
        places: dict[str, Destination] = {}

        def put(name: str, parameter: str, start: int, stop: int) -> None:
            text = name.startswith(own_prefix)
            full = self.plan.text_prefix + name.removeprefix(own_prefix) if text else f"model.{name}"
            places[full] = Destination(parameter, start, stop)

        fused = {name: module for name, module in self.named_modules() if isinstance(module, FusedLinear)}
        for name, parameter in self.named_parameters():
            owner = name.rpartition(".")[0]
            if owner not in fused:
                put(name, name, 0, parameter.shape[0])
                continue
            start = 0
            for source, rows in fused[owner].sources:
                put(f"{owner.rpartition('.')[0]}.{source}.weight", name, start, start + rows)
                start += rows
        return places
