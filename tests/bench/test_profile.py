"""Kernels are known by their sources, library products by their place among them."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import gemcut.kernels
from gemcut.bench.profile import own_kernels, segments

FOLDERS = [path for path in Path(gemcut.kernels.__path__[0]).iterdir() if (path / "triton.py").is_file()]
GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN"


def test_every_kernel_folder_launches_something_that_is_known() -> None:
    assert set(own_kernels().values()) == {folder.name for folder in FOLDERS}


def test_no_two_folders_launch_kernels_of_one_name() -> None:
    """A profile could not tell them apart."""
    launched = defaultdict(set)
    for folder in FOLDERS:
        for node in ast.walk(ast.parse((folder / "triton.py").read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched[ast.unparse(node.func.value)].add(folder.name)
    assert {name: folders for name, folders in launched.items() if len(folders) > 1} == {}


def test_a_moe_layer_and_the_head() -> None:
    names = {
        "_embed": "embed",
        GEMM: "linear qkv",
        "_prepare_qkv": "prepare_qkv",
        "_attend_chunks": "attention",
        "nvjet_o": "linear o",
        "_add_norm_moe": "add_norm",
        "nvjet_gate_up": "linear gate/up",
        "_glu": "glu",
        "cutlass_80_down": "linear down",
        "_route": "router",
        "_order": "router",
        "_grouped": "experts gate/up",
    }
    assert segments(list(names)) == list(names.values())
    tail = ["_grouped", "_grouped", "_close_layer_moe", GEMM, "_prepare_qkv"]
    assert segments(tail) == ["experts gate/up", "experts down", "close_layer", "linear qkv", "prepare_qkv"]


def test_a_layer_of_the_tower_opens_with_the_norm_that_closes_the_one_before() -> None:
    names = ["_prepare_tower_qkv", "_attend", "nvjet_o", "_add_norm", "nvjet_gate_up", "_glu", "nvjet_down"]
    assert segments([*names, "_add_norm", "nvjet_qkv"])[2::2] == [
        *("linear o", "linear gate/up", "linear down", "linear qkv"),
    ]


def test_the_product_before_the_logits_is_the_head() -> None:
    names = ["_close_layer", "vectorized_gather_kernel", GEMM, "cublasLt::splitKreduce_kernel", "_cap"]
    assert segments(names) == ["close_layer", "other", "linear head", "linear head", "logits"]


def test_a_product_of_our_own_is_named_by_its_place() -> None:
    assert segments(["_attend_single", "_linear", "Memset (Device)"]) == ["attention", "linear o", "other"]
