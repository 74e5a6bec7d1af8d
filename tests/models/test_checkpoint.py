"""Safetensors files fill a model bit for bit, or are refused with the culprit named."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from gemcut.errors import CheckpointError, ConfigError
from gemcut.models import checkpoint
from gemcut.models.checkpoint import Destination, LoadReport, load, read_json, stored_tensors
from gemcut.models.gemma4.model import Gemma4
from gemcut.plan import ModelPlan, canonical_name, is_dead_tensor, parse_config, tensor_shapes

State = dict[str, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED = re.compile(r"(.*)(?:self_attn\.([qkv])|mlp\.(gate|up))_proj\.weight")
CONFIG: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 4,
    "global_head_dim": 8,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size": 12,
}
PLAN = parse_config(CONFIG)
SHAPES = tensor_shapes(PLAN)
NAMES = list(SHAPES)


class Mirror(nn.Module):
    """A model of any plan without a forward: q/k/v and gate/up fused by rows, scalars in vectors of two."""

    def __init__(self, plan: ModelPlan) -> None:
        super().__init__()
        self.places: dict[str, Destination] = {}
        rows: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name, shape in tensor_shapes(plan).items():
            found = FUSED.fullmatch(name) if name.startswith(f"{plan.text_prefix}layers.") else None
            owner = name
            if found is not None:
                owner = f"{found[1]}{'qkv' if found[2] else 'gate_up'}"
            elif not shape:
                owner = re.sub("_(min|max)$", "_bounds", name)
            rows.setdefault(owner, []).append((name, shape))
        for owner, parts in rows.items():
            leaf, start = owner.replace(".", "/"), 0
            for name, shape in parts:
                count = shape[0] if shape else 1
                self.places[name] = Destination(leaf, start, start + count)
                start += count
            values = torch.empty(start, *parts[0][1][1:])
            if leaf.endswith("layer_scalar"):
                self.register_buffer(leaf, values)
            else:
                self.register_parameter(leaf, nn.Parameter(values))

    def checkpoint_map(self) -> dict[str, Destination]:
        return self.places


def on_meta(build: Callable[..., Any], *arguments: Any) -> Any:
    with torch.device("meta"):
        return build(*arguments)


def loaded(
    folder: Path, plan: ModelPlan = PLAN, dtype: torch.dtype = torch.float32, model: Any = None
) -> tuple[State, LoadReport]:
    """({checkpoint name: the rows that it filled}, report)."""
    model = on_meta(Mirror, plan) if model is None else model
    before = list(model.state_dict())
    report = load(model, plan, folder, device="cpu", dtype=dtype)
    state = model.state_dict()
    assert list(state) == before
    assert not any(value.is_meta for value in state.values())
    assert {value.dtype for value in state.values()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    filled = {}
    for name, to in model.checkpoint_map().items():
        value = state[to.parameter]
        filled[name] = (value if value.dim() else value[None])[to.start : to.stop]
    assert sum(value.numel() for value in filled.values()) == sum(value.numel() for value in state.values())
    return filled, report


def values(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def same(filled: State, expected: State, dtype: torch.dtype = torch.float32) -> None:
    assert filled.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(filled[name].reshape(value.shape), value.to(dtype)), name


def write(path: Path, entries: list[tuple[str, Any]], data: bytes, pad: int = 0) -> None:
    """A safetensors file from header entries as they are: a list, so that a key may come twice."""
    header = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}"
    text = header.encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entries_of(path: Path) -> tuple[list[tuple[str, Any]], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return list(json.loads(raw[8 : 8 + length]).items()), raw[8 + length :]


def shard(folder: Path, state: State, shards: int) -> dict[str, str]:
    """Sharded files and their index; the weight_map is returned."""
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: value for j, (name, value) in enumerate(state.items()) if j % shards == i}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / checkpoint.INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )


def clear(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder


def refused(folder: Path, *culprits: str) -> str:
    """The load fails with a CheckpointError that names every culprit."""
    with pytest.raises(CheckpointError) as caught:
        loaded(folder)
    message = str(caught.value)
    for culprit in culprits:
        assert culprit in message
    return message


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that property tests use again for each example."""
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a valid checkpoint of PLAN, values(SHAPES)."""
    path = tmp_path_factory.mktemp("intact") / "model.safetensors"
    save_file(values(SHAPES), path, metadata={"format": "pt"})
    return path


# --- valid files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_arrive_with_one_rounding(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    state = values(SHAPES, stored)
    save_file(state, tmp_path / "model.safetensors")
    filled, report = loaded(tmp_path, dtype=dtype)
    same(filled, state, dtype)
    assert report.files == ("model.safetensors",)
    assert report.bytes == sum(value.nbytes for value in state.values())
    assert report.skipped == ()


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_sharded_equals_single(shards: int, tmp_path: Path) -> None:
    state = values(SHAPES)
    weight_map = shard(tmp_path, state, shards)
    filled, report = loaded(tmp_path)
    same(filled, state)
    assert report.files == tuple(sorted(set(weight_map.values())))


def test_files_may_mix_dtypes(tmp_path: Path) -> None:
    state = {name: value.to(DTYPES[i % 3]) for i, (name, value) in enumerate(values(SHAPES).items())}
    save_file(state, tmp_path / "model.safetensors")
    same(loaded(tmp_path)[0], state)


@pytest.mark.parametrize("pad", range(4))
def test_unaligned_tensors_load(pad: int, intact: Path, place: Path) -> None:
    """The format's own writer aligns the data to 8 bytes; its definition does not ask for it."""
    write(clear(place) / "model.safetensors", *entries_of(intact), pad=pad)
    same(loaded(place)[0], values(SHAPES))


