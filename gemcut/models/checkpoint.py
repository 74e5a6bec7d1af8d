"""Safetensors files fill a model.

Enters: a folder of files, and a model on the meta device whose `checkpoint_map` says where each tensor
goes. Leaves: the same model with its parameters on the target device in the target dtype, fused ones
assembled, every tensor of the plan there and finite. Files are memory-mapped and each value is read
once. Nothing here knows a layer: names and shapes come from the plan, places from the model.
"""

from __future__ import annotations

import math
import mmap
import queue
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gemcut.errors import CheckpointError, ConfigError
from gemcut.hub import parse_json_object, read_json
from gemcut.plan import ModelPlan, canonical_name, is_dead_tensor, tensor_shapes
from gemcut.plan.tensors import CLIP_BOUNDS

__all__ = [
    "Destination",
    "LoadReport",
    "Loadable",
    "StoredTensor",
    "allocate",
    "load",
    "match_tensors",
    "read_header",
    "read_json",
    "stored_tensors",
]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
# bits of one value, for every dtype of the format
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
LOADED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMED = 8  # tensors that an error names before it says how many more there are
CHUNK_BYTES = 16 << 20  # of pinned memory, for each of the copying threads
COPY_THREADS = 8


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a checkpoint tensor goes: rows [start, stop) of dim 0 of a parameter.

    parameter: the name in the module's own state_dict. stop None: to the last row. A parameter without
    dimensions counts as one row, and a tensor without dimensions may fill one row of a vector.
    """

    parameter: str
    start: int = 0
    stop: int | None = None


class Loadable(Protocol):
    """A model, built on the meta device, that knows where each tensor of its checkpoint goes."""

    def checkpoint_map(self) -> Mapping[str, Destination]:
        """Names of `gemcut.plan.tensor_shapes` -> places. Together they fill every row exactly once."""
        ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: its bytes are [start, stop) of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. `bytes`: read from the files. `skipped`: dead tensors and a tied head's copy."""

    files: tuple[str, ...]
    bytes: int
    seconds: float
    skipped: tuple[str, ...]


def load(
    model: Any, plan: ModelPlan, folder: Path, *, device: torch.device | str, dtype: torch.dtype
) -> LoadReport:
    """Fill `model` (a torch.nn.Module that is `Loadable`) from the safetensors files of `folder`.

    Every parameter and every buffer of the state_dict is allocated once on `device` in `dtype` and takes
    the place of the meta one; buffers outside the state_dict are the model's own to compute and are left
    alone. Values are cast with one rounding.

    Raises CheckpointError that names the tensor or file if the folder is not exactly what the plan
    promises or a value is not finite, ConfigError if the device has too little memory. After an error
    the model is not usable.
    """
    began = time.perf_counter()
    device = torch.device(device)
    wanted, skipped = match_tensors(plan, stored_tensors(folder))
    targets = allocate(model, plan, device=device, dtype=dtype)
    copies = [(stored, targets[name]) for name, stored in wanted.items()]
    with torch.no_grad():
        if device.type == "cuda":
            _copy_to_gpu(copies, device)
        else:
            maps = _Maps()
            for stored, target in copies:
                target.copy_(maps.tensor(stored))
        _check_finite(copies)
    _check_tied_head(skipped, wanted[f"{plan.text_prefix}embed_tokens.weight"])
    return LoadReport(
        files=tuple(sorted({stored.file.name for stored in wanted.values()})),
        bytes=sum(stored.stop - stored.start for stored in wanted.values()),
        seconds=time.perf_counter() - began,
        skipped=tuple(stored.name for stored in skipped),
    )


