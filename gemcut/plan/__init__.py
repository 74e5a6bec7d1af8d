"""A model's config becomes frozen facts, once.

Enters: the JSON of a checkpoint's `config.json`. Leaves: a `ModelPlan` with one `LayerPlan` per
decoder layer. Attention, MLP, KV pools, checkpoint loader and cost model all read these facts, and
none derives them again. No torch here.
"""

from gemcut.plan.costs import (
    Work,
    batch_work,
    forward_work,
    kv_bytes,
    kv_bytes_per_token,
    tower_work,
    weight_bytes,
)
from gemcut.plan.facts import (
    AudioPlan,
    ExpertsPlan,
    LayerPlan,
    ModelPlan,
    PatchEmbedderPlan,
    PerLayerInputPlan,
    Rope,
    TextPlan,
    TokenIds,
    VisionPlan,
)
from gemcut.plan.parse import parse_config
from gemcut.plan.tensors import canonical_name, is_dead_tensor, parameter_count, tensor_shapes

__all__ = [
    "AudioPlan",
    "ExpertsPlan",
    "LayerPlan",
    "ModelPlan",
    "PatchEmbedderPlan",
    "PerLayerInputPlan",
    "Rope",
    "TextPlan",
    "TokenIds",
    "VisionPlan",
    "Work",
    "batch_work",
    "canonical_name",
    "forward_work",
    "is_dead_tensor",
    "kv_bytes",
    "kv_bytes_per_token",
    "parameter_count",
    "parse_config",
    "tensor_shapes",
    "tower_work",
    "weight_bytes",
]