def test_an_index_may_list_the_single_file(intact: Path, place: Path) -> None:
    (clear(place) / "model.safetensors").write_bytes(intact.read_bytes())
    write_index(place, dict.fromkeys(NAMES, "model.safetensors"))
    same(loaded(place)[0], values(SHAPES))


def test_files_may_be_links_as_in_the_hub_cache(intact: Path, place: Path) -> None:
    (clear(place) / "model.safetensors").symlink_to(intact)
    same(loaded(place)[0], values(SHAPES))


def test_files_on_disk_stay_as_they_are(intact: Path, place: Path) -> None:
    before = intact.read_bytes()
    (clear(place) / "model.safetensors").symlink_to(intact)
    model = on_meta(Mirror, PLAN)
    load(model, PLAN, place, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert intact.read_bytes() == before


SHARING = {
    **CONFIG,
    "attention_k_eq_v": False,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}


def test_dead_tensors_are_skipped_by_rule(tmp_path: Path) -> None:
    plan = parse_config(SHARING)
    state = values(tensor_shapes(plan))
    dead = {
        f"model.layers.{i}.self_attn.{name}.weight": torch.full((3,), math.nan)
        for i in (2, 3)
        for name in ("k_proj", "v_proj", "k_norm")
    }
    assert all(is_dead_tensor(plan, name) for name in dead)
    save_file(state | dead, tmp_path / "model.safetensors")
    filled, report = loaded(tmp_path, plan)
    same(filled, state)
    assert set(report.skipped) == set(dead)
    assert report.bytes == sum(value.nbytes for value in state.values())
    alive = "model.layers.1.self_attn.k_proj.weight"
    del state[alive]
    save_file(state | dead, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"Missing tensors: {alive}.")):
        loaded(tmp_path, plan)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_copy_of_the_tied_head_is_skipped(tmp_path: Path) -> None:
    state = values(SHAPES, torch.bfloat16)
    for head in (state[EMBEDDING].clone(), state[EMBEDDING].float()):
        save_file(state | {HEAD: head}, tmp_path / "model.safetensors")
        filled, report = loaded(tmp_path)
        same(filled, state)
        assert report.skipped == (HEAD,)


def test_another_head_is_refused(tmp_path: Path) -> None:
    state = values(SHAPES)
    head = state[EMBEDDING].clone()
    head[-1, -1] += 1
    save_file(state | {HEAD: head}, tmp_path / "model.safetensors")
    refused(tmp_path, HEAD, EMBEDDING, "differs", "tied heads only")
    save_file(state | {HEAD: torch.zeros(11, 8)}, tmp_path / "model.safetensors")
    refused(tmp_path, f"{HEAD} is [11, 8], the embedding that it is tied to [12, 8]")
    save_file(state | {HEAD: head.double()}, tmp_path / "model.safetensors")
    refused(tmp_path, f"{HEAD} is F64")


