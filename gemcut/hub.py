"""A folder or a hub id becomes a folder of files on this machine.

Enters: what the user typed after --model. Leaves: a folder that holds the checkpoint. No torch here,
and huggingface_hub is imported only when something has to be looked up on the hub or in its cache;
it reads HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT itself.
"""

from __future__ import annotations

import difflib
import errno
import json
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from gemcut.errors import CheckpointError, ConfigError, GemcutError, NotFound

# What a checkpoint needs. Pickled weights (.bin, .pt) and Python files are never asked for.
FILES = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]
MAX_JSON_BYTES = 100_000_000
SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")  # released ones, whose configs are in the package


def resolve(
    model: str, *, revision: str | None = None, token: str | None = None, weights: bool = True
) -> Path:
    """The folder of a checkpoint: `model` itself if it is a folder, else the hub id's files, downloaded.

    revision: branch, tag or commit on the hub. token: overrides HF_TOKEN. A broken connection is resumed in
    the middle of a file; after an interrupted download, files that are complete are not fetched again. With
    HF_HUB_OFFLINE set, or without a network, a complete copy in the cache (HF_HOME) is used.
    weights: False leaves the safetensors files out, for callers who only read what a model is.

    Raises NotFound if there is no such folder or the hub does not give it, ConfigError for a revision
    of a folder.
    """
    if not model:
        raise NotFound("The model is empty. Give a folder or a hub id such as google/gemma-4-31B-it.")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{model} is a folder; a revision ({revision}) belongs to a hub id.")
        return folder
    if folder.is_file():
        raise NotFound(f"{model} is a file. Give the folder that holds config.json and the weights.")
    if not _is_hub_id(model):
        raise NotFound(
            f"There is no folder {model}{_near(folder)}. "
            "Give a folder that holds a checkpoint, or a hub id such as google/gemma-4-31B-it."
        )
    return _download(model, revision, token, weights)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder/name`.

    Raises CheckpointError that names the file if it is missing, truncated, not an object, or has a key
    twice (readers differ in which of the two they take).
    """
    path = folder / name
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is {size / 1e6:.0f} MB long, too much for {name}.")
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{name} is missing from {folder}. A checkpoint folder holds config.json, tokenizer.json and "
            "safetensors files."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return parse_json_object(text, str(path))


def read_config(model: str, *, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """What to call a model, and its config: of a folder, a config.json, a hub id or one of `SIZES`.

    Weights are neither read nor downloaded. Raises NotFound or CheckpointError if there is no such config.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".json":
            raise GemcutError(f"{model} is no config.json. Give that file, or the folder that holds it.")
        return model, read_json(path.parent, path.name)
    size = next((size for size in SIZES if size.lower() == model.lower()), None)
    if size is not None and not path.exists():
        text = resources.files("gemcut.plan").joinpath("sizes", f"{size}.json").read_bytes()
        return f"Gemma 4 {size}", parse_json_object(text, size)
    return model, read_json(resolve(model, revision=revision, weights=False), "config.json")


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object, no key twice, no NaN. Raises CheckpointError; `where` begins it."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text (byte {error.start}).") from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply.") from None
    except ValueError as error:
        hint = " Is the file cut off?" if "delimiter" in str(error) or "Unterminated" in str(error) else ""
        raise CheckpointError(f"{where} is not valid JSON: {error}.{hint}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, it holds {type(value).__name__}.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key[:200]!a} is there twice")
        out[key] = value
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_hub_id(model: str) -> bool:
    """`organisation/name`, and nothing that only a path would have."""
    if model.count("/") != 1 or model.startswith((".", "~", "/")) or model.endswith("/"):
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _near(folder: Path) -> str:
    """`; did you mean a, b`: folders beside the missing one with a similar name."""
    parent = folder.parent
    try:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(folder.name.lower(), list(lower), n=3, cutoff=0.5)
    if not near:
        return ""
    return "; did you mean " + ", ".join(str(parent / lower[name]) for name in near) + "?"


def _download(model: str, revision: str | None, token: str | None, weights: bool) -> Path:
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                token=token,
                allow_patterns=FILES if weights else [name for name in FILES if "safetensors" not in name],
                tqdm_class=_progress_bar(),
            )
        )
    except Exception as error:  # the hub library lets through the errors of the HTTP libraries it uses
        raise _as_not_found(error, model, revision) from error
    needed = [("config.json", "config.json"), ("safetensors weights", "*.safetensors")]
    for name, pattern in needed if weights else needed[:1]:
        if next(folder.glob(pattern), None) is None:
            raise NotFound(
                f"{model} has no {name}; gemcut runs checkpoints of config.json, tokenizer.json and "
                "safetensors files."
            )
    return folder


def _progress_bar() -> Any:
    """A bar on a terminal, nothing in a pipe; HF_HUB_DISABLE_PROGRESS_BARS still turns it off."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if not sys.stderr.isatty():  # the library's own count of files appears even there
                kwargs["disable"] = True
            super().__init__(*args, **kwargs)

    return Bar


def _as_not_found(error: Exception, model: str, revision: str | None) -> GemcutError:
    """What, and the remedy, for whatever went wrong between here and the hub."""
    from huggingface_hub import constants, errors

    at = f"{model} at revision {revision}" if revision else model
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        free = shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free
        return NotFound(
            f"The disk is full: {at} could not be downloaded to {constants.HF_HUB_CACHE} "
            f"({free / 1e9:.1f} GB free). Free some space, or set HF_HOME to another disk; files that are "
            "complete are not fetched again."
        )
    if isinstance(error, errors.GatedRepoError):
        return NotFound(
            f"{model} is gated. Accept its terms on {constants.ENDPOINT}/{model}, then set HF_TOKEN or run "
            "`hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFound(
            f"There is no model {model} on {constants.ENDPOINT}, or it is private{_near(Path(model))}. "
            "Check the spelling; for a private one set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFound(f"{model} has no revision {revision!r}. Give a branch, a tag or a commit of it.")
    if isinstance(error, PermissionError):
        return NotFound(
            f"{at} could not be stored: {error.filename or constants.HF_HUB_CACHE} is not writable. "
            "Set HF_HOME to a folder of yours."
        )
    cause = chain[-1] if isinstance(error, errors.LocalEntryNotFoundError) else error
    if constants.HF_HUB_OFFLINE:
        return NotFound(
            f"No complete copy of {at} is in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set. Unset it "
            "once to download the model, or give a folder."
        )
    response = getattr(cause, "response", None)
    if response is not None:
        said = f"the hub answered {response.status_code}"
    else:
        said = f"{type(cause).__name__}: {cause}".rstrip(": ").splitlines()[0]
    return NotFound(
        f"{at} could not be fetched from {constants.ENDPOINT} ({said}) and no complete copy is in "
        f"{constants.HF_HUB_CACHE}. Check the network and try again; files that are complete are not fetched "
        "again."
    )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() or path == path.parent else _existing(path.parent)