# --- files -------------------------------------------------------------------------------------------


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder's safetensors files, by their names on disk. Only headers are read.

    Raises CheckpointError if the files are missing, damaged, or not where the index says.
    """
    try:
        return _stored_tensors(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}.") from error


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(_no_weights(folder))
        return read_header(folder / SINGLE)
    index = read_json(folder, INDEX)
    where = folder / INDEX
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map that says which tensor is in which file.")
    for name, file in weight_map.items():
        # A bare name only: an index must not lead out of its folder.
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\\0:"):
            raise CheckpointError(
                f"{where} puts {_shown(name)} into {_shown(str(file))}; gemcut reads files *.safetensors of "
                "the same folder."
            )
    files = sorted(set(weight_map.values()))
    if SINGLE not in files and (folder / SINGLE).exists():
        raise CheckpointError(
            f"{folder} holds {SINGLE} and an index of other files ({INDEX}); they may disagree. Remove one."
        )
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {_several(absent)}, named by {INDEX}. Download the checkpoint again."
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{_shown(name)} is in two files, {tensors[name].file.name} and {file}."
                )
            tensors[name] = stored
    wrong = [
        f"{_shown(name)} (index: {file}, found in: {tensors[name].file.name if name in tensors else 'none'})"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if wrong:
        raise CheckpointError(f"Tensors that are not where {where} says: {_several(wrong)}.")
    if unlisted := [_shown(name) for name in tensors if name not in weight_map]:
        raise CheckpointError(f"Tensors in the files that {where} does not list: {_several(unlisted)}.")
    return tensors


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{folder} holds {_several(shards)}, but neither {SINGLE} nor {INDEX}, which says which tensor "
            "is in which file. Download the checkpoint again."
        )
    if refused := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{folder} holds {_several(refused)}; gemcut loads safetensors only, since opening a pickled "
            "file can run code. Convert it with transformers: "
            "AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(new_folder)."
        )
    if refused := [name for name in names if name.endswith(".gguf")]:
        return (
            f"{folder} holds {_several(refused)}; gemcut does not read GGUF. Use the safetensors checkpoint."
        )
    return f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there."


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises CheckpointError unless the header is strict JSON within bounds and its tensors cover the rest
    of the file exactly, without gaps or overlaps.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is damaged: its header claims {length:,} bytes, the file has {size:,}"
                    f"{' and the format allows 100 MB' if length <= size - 8 else ''}. Download it again."
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path} is not a safetensors file: its header does not begin with '{{'.")
    entries = parse_json_object(header, f"The header of {path}")
    entries.pop("__metadata__", None)
    begin = 8 + length
    tensors = [_entry(path, name, entry, begin) for name, entry in entries.items()]
    tensors.sort(key=lambda stored: (stored.start, stored.stop))
    at, last = begin, "the header"
    for stored in tensors:
        if stored.start != at:
            fault = "overlaps" if stored.start < at else "leaves a gap after"
            raise CheckpointError(f"{path} is damaged: {_shown(stored.name)} {fault} {last}.")
        at, last = stored.stop, _shown(stored.name)
    if at != size:
        fault = f"{at - size:,} bytes are missing" if at > size else f"{size - at:,} bytes follow"
        raise CheckpointError(f"{path} is damaged: {fault} after its last tensor, {last}. Download it again.")
    return {stored.name: stored for stored in tensors}


def _entry(path: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    where = f"{path} is damaged: {_shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} needs exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has the unknown dtype {_shown(str(dtype))}.")
    if not _sizes(shape):
        raise CheckpointError(f"{where} has the shape {_shown(str(shape))}.")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the data_offsets {_shown(str(offsets))}.")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where} has {offsets[1] - offsets[0]:,} bytes; {dtype} {shape} takes {-(-bits // 8):,}."
        )
    return StoredTensor(name, path, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _sizes(value: Any) -> bool:
    """A list of a few whole numbers that a file could have: JSON bounds neither."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 2**62 for item in value)
    )


# --- names -------------------------------------------------------------------------------------------


def match_tensors(
    plan: ModelPlan, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[StoredTensor]]:
    """(the plan's tensors by their names in `tensor_shapes`, those to skip).

    Skipped are the dead tensors of KV-shared layers (spec 8.2) and an `lm_head.weight` in the shape of
    the tied embedding. Raises CheckpointError that names every missing, extra, misshapen and wrongly
    typed tensor (the first 8 of each).
    """
    shapes = tensor_shapes(plan)
    embedding = shapes[f"{plan.text_prefix}embed_tokens.weight"]
    wanted: dict[str, StoredTensor] = {}
    skipped: list[StoredTensor] = []
    extra, twice, misshapen, mistyped = [], [], [], []
    for name, stored in tensors.items():
        canonical = canonical_name(plan, name)
        if canonical in wanted:
            twice.append(f"{_shown(name)} and {_shown(wanted[canonical].name)}")
        elif canonical in shapes:
            wanted[canonical] = stored
            if stored.shape != shapes[canonical]:
                misshapen.append(f"{name} is {list(stored.shape)}, must be {list(shapes[canonical])}")
            if stored.dtype not in LOADED_DTYPES:
                mistyped.append(f"{name} is {stored.dtype}")
        elif is_dead_tensor(plan, name):
            skipped.append(stored)
        elif name == "lm_head.weight":
            skipped.append(stored)
            if stored.shape != embedding:
                misshapen.append(
                    f"{name} is {list(stored.shape)}, the embedding that it is tied to {list(embedding)}"
                )
            if stored.dtype not in LOADED_DTYPES:
                mistyped.append(f"{name} is {stored.dtype}")
        else:
            extra.append(_shown(name))
    faults = [
        f"{title}: {_several(names)}."
        for title, names in (
            ("Missing tensors", [name for name in shapes if name not in wanted]),
            ("Tensors that the config has no place for", extra),
            ("Two spellings of the same tensor", twice),
            ("Wrong shapes", misshapen),
            (f"Wrong dtypes (gemcut loads {', '.join(LOADED_DTYPES)})", mistyped),
        )
        if names
    ]
    if faults:
        raise CheckpointError("The weights are not what config.json promises. " + " ".join(faults))
    return wanted, skipped