def test_an_infinite_clip_bound_means_no_clipping(tmp_path: Path) -> None:
    plan = parse_config(tiny.make_config("ple").to_dict())
    state = values(tensor_shapes(plan))
    bound = next(name for name, shape in tensor_shapes(plan).items() if name.endswith("input_max"))
    state[bound].fill_(math.inf)
    save_file(state, tmp_path / "model.safetensors")
    same(loaded(tmp_path, plan)[0], state)
    state[bound].fill_(math.nan)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(bound)):
        loaded(tmp_path, plan)


# --- files of transformers ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers draws a progress bar through logging and stderr while it saves."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


SAVED = [(kind, False) for kind in tiny.KINDS] + [("dense", True), ("moe", True), ("ple", True)]


@pytest.mark.parametrize(("kind", "text_only"), SAVED)
@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
def test_a_folder_of_save_pretrained_loads_as_it_is(
    kind: str, text_only: bool, shard_size: str, tmp_path: Path
) -> None:
    reference = tiny.make_model(kind, text_only=text_only)
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / checkpoint.INDEX).exists() == (shard_size != "5GB")
    plan = parse_config(read_json(tmp_path, "config.json"))
    expected = {name: value for name, value in reference.state_dict().items() if name != HEAD}
    same(loaded(tmp_path, plan)[0], expected)


