"""Two small checkpoints' tokenizers: spec 9's byte-level one, and one built like Gemma's."""

from __future__ import annotations

from pathlib import Path

import pytest
from prompt_tokenizers import SPECIALS, byte_level, gemma_like

from gemcut.prompt.tokenizer import MediaIds, Tokenizer


def media_ids(ids: dict[str, int]) -> MediaIds:
    return MediaIds(
        image=ids["<|image|>"],
        boi=ids["<|image>"],
        eoi=ids["<image|>"],
        audio=ids["<|audio|>"],
        boa=ids["<|audio>"],
        eoa=ids["<audio|>"],
        video=ids["<|video|>"],
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, make in (("byte-level", byte_level), ("gemma-like", gemma_like)):
        folders[name] = tmp_path_factory.mktemp(name)
        make().save(str(folders[name] / "tokenizer.json"))
    return folders


@pytest.fixture(scope="session")
def both(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    ids = {token: i for i, token in enumerate(SPECIALS)}
    return {name: Tokenizer(folder, media_ids(ids)) for name, folder in folders.items()}


@pytest.fixture(scope="session", params=["byte-level", "gemma-like"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="session")
def tokenizer(folder: Path, both: dict[str, Tokenizer]) -> Tokenizer:
    return both[folder.name.rstrip("0123456789")]