def _shown(name: str) -> str:
    """A name from a file, safe to print: escaped if it is not plain text, cut if it is long."""
    name = name if len(name) <= 120 else f"{name[:100]}... ({len(name)} characters)"
    return name if name.isprintable() and name else ascii(name)


def _several(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# --- the model ---------------------------------------------------------------------------------------


def allocate(
    model: Any, plan: ModelPlan, *, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Give a `Loadable` model memory for its parameters and buffers, uninitialised.

    Returns for each tensor of the plan, by its checkpoint name and in its shape, the values to fill.
    Raises ConfigError if the device has too little memory.
    """
    places = _places(model, plan)
    _check_memory(model, device, dtype)
    parameters = _allocate(model, device, dtype)
    targets = {}
    for name, shape in tensor_shapes(plan).items():
        parameter, start, stop = places[name]
        rows = parameters[parameter].view(1) if not parameters[parameter].dim() else parameters[parameter]
        targets[name] = rows[start:stop].view(shape)
    return targets


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name."""
    return model.state_dict(keep_vars=True)


def _places(model: Any, plan: ModelPlan) -> dict[str, tuple[str, int, int]]:
    """Checkpoint name -> (parameter, start, stop), proven to fill every row of the model exactly once."""
    shapes, state = tensor_shapes(plan), _state(model)
    destinations: Mapping[str, Destination] = model.checkpoint_map()
    assert destinations.keys() == shapes.keys(), (
        f"checkpoint_map and plan differ in {_several(sorted(destinations.keys() ^ shapes.keys()))}"
    )
    assert len({id(value) for value in state.values()}) == len(state), (
        "a tied weight is one parameter: use it twice, register it once"
    )
    places: dict[str, tuple[str, int, int]] = {}
    filled: dict[str, list[tuple[int, int]]] = {name: [] for name in state}
    for name, to in destinations.items():
        assert to.parameter in state, f"{name} goes to {to.parameter}, which the model does not have"
        shape = tuple(state[to.parameter].shape) or (1,)
        stop = shape[0] if to.stop is None else to.stop
        target = (stop - to.start, *shape[1:])
        fits = target == shapes[name] or (shapes[name] == () and target == (1,))
        assert fits, f"{name} {shapes[name]} does not fit rows {to.start} to {stop} of {to.parameter} {shape}"
        places[name] = (to.parameter, to.start, stop)
        filled[to.parameter].append((to.start, stop))
    for name, spans in filled.items():
        at = 0
        for start, stop in sorted(spans):
            assert start == at, f"rows {min(at, start)} to {max(at, start)} of {name} are not filled once"
            at = stop
        assert at == (state[name].shape or (1,))[0], f"rows from {at} on of {name} are not filled"
    return places


def _check_memory(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        return
    needed = sum(value.numel() for value in _state(model).values()) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        number = device.index if device.index is not None else torch.cuda.current_device()
        raise ConfigError(
            f"Weights need {needed / 1e9:.1f} GB, GPU {number} has {free / 1e9:.1f} GB free. Use a GPU with "
            "more memory, a smaller model, or --device cpu."
        )


def _allocate(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer anew, uninitialised, in the place of the meta one."""
    fresh: dict[str, torch.Tensor] = {}
    for name, meta in _state(model).items():
        assert meta.is_floating_point(), f"{name} is {meta.dtype}: checkpoints hold floating-point values"
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        values = torch.empty(meta.shape, dtype=dtype, device=device)
        if leaf in module._parameters:
            setattr(module, leaf, torch.nn.Parameter(values, requires_grad=False))
        else:
            setattr(module, leaf, values)
        fresh[name] = values
    return fresh


# --- values ------------------------------------------------------------------------------------------

Copy = tuple[StoredTensor, torch.Tensor]  # from the file, to these rows


class _Maps:
    """Memory maps of files, opened at first use. They close when the tensors on them are gone."""

    def __init__(self) -> None:
        self.open: dict[Path, mmap.mmap] = {}

    def bytes(self, file: Path) -> mmap.mmap:
        if file not in self.open:
            with file.open("rb") as opened:
                # A private map: torch wants writable memory, and nothing may reach the file.
                self.open[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.open[file]

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The stored values, in the stored dtype and shape, still in the file."""
        dtype, count = LOADED_DTYPES[stored.dtype], math.prod(stored.shape)
        source = self.bytes(stored.file)
        if stored.start % dtype.itemsize:  # legal in the format, not for a tensor
            flat = torch.frombuffer(
                source, dtype=torch.uint8, offset=stored.start, count=count * dtype.itemsize
            )
            return flat.clone().view(dtype).view(stored.shape)
        return torch.frombuffer(source, dtype=dtype, offset=stored.start, count=count).view(stored.shape)


def _copy_to_gpu(copies: list[Copy], device: torch.device) -> None:
    """Threads that each move chunks through their own pinned buffer and stream.

    While one thread waits for its copy, the others read the file, so that disk and PCIe overlap. 12.4 GB
    out of the page cache, 16 cores and an H100: 12 to 19 GB/s with 8 threads of 16 MB, 14 with 4, 11 with
    16 threads or 64 MB, 6 with 4 MB; 6 with a plain `.to`.
    """
    work: queue.SimpleQueue[tuple[StoredTensor, int, torch.Tensor]] = queue.SimpleQueue()
    maps = _Maps()
    for stored, target in copies:
        maps.bytes(stored.file)  # opened here: the threads only read the dictionary
        flat, step = target.view(-1), CHUNK_BYTES // LOADED_DTYPES[stored.dtype].itemsize
        for start in range(0, flat.numel(), step):
            work.put((stored, start, flat[start : start + step]))
    torch.cuda.synchronize(device)  # the targets' memory is no other stream's any more

    def move() -> None:
        pinned = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            while True:
                try:
                    stored, start, target = work.get_nowait()
                except queue.Empty:
                    return
                dtype = LOADED_DTYPES[stored.dtype]
                count = target.numel() * dtype.itemsize
                source = np.frombuffer(
                    maps.bytes(stored.file), np.uint8, count, stored.start + start * dtype.itemsize
                )
                pinned.numpy()[:count] = source
                values = pinned[:count].view(dtype)
                if dtype != target.dtype:
                    values = values.to(device, non_blocking=True)  # cast on the device
                target.copy_(values, non_blocking=True)
                torch.cuda.current_stream(device).synchronize()

    with ThreadPoolExecutor(COPY_THREADS) as pool:
        for done in [pool.submit(move) for _ in range(COPY_THREADS)]:
            done.result()


def _check_finite(copies: list[Copy]) -> None:
    """Smallest and largest value of each tensor, on its device: both are finite only if all values are."""
    extremes = torch.stack([torch.stack(torch.aminmax(target)) for _, target in copies]).float()
    fine = torch.isfinite(extremes).all(1)
    # An infinite clip bound means that nothing is clipped (spec 4.2).
    bounds = [stored.name.rpartition(".")[2] in CLIP_BOUNDS for stored, _ in copies]
    fine |= torch.tensor(bounds, device=fine.device) & ~extremes.isnan().any(1)
    for (stored, target), good in zip(copies, fine.tolist(), strict=True):
        if not good:
            raise CheckpointError(_not_finite(stored, target))


def _not_finite(stored: StoredTensor, target: torch.Tensor) -> str:
    def first(values: torch.Tensor) -> tuple[int, list[int]]:
        bad = (~torch.isfinite(values)).nonzero()
        return len(bad), bad[0].tolist() if len(bad) else []

    count, at = first(_Maps().tensor(stored))
    if count:
        return (
            f"{stored.name} in {stored.file} holds {count:,} values that are not finite, the first at {at}. "
            "The file is damaged, or the training that made it diverged."
        )
    count, at = first(target)
    return (
        f"{stored.name} holds {count:,} values too large for {str(target.dtype).removeprefix('torch.')}, the "
        f"first at {at}. Use --dtype bfloat16 or float32."
    )


def _check_tied_head(skipped: list[StoredTensor], embedding: StoredTensor) -> None:
    """Gemma 4 ties the head to the embedding: a stored head must be the same values, or it would be lost."""
    for stored in skipped:
        if stored.name != "lm_head.weight":
            continue
        maps = _Maps()
        heads, rows = maps.tensor(stored), maps.tensor(embedding)
        for start in range(0, len(rows), 4096):
            if not torch.equal(heads[start : start + 4096].float(), rows[start : start + 4096].float()):
                raise CheckpointError(
                    f"lm_head.weight in {stored.file} differs from {embedding.name}, but the config ties the "
                    "two. gemcut runs tied heads only."
                )
