"""A hub id becomes a folder: against a small hub on 127.0.0.1, offline, and with everything that fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from gemcut import hub
from gemcut.errors import ConfigError, NotFound

MODEL, COMMIT = "acme/gem-4", "c" * 40
WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "gemma4"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ bos }}",
    "model-00001-of-00001.safetensors": WEIGHTS,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "pytorch_model.bin": b"pickle",
    "modeling_gem.py": b"raise SystemExit",
    "original/model.pth": b"pickle",
    "README.md": b"# card",
}
WANTED = {name for name in FILES if name.startswith(("config", "tok", "chat", "model-", "model.s"))}


class Hub(ThreadingHTTPServer):
    """The three routes of the hub that a download uses, and a record of what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Route)
        self.files: dict[str, bytes] = dict(FILES)
        self.asked: list[tuple[str, str, str | None]] = []  # path, Range header, Authorization
        self.refuse: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self.cut_after: int | None = None  # bytes after which an answer with weights breaks off
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Route(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if body:
            self.server.asked.append((path, self.headers.get("Range", ""), self.headers.get("Authorization")))
        if self.server.refuse is not None:
            status, code = self.server.refuse
            self.send(status, b"{}", body, {"X-Error-Code": code, "X-Error-Message": code})
        elif not path.startswith((f"/api/models/{MODEL}", f"/{MODEL}/")):
            self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith(f"/api/models/{MODEL}/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", "v2", COMMIT):
                self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": name} for name in self.server.files]
            self.send(200, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode(), body)
        elif path.startswith(f"/api/models/{MODEL}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            self.send(200, json.dumps(tree).encode(), body)
        else:
            self.send_file(path.split(f"/resolve/{COMMIT}/")[1], body)

    def send_file(self, name: str, body: bool) -> None:
        content = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        asked = self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        cut = self.server.cut_after if name.startswith("model-") else None
        self.send(206 if asked else 200, content, body, headers, cut)

    def send(
        self,
        status: int,
        content: bytes,
        body: bool,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub, and huggingface_hub in this process pointed at it with an empty cache."""
    running = Hub()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def refused(model: str = MODEL, **options: Any) -> str:
    with pytest.raises(NotFound) as caught:
        hub.resolve(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- folders -----------------------------------------------------------------------------------------


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~") == tmp_path
    (tmp_path / "acme" / "gem-4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(MODEL) == Path(MODEL)  # a folder comes before a hub id
    with pytest.raises(ConfigError, match=r"acme/gem-4 is a folder; a revision \(v2\)"):
        hub.resolve(MODEL, revision="v2")


@pytest.mark.parametrize(
    "model",
    ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c", "acme/", "acme//gem", "acme/g m"],
)
def test_what_can_only_be_a_path_is_not_looked_up(model: str, server: Hub) -> None:
    message = refused(model)
    assert f"There is no folder {model}" in message
    assert "or a hub id such as" in message
    assert server.asked == []


def test_no_model_at_all() -> None:
    assert "The model is empty" in refused("")


def test_near_names_are_suggested(tmp_path: Path) -> None:
    for name in ("gemma-4-31B-it", "gemma-4-12B-it", "llama", "Photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "gemma-4-31B-it.txt").touch()
    message = refused(str(tmp_path / "gemma4-31b-it"))
    assert f"did you mean {tmp_path / 'gemma-4-31B-it'}, {tmp_path / 'gemma-4-12B-it'}?" in message
    assert "did you mean" not in refused(str(tmp_path / "zzz"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "is a file. Give the folder" in refused(str(tmp_path / "model.gguf"))


# --- downloads ---------------------------------------------------------------------------------------


def test_a_model_is_downloaded_without_code_and_pickles(server: Hub) -> None:
    folder = hub.resolve(MODEL)
    assert {path.name for path in folder.iterdir()} == WANTED
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    asked = {path.rsplit("/", 1)[1] for path, _, _ in server.asked if "/resolve/" in path}
    assert asked == WANTED
    before = len(server.asked)
    assert hub.resolve(MODEL, revision="v2") == folder
    assert not any("/resolve/" in path for path, _, _ in server.asked[before:])


def test_the_token_travels(server: Hub) -> None:
    hub.resolve(MODEL, token="hf_secret")
    assert {authorization for _, _, authorization in server.asked} == {"Bearer hf_secret"}


def weight_requests(server: Hub) -> list[str]:
    return [asked for path, asked, _ in server.asked if path.endswith("00001.safetensors")]


def test_a_broken_connection_is_resumed(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    server.cut_after = 300_000  # of every answer
    folder = hub.resolve(MODEL)
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert weight_requests(server) == ["", "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_complete_files_are_not_fetched_again(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.cut_after = 0
    message = refused()
    assert f"{MODEL} could not be fetched" in message
    assert "files that are complete are not fetched again" in message
    server.cut_after = None
    server.asked.clear()
    folder = hub.resolve(MODEL)
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert {path.rsplit("/", 1)[1] for path, _, _ in server.asked if "/resolve/" in path} == {
        "model-00001-of-00001.safetensors"
    }


# --- offline -----------------------------------------------------------------------------------------


def test_offline_uses_the_cached_copy(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.resolve(MODEL)
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(MODEL) == folder
    assert server.asked == []
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert f"No complete copy of {MODEL}" in refused()


def test_offline_without_a_copy_says_so(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused()
    assert f"No complete copy of {MODEL} is in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set" in message
    assert "Unset it" in message
    assert server.asked == []


def test_without_a_network_the_cached_copy_is_used(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.resolve(MODEL)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.resolve(MODEL) == folder


def test_without_a_network_and_a_copy(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused()
    assert f"{MODEL} could not be fetched from http://127.0.0.1:9 (" in message
    assert "Check the network and try again" in message


# --- refusals of the hub -----------------------------------------------------------------------------


def test_an_unknown_model(server: Hub) -> None:
    (Path.cwd() / "acme" / "gem-5x").mkdir(parents=True)
    message = refused("acme/gem-5")
    assert f"There is no model acme/gem-5 on {server.url}, or it is private" in message
    assert "did you mean acme/gem-5x?" in message
    assert "HF_TOKEN" in message


REFUSALS = [
    (403, "GatedRepo", ["is gated", "Accept its terms on http", "HF_TOKEN"]),
    (401, "RepoNotFound", ["There is no model acme/gem-4 on", "or it is private"]),
    (500, "", ["could not be fetched from", "the hub answered 500"]),
    (403, "", ["could not be fetched from", "the hub answered 403"]),
]


@pytest.mark.parametrize(("status", "code", "said"), REFUSALS)
def test_what_the_hub_refuses(
    status: int, code: str, said: list[str], server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.refuse = (status, code)
    message = refused()
    for words in said:
        assert words in message


def test_an_unknown_revision(server: Hub) -> None:
    assert "acme/gem-4 has no revision 'v9'" in refused(revision="v9")


@pytest.mark.parametrize(
    ("absent", "said"),
    [("config.json", "config.json"), ("model-00001-of-00001.safetensors", "safetensors weights")],
)
def test_a_repository_without_a_checkpoint(absent: str, said: str, server: Hub) -> None:
    del server.files[absent]
    assert f"{MODEL} has no {said}" in refused()


FAULTS: list[tuple[Exception, list[str]]] = [
    (OSError(errno.ENOSPC, "No space left on device"), ["The disk is full", "GB free", "set HF_HOME"]),
    (
        PermissionError(errno.EACCES, "Permission denied", "/root/x"),
        ["/root/x is not writable", "Set HF_HOME"],
    ),
    (RuntimeError("Data processing error:\nCAS"), ["RuntimeError: Data processing error:", "try again"]),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_faults_of_this_machine(
    fault: Exception, said: list[str], server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        try:
            raise fault
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the libraries wrap it
                raise RuntimeError("Internal Writer Error") from error
            raise

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refused()
    for words in said:
        assert words in message


# --- a process of its own ----------------------------------------------------------------------------

PROGRAM = """
import sys
from gemcut import hub
from gemcut.errors import GemcutError
assert "huggingface_hub" not in sys.modules and "torch" not in sys.modules
try:
    print(hub.resolve(sys.argv[1]))
except GemcutError as error:
    print(error)
assert "torch" not in sys.modules
"""


def in_a_process(model: str, **environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip(), done.stderr


def test_the_environment_is_honoured(server: Hub, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
    said, _ = in_a_process(MODEL, **home, HF_HUB_OFFLINE="1")
    assert said.startswith(f"No complete copy of {MODEL} is in {tmp_path / 'home'}")
    folder, errors = in_a_process(MODEL, **home, HF_TOKEN="hf_environment")
    assert Path(folder).is_relative_to(tmp_path / "home")
    assert errors == ""  # no bar in a pipe
    assert "Bearer hf_environment" in {authorization for _, _, authorization in server.asked}
    assert in_a_process(MODEL, **home, HF_HUB_OFFLINE="1")[0] == folder