def test_both_spellings_of_the_unified_embedder_load(tmp_path: Path) -> None:
    plan = parse_config(tiny.make_config("unified").to_dict())
    state = values(tensor_shapes(plan))
    on_disk = {
        "model.embed_vision.multimodal_embedder.": "model.embed_vision.",
        "model.embed_vision.p": "model.vision_embedder.p",
    }

    def spelt(name: str) -> str:
        for ours, theirs in on_disk.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    other = {spelt(name): value for name, value in state.items()}
    assert len(other.keys() - state.keys()) == 10
    assert all(canonical_name(plan, name) in state for name in other)
    for spelling in (state, other):
        save_file(spelling, tmp_path / "model.safetensors")
        same(loaded(tmp_path, plan)[0], state)
    twice = "model.vision_embedder.pos_embedding"
    save_file(state | {twice: other[twice].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"Two spellings .*{re.escape(twice)}"):
        loaded(tmp_path, plan)


@pytest.mark.parametrize(
    ("kind", "text_only"), [("dense", False), ("moe", False), ("dense", True), ("moe", True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemcuts_own_model_takes_every_tensor(
    kind: str, text_only: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = tiny.make_model(kind, text_only=text_only)
    reference.save_pretrained(tmp_path, max_shard_size="300KB")
    plan = parse_config(read_json(tmp_path, "config.json"))
    model = on_meta(Gemma4, plan, "torch")
    expected = {name: value for name, value in reference.state_dict().items() if name != HEAD}
    same(loaded(tmp_path, plan, dtype, model)[0], expected, dtype)


# --- damaged files -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(cut: float, intact: Path, place: Path) -> None:
    raw = intact.read_bytes()
    path = clear(place) / "model.safetensors"
    path.write_bytes(raw[: int(cut * len(raw))])
    refused(place, str(path), "Download it again" if cut else "")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(extra=st.binary(min_size=1, max_size=40))
def test_bytes_after_the_last_tensor_are_refused(extra: bytes, intact: Path, place: Path) -> None:
    (clear(place) / "model.safetensors").write_bytes(intact.read_bytes() + extra)
    refused(place, "model.safetensors", f"{len(extra)} bytes follow")


@settings(max_examples=1200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_flipped_bit_in_the_header_is_refused_or_harmless(
    data: st.DataObject, intact: Path, place: Path
) -> None:
    raw = bytearray(intact.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (clear(place) / "model.safetensors").write_bytes(raw)
    try:
        filled, _ = loaded(place)
    except CheckpointError as error:
        assert "model.safetensors" in str(error) or any(name in str(error) for name in NAMES)  # noqa: PT017
    else:
        same(filled, values(SHAPES))  # a bit of the metadata, or of white space


@settings(max_examples=300, deadline=None, derandomize=True)
@given(content=st.binary(max_size=60), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes_are_refused(content: bytes, length: int | None, place: Path) -> None:
    prefix = (len(content) if length is None else length).to_bytes(8, "little")
    (clear(place) / "model.safetensors").write_bytes(prefix + content)
    refused(place, "model.safetensors" if len(content) > 1 else "")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 100_000])
def test_a_huge_header_is_refused(length: int, intact: Path, place: Path) -> None:
    raw = intact.read_bytes()
    (clear(place) / "model.safetensors").write_bytes(length.to_bytes(8, "little") + raw[8:])
    refused(place, "model.safetensors", f"its header claims {length:,} bytes")


def test_a_header_beyond_the_formats_limit_is_refused(place: Path) -> None:
    with (clear(place) / "model.safetensors").open("wb") as file:
        file.write((10**8 + 1).to_bytes(8, "little") + b"{")
        file.truncate(2 * 10**8)  # sparse: it takes no room on the disk
    refused(place, "model.safetensors", "the format allows 100 MB")


ENTRY = st.sampled_from(range(len(NAMES)))
WEIRD: list[Any] = [
    None,
    True,
    -1,
    0.5,
    "x",
    [],
    [-1],
    [True],
    [1.0],
    [2**62, 2**62],
    ["1"],
    {},
    [1] * 9,
    10**400,
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    which=ENTRY,
    key=st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]),
    value=st.sampled_from([*WEIRD, "I4", "BF17", [0, 4], [4, 0], [0, 2**70], [10**9, 10**9 + 4]]),
)
def test_a_wrong_header_entry_is_refused(
    which: int, key: str | None, value: Any, intact: Path, place: Path
) -> None:
    entries, data = entries_of(intact)
    name, entry = entries[1 + which]  # after __metadata__
    if key is None:
        entries[1 + which] = (name, value)
    else:
        if entry.get(key) == value:
            return
        entry[key] = value
    write(clear(place) / "model.safetensors", entries, data)
    refused(place, "model.safetensors", name)


@pytest.mark.parametrize("fault", ["gap", "overlap"])
def test_gaps_and_overlaps_are_refused(fault: str, intact: Path, place: Path) -> None:
    entries, data = entries_of(intact)
    by_place = sorted(entries[1:], key=lambda item: item[1]["data_offsets"])
    name, entry = by_place[5]
    shift = 4 if fault == "gap" else -4
    entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    write(clear(place) / "model.safetensors", entries, data + bytes(8))
    refused(place, "model.safetensors", name, "leaves a gap after" if fault == "gap" else "overlaps")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(which=ENTRY)
def test_a_key_that_is_there_twice_is_refused(which: int, intact: Path, place: Path) -> None:
    entries, data = entries_of(intact)
    entries.append(entries[1 + which])
    write(clear(place) / "model.safetensors", entries, data)
    refused(place, "model.safetensors", entries[-1][0], "twice")


def test_names_are_printed_safely(intact: Path, place: Path) -> None:
    entries, data = entries_of(intact)
    name, entry = entries[-1]
    entries[-1] = ("\x1b[31m\ud800" + "x" * 5000, entry)
    write(clear(place) / "model.safetensors", entries, data)
    message = refused(place, name, "\\x1b[31m\\ud800xxx")
    assert message.isprintable()
    assert len(message) < 600


# --- sound files of another model --------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    missing=st.sets(st.sampled_from(NAMES), max_size=12),
    extra=st.sets(st.from_regex(r"model\.extra\.[a-z]{1,8}", fullmatch=True), max_size=12),
    shards=st.integers(1, 3),
)
def test_missing_and_extra_tensors_are_named(
    missing: set[str], extra: set[str], shards: int, place: Path
) -> None:
    if not missing and not extra:
        return
    state = {name: value for name, value in values(SHAPES).items() if name not in missing}
    shard(clear(place), state | {name: torch.ones(2) for name in extra}, shards)
    message = refused(place)
    for names, title in (
        (missing, "Missing tensors: "),
        (extra, "Tensors that the config has no place for: "),
    ):
        assert (title in message) == bool(names)
        if not names:
            continue
        listed = message.split(title)[1].split(" and ")[0].split(". ")[0].rstrip(".").split(", ")
        assert len(listed) == min(len(names), 8)
        assert set(listed) <= names
        assert (f"and {len(names) - 8} more" in message) if len(names) > 8 else True


@settings(max_examples=100, deadline=None, derandomize=True)
@given(which=ENTRY, change=st.sampled_from(["transpose", "grow", "flatten", "unsqueeze", "empty"]))
def test_a_wrong_shape_is_named(which: int, change: str, place: Path) -> None:
    state, name = values(SHAPES), NAMES[which]
    value = state[name]
    changed = {
        "transpose": lambda: value.transpose(0, -1).contiguous(),
        "grow": lambda: torch.cat([value, value]),
        "flatten": lambda: value.flatten(),
        "unsqueeze": lambda: value[None],
        "empty": lambda: value[:0],
    }[change]()
    if changed.shape == value.shape:
        return
    save_file(state | {name: changed}, clear(place) / "model.safetensors")
    refused(place, f"Wrong shapes: {name} is {list(changed.shape)}, must be {list(value.shape)}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    which=ENTRY,
    dtype=st.sampled_from(
        [("F64", torch.float64), ("I32", torch.int32), ("U8", torch.uint8), ("BOOL", torch.bool)]
    ),
)
def test_a_wrong_dtype_is_named(which: int, dtype: tuple[str, torch.dtype], place: Path) -> None:
    state, name = values(SHAPES), NAMES[which]
    state[name] = state[name].to(dtype[1])
    save_file(state, clear(place) / "model.safetensors")
    refused(place, f"Wrong dtypes (gemcut loads BF16, F16, F32): {name} is {dtype[0]}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(first=ENTRY, second=ENTRY)
def test_swapped_tensors_are_named(first: int, second: int, place: Path) -> None:
    state = values(SHAPES)
    a, b = NAMES[first], NAMES[second]
    if SHAPES[a] == SHAPES[b]:
        return  # nothing in a file tells two tensors of one shape apart
    state[a], state[b] = state[b], state[a]
    save_file(state, clear(place) / "model.safetensors")
    refused(place, a, b)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    which=ENTRY,
    place_in=st.floats(0, 1, exclude_max=True),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_value_that_is_not_finite_is_named(
    which: int, place_in: float, bad: float, dtype: torch.dtype, place: Path
) -> None:
    state, name = values(SHAPES, dtype), NAMES[which]
    at = int(place_in * state[name].numel())
    state[name].view(-1)[at] = bad
    save_file(state, clear(place) / "model.safetensors")
    index = (state[name] != state[name]) | (state[name].abs() == math.inf)
    refused(
        place, f"{name} in {place / 'model.safetensors'} holds 1 values", str(index.nonzero()[0].tolist())
    )


def test_a_value_too_large_for_the_dtype_is_named(tmp_path: Path) -> None:
    state = values(SHAPES)
    name = NAMES[7]
    state[name].view(-1)[3] = 1e6
    save_file(state, tmp_path / "model.safetensors")
    same(loaded(tmp_path)[0], state)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} holds 1 values too large for float16"):
        loaded(tmp_path, dtype=torch.float16)


# --- folders and indices -----------------------------------------------------------------------------

BAD_TARGETS: list[Any] = [
    "../model.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "x.bin",
    "",
    3,
    None,
    [],
    "..\\x",
]


@pytest.mark.parametrize("target", [*BAD_TARGETS, "a\0.safetensors", "C:x.safetensors"])
def test_an_index_leads_nowhere_else(target: Any, place: Path) -> None:
    weight_map = shard(clear(place), values(SHAPES), 2)
    write_index(place, weight_map | {NAMES[3]: target})
    refused(place, checkpoint.INDEX, NAMES[3])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_wrong_index_is_refused(data: st.DataObject, place: Path) -> None:
    weight_map = shard(clear(place), values(SHAPES), 3)
    name = data.draw(st.sampled_from(NAMES))
    file = weight_map[name]
    other = data.draw(st.sampled_from([f for f in sorted(set(weight_map.values())) if f != file]))
    match data.draw(st.sampled_from(["moved", "unlisted", "phantom", "absent", "copy", "exchanged", "long"])):
        case "moved":
            write_index(place, weight_map | {name: other})
            refused(place, checkpoint.INDEX, f"{name} (index: {other}, found in: {file})")
        case "unlisted":
            del weight_map[name]
            write_index(place, weight_map)
            refused(place, checkpoint.INDEX, f"does not list: {name}")
        case "phantom":
            write_index(place, weight_map | {"model.phantom": file})
            refused(place, f"model.phantom (index: {file}, found in: none)")
        case "absent":
            (place / file).unlink()
            refused(place, f"lacks {file}")
        case "copy":
            entries, content = entries_of(place / other)
            size = values(SHAPES)[name].nbytes
            copy_entry = {
                "dtype": "F32",
                "shape": list(SHAPES[name]),
                "data_offsets": [len(content), len(content) + size],
            }
            write(place / other, [*entries, (name, copy_entry)], content + bytes(size))
            refused(place, f"{name} is in two files", file, other)
        case "exchanged":
            first, second = (place / file).read_bytes(), (place / other).read_bytes()
            (place / file).write_bytes(second)
            (place / other).write_bytes(first)
            refused(place, checkpoint.INDEX, file, other)
        case "long":
            write_index(place, weight_map | {name: "x" * 5000 + ".safetensors"})
            refused(place)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        "{}",
        '{"weight_map": {"a": "b"}',
        "\xff",
    ],
)
def test_a_damaged_index_is_refused(text: str, place: Path) -> None:
    shard(clear(place), values(SHAPES), 2)
    (place / checkpoint.INDEX).write_text(text, encoding="latin-1")
    refused(place, checkpoint.INDEX)


def test_an_index_with_a_key_twice_is_refused(place: Path) -> None:
    weight_map = shard(clear(place), values(SHAPES), 2)
    text = json.dumps({"weight_map": weight_map})
    name = NAMES[0]
    (place / checkpoint.INDEX).write_text(
        text.replace(f'"{name}":', f'"{name}": "x.safetensors", "{name}":', 1)
    )
    refused(place, checkpoint.INDEX, name, "twice")


FOLDERS: list[tuple[list[str], str]] = [
    ([], "holds no weights"),
    (["pytorch_model.bin"], "pytorch_model.bin; gemcut loads safetensors only.*save_pretrained"),
    (["model.pt"], "gemcut loads safetensors only"),
    (["gemma-4-q4_0.gguf"], "gemcut does not read GGUF"),
    (["model-00001-of-00002.safetensors"], "model.safetensors.index.json, which says"),
    (["adapter_model.safetensors"], "adapter_model.safetensors, but neither"),
]


@pytest.mark.parametrize(("files", "message"), FOLDERS)
def test_folders_without_safetensors_weights_are_refused(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=message):
        stored_tensors(tmp_path)


def test_what_is_no_folder_or_no_file_is_refused(place: Path) -> None:
    clear(place)
    refused(place / "nowhere", "nowhere is not a folder")
    (place / "model.safetensors").mkdir()
    try:
        refused(place, "model.safetensors cannot be read")
    finally:
        (place / "model.safetensors").rmdir()


def test_two_answers_to_which_weights_are_refused(intact: Path, place: Path) -> None:
    shard(clear(place), values(SHAPES), 2)
    (place / "model.safetensors").write_bytes(intact.read_bytes())
    refused(place, "they may disagree. Remove one")


# --- read_json ---------------------------------------------------------------------------------------

BAD_JSON: list[tuple[bytes, str]] = [
    (b"", "is not valid JSON"),
    (b'{"a": 1', "not valid JSON.*cut off"),
    (b'{"a": "b', "not valid JSON.*cut off"),
    (b"[1]", "must hold a JSON object, it holds list"),
    (b'{"a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
    (b'{"a": NaN}', "NaN is not JSON"),
    (b'{"a": "\xff"}', "is not UTF-8"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
]


@pytest.mark.parametrize(("text", "message"), BAD_JSON, ids=[m for _, m in BAD_JSON])
def test_bad_json_is_refused_by_file(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        read_json(tmp_path, "config.json")


def test_good_json_is_read_and_a_missing_file_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": {"b": 1}, "c": "ü"}', encoding="utf-8")
    assert read_json(tmp_path, "config.json") == {"a": {"b": 1}, "c": "ü"}
    with pytest.raises(CheckpointError, match=r"generation_config\.json is missing from"):
        read_json(tmp_path, "generation_config.json")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_json(tmp_path.parent, tmp_path.name)


# --- the model's side --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["overlap", "gap", "short", "unknown", "absent", "misfit", "tied"])
def test_a_wrong_map_is_a_broken_invariant(fault: str, intact: Path, place: Path) -> None:
    (clear(place) / "model.safetensors").write_bytes(intact.read_bytes())
    model = on_meta(Mirror, PLAN)
    qkv = [
        name for name in model.places if "layers.0.self_attn.q_proj" in name or "0.self_attn.k_proj" in name
    ]
    to = [model.places[name] for name in qkv]
    match fault:
        case "overlap":
            model.places[qkv[1]] = Destination(to[1].parameter, to[0].start, to[0].stop)
        case "gap":
            model.places[qkv[0]] = Destination("new", 0, 8)
            model.register_parameter("new", nn.Parameter(torch.empty(8, 8, device="meta")))
        case "short":
            setattr(model, to[0].parameter, nn.Parameter(torch.empty(40, 8, device="meta")))
        case "unknown":
            model.places[qkv[0]] = Destination("nowhere", 0, 8)
        case "absent":
            del model.places[qkv[0]]
        case "misfit":
            model.places[qkv[0]] = Destination(to[0].parameter, 0, 7)
        case "tied":
            model.register_parameter("twin", model.get_parameter(EMBEDDING.replace(".", "/")))
    with pytest.raises(AssertionError):
        loaded(place, model=model)


def test_a_destination_without_rows_is_the_whole_parameter(intact: Path, place: Path) -> None:
    (clear(place) / "model.safetensors").write_bytes(intact.read_bytes())
    model = on_meta(Mirror, PLAN)
    model.places[EMBEDDING] = Destination(model.places[EMBEDDING].parameter)
    same(loaded(place, model=model)[0], values(SHAPES))


def test_too_little_gpu_memory_is_said_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4_000, 8_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    model = nn.Linear(1000, 1000, bias=False, device="meta")
    with pytest.raises(ConfigError, match=r"Weights need 0\.0 GB, GPU 1 has 0\.0 GB free\. Use"):
        checkpoint._check_memory(model, torch.device("cuda", 1), torch.bfloat16)
    small = nn.Linear(40, 50, bias=False, device="meta")
    checkpoint._check_memory(small, torch.device("cuda", 1), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("chunk", [64, 16 << 20])
def test_a_gpu_gets_what_the_cpu_gets(
    stored: torch.dtype, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk)
    state = values(SHAPES, stored)
    shard(tmp_path, state, 3)
    model = on_meta(Mirror, PLAN)
    load(model, PLAN, tmp_path, device="cuda", dtype=torch.bfloat16)
    other = on_meta(Mirror, PLAN)
    load(other, PLAN, tmp_path, device="cpu", dtype=torch.bfloat16)
    for (name, on_gpu), on_cpu in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert on_gpu.is_cuda
        assert torch.equal(on_gpu.cpu(), on_cpu), name


def test_many_random_corruptions_end_in_one_kind_of_error(intact: Path, place: Path) -> None:
    """Several faults at once: bytes overwritten, cut and repeated anywhere in the file."""
    raw, draw = intact.read_bytes(), random.Random(0)
    path = clear(place) / "model.safetensors"
    for _ in range(400):
        damaged = bytearray(copy.copy(raw))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(max(1, len(damaged)))
            match draw.randrange(3):
                case 0:
                    damaged[at : at + draw.randint(1, 8)] = draw.randbytes(draw.randint(1, 8))
                case 1:
                    del damaged[at : at + draw.randint(1, 4000)]
                case _:
                    damaged[at:at] = damaged[at : at + draw.randint(1, 400)]
        path.write_bytes(damaged)
        try:
            loaded(place)
        except CheckpointError as error:
            assert "model.safetensors" in str(error) or any(n in str(error) for n in NAMES)  # noqa: PT017
