"""The operations that a model is written in, one folder each.

Enters: tensors of one step. Leaves: tensors. Every operation is one segment between two matrix
products (spec 2.6) or a product itself. `op.py` of a folder holds the contract: signature, shapes,
checks at the door, dispatch, and the torch reference that is the parity mode and runs on a CPU.
Nothing here knows layers, requests or checkpoints.
"""

from gemcut.kernels.add_norm.op import add_norm, add_norm_moe
from gemcut.kernels.attention.op import paged_attention
from gemcut.kernels.backend import Backend
from gemcut.kernels.close_layer.op import close_layer, close_layer_moe
from gemcut.kernels.embed.op import embed
from gemcut.kernels.experts.op import grouped_glu, grouped_linear
from gemcut.kernels.glu.op import glu
from gemcut.kernels.linear.op import linear
from gemcut.kernels.logits.op import block_maxima, logits
from gemcut.kernels.per_layer.op import add_normed, gate_per_layer, per_layer_inputs
from gemcut.kernels.prepare_qkv.op import prepare_q, prepare_qkv
from gemcut.kernels.rope.op import rope_table
from gemcut.kernels.router.op import Routing, route_experts
from gemcut.kernels.sample.op import sample
from gemcut.kernels.tower.op import (
    add_positions,
    pool_patches,
    prepare_tower_qkv,
    scale_patches,
)
from gemcut.kernels.tower_attention.op import tower_attention

__all__ = [
    "Backend",
    "Routing",
    "add_norm",
    "add_norm_moe",
    "add_normed",
    "add_positions",
    "block_maxima",
    "close_layer",
    "close_layer_moe",
    "embed",
    "gate_per_layer",
    "glu",
    "grouped_glu",
    "grouped_linear",
    "linear",
    "logits",
    "paged_attention",
    "per_layer_inputs",
    "pool_patches",
    "prepare_q",
    "prepare_qkv",
    "prepare_tower_qkv",
    "rope_table",
    "route_experts",
    "sample",
    "scale_patches",
    "tower_attention",
]
