"""Keys, names, origins, sizes, times and numbers: who gets in, and what those outside are told."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from server_rig import DATA_URI, Reply, Server, chat_body, read_all, until

from gemcut.errors import ConfigError
from gemcut.server.connection import limited
from gemcut.server.settings import ServerConfig

KEYS = ("first-secret", "second-secret")
PUBLIC = {"/live", "/ready", "/health"}
GET = (
    "/live",
    "/ready",
    "/health",
    "/version",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/models/scripted",
)
POST: dict[str, Any] = {
    "/v1/chat/completions": chat_body("hello"),
    "/v1/completions": {"prompt": "script:hello"},
    "/v1/responses": {"input": "script:hello"},
    "/v1/messages": {**chat_body("hello"), "model": "scripted", "max_tokens": 9},
    "/v1/messages/count_tokens": {**chat_body("hello"), "model": "scripted"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
NOWHERE = (
    "/nowhere",
    "/v1",
    "/v1/",
    "/v1/models/",
    "/metrics/",
    "//metrics",
    "/live/../metrics",
    "/V1/models",
)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    config = {"api_keys": KEYS, "max_per_key": 2, "allowed_origins": ["https://app.example"]}
    with Server.scripted(config=config, step_s=0.002) as server:
        yield server


def shown(key: str | None, header: str = "authorization") -> dict[str, str]:
    if key is None:
        return {}
    return {header: key if header == "x-api-key" else f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "opens"),
    [
        ({}, False),
        (shown("first-secret"), True),
        (shown("second-secret"), True),
        (shown("second-secret", "x-api-key"), True),
        ({"authorization": "bearer first-secret"}, True),
        (shown("first-secre"), False),
        (shown("first-secrets"), False),
        (shown(""), False),
        ({"authorization": "first-secret"}, False),
        ({"authorization": "Basic first-secret"}, False),
        (shown("first-secret\xe9"), False),
    ],
    ids=str,
)
def test_route_times_key(guarded: Server, headers: dict[str, str], opens: bool) -> None:
    for path in (*GET, *POST, *NOWHERE):
        method = "POST" if path in POST else "GET"
        reply = guarded.request(method, path, POST.get(path), headers)
        if path in PUBLIC:
            assert reply.status == 200, path
        elif not opens:
            assert reply.status == 401, path
            code = "type" if path.startswith("/v1/messages") else "code"  # Anthropic's errors have no code
            assert reply.json["error"][code] in ("invalid_api_key", "authentication_error")
            assert reply.headers["www-authenticate"] == "Bearer"
        else:
            assert reply.status == (404 if path in NOWHERE else 200), (path, reply.body)


def test_tenants_share_no_cache(guarded: Server) -> None:
    """The time of a first token must not tell one key what another one sent."""
    body = chat_body("hello" + " and so on" * 20)

    def cached(key: str, **fields: Any) -> int:
        reply = guarded.post("/v1/chat/completions", {**body, **fields}, headers=shown(key))
        return reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("first-secret") == 0
    assert cached("first-secret") > 0
    assert cached("second-secret") == 0
    assert cached("first-secret", cache_salt="mine") == 0
    assert cached("first-secret", cache_salt="mine") > 0


def test_a_key_has_so_many_requests_at_a_time(guarded: Server) -> None:
    headers = shown("first-secret")
    long = chat_body("long", max_tokens=300)
    streams = [
        threading.Thread(
            target=guarded.post, args=("/v1/chat/completions", long), kwargs={"headers": headers}
        )
        for _ in range(2)
    ]
    for stream in streams:
        stream.start()
    time.sleep(0.2)
    refused = guarded.post("/v1/chat/completions", chat_body("hello"), headers=headers)
    assert refused.status == 429
    assert refused.error["code"] == "too_many_requests"
    assert int(refused.headers["retry-after"]) >= 1
    other = guarded.post("/v1/chat/completions", chat_body("hello"), headers=shown("second-secret"))
    assert other.status == 200
    for stream in streams:
        stream.join()
    assert guarded.post("/v1/chat/completions", chat_body("hello"), headers=headers).status == 200


def test_other_origins_only_if_listed(guarded: Server) -> None:
    listed = {"origin": "https://app.example", "access-control-request-method": "POST"}
    preflight = guarded.request("OPTIONS", "/v1/chat/completions", headers=listed)
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    reply = guarded.get("/v1/models", headers=listed | shown("first-secret"))
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    other = {"origin": "https://evil.example"}
    assert guarded.request("OPTIONS", "/v1/chat/completions", headers=other).status == 401
    headers = guarded.get("/v1/models", headers=other | shown("first-secret")).headers
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("[::1].evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_points_here_is_not_enough(scripted: Server, host: str, status: int) -> None:
    """DNS rebinding: a page of evil.example whose name has come to mean 127.0.0.1."""
    assert scripted.get("/v1/models", headers={"host": host}).status == status
    assert scripted.post("/v1/completions", {"prompt": "x"}, headers={"host": host}).status == status


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_only_json_is_read(scripted: Server, kind: str | None) -> None:
    """A page elsewhere can send these without asking first."""
    headers = {"content-type": kind or ""}
    reply = scripted.post("/v1/completions", b'{"prompt":"x"}', headers=headers)
    assert reply.status == 415
    assert reply.error["code"] == "not_json"


def test_methods(scripted: Server) -> None:
    assert scripted.get("/v1/chat/completions").status == 405
    assert scripted.post("/v1/models", {}).status == 405
    assert scripted.request("DELETE", "/v1/models/scripted").status == 405
    assert scripted.request("HEAD", "/live").body == b""
    assert scripted.request("HEAD", "/v1/models").status == 200
    assert scripted.request("OPTIONS", "/v1/models").status == 405


def test_bodies_have_a_size(scripted: Server) -> None:
    # refused by its head: the answer comes before the body
    with socket.create_connection(("127.0.0.1", scripted.port), timeout=20) as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 1048590\r\n\r\n"
        )
        reply = b""
        while piece := connection.recv(1 << 16):
            reply += piece
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in reply
    assert b"connection: close" in reply.lower()
    # chunked: the size shows only as it comes
    with socket.create_connection(("127.0.0.1", scripted.port), timeout=20) as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        piece = b"10000\r\n" + b" " * (1 << 16) + b"\r\n"
        sent = 0
        try:
            while sent < 400:
                connection.sendall(piece)
                sent += 1
        except OSError:  # closed: the answer came before all was sent
            pass
        assert sent < 400


def test_requests_have_so_many_pictures(scripted: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": DATA_URI}}

    def ask(count: int) -> Reply:
        content = [part] * count + [{"type": "text", "text": "script:hello"}]
        return scripted.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})

    assert ask(2).json["usage"]["prompt_tokens_details"]["image_tokens"] == 120
    reply = ask(3)
    assert reply.status == 400
    assert reply.error["param"] == "messages[0].content[2]"


def test_those_beyond_the_queue_are_turned_away_at_once() -> None:
    """Figure 9, small: four times as many as fit. Those inside are not disturbed."""
    config = {"max_waiting": 4}
    with Server.scripted(engine={"max_num_seqs": 4}, config=config, step_s=0.005) as server:
        replies: list[tuple[Reply, float]] = []

        def one() -> None:
            began = time.monotonic()
            reply = server.chat("long", max_tokens=100)
            replies.append((reply, time.monotonic() - began))

        threads = [threading.Thread(target=one) for _ in range(32)]
        for thread in threads:
            thread.start()
        lives = []
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            assert server.get("/live").status == 200
            lives.append(time.monotonic() - began)
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        done = [r for r, _ in replies if r.status == 200]
        turned_away = [(r, seconds) for r, seconds in replies if r.status == 503]
        assert len(done) + len(turned_away) == 32
        assert 8 <= len(done) < 32
        assert all(r.json["usage"]["completion_tokens"] == 100 for r in done)
        assert all(r.error["code"] == "overloaded" for r, _ in turned_away)
        assert all(1 <= int(r.headers["retry-after"]) <= 60 for r, _ in turned_away)
        # the machine is shared with other tests, so the bounds are wide
        assert statistics.median(seconds for _, seconds in turned_away) < 0.5
        assert statistics.median(lives) < 0.2


def test_request_ids_are_ours_and_in_the_log(scripted: Server) -> None:
    canary = "a-canary-that-nobody-should-log"
    reply = scripted.post(
        "/v1/completions", {"prompt": f"{canary} script:hello"}, headers={"x-request-id": "client-7"}
    )
    request_id = reply.headers["x-request-id"]
    until(lambda: request_id in scripted.log(), 2.0)
    (line,) = [line for line in scripted.lines("request") if line["request_id"] == request_id]
    assert line["client_request_id"] == "client-7"
    assert line["status"] == 200
    assert line["path"] == "/v1/completions"
    assert line["completion_tokens"] == 14
    refused = scripted.post("/v1/completions", {"prompt": canary, canary: 1})
    assert refused.status == 400
    assert scripted.get(f"/{canary}").status == 404
    assert scripted.get("/live", headers={"x-request-id": "two words"}).status == 200
    assert canary not in scripted.log()


def test_settings_that_cannot_be_meant() -> None:
    for wrong in (
        {"served_model_names": ()},
        {"port": 70000},
        {"api_keys": ("short",)},
        {"api_keys": ("with\nnewline",)},
        {"max_body_bytes": 0},
        {"head_s": 0.0},
        {"otlp_endpoint": "localhost:4318"},
    ):
        with pytest.raises(ConfigError):
            ServerConfig(**{"served_model_names": ("x",), **wrong})


# ---- slow clients, against a bare application


class Bare:
    """uvicorn with our connections and an application that only says yes."""

    def __init__(self, **settings: Any) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
            await send({"type": "http.response.body", "body": b"yes"})

        config = ServerConfig(served_model_names=("x",), **settings)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(app, http=limited(config), lifespan="off", ws="none", log_config=None)
        )
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[self.listener])), daemon=True
        )

    def __enter__(self) -> Bare:
        self.thread.start()
        until(lambda: self.server.started, 5.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(5)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def good_request(self) -> float:
        began = time.monotonic()
        with self.connect() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert b"200" in connection.recv(4096)
        return time.monotonic() - began


def test_a_head_that_never_ends_is_given_up() -> None:
    with Bare(head_s=0.4) as bare:
        silent, slow = bare.connect(), bare.connect()
        began = time.monotonic()
        for letter in b"GET / HT":
            slow.sendall(bytes([letter]))
        assert read_all(slow).startswith(b"HTTP/1.1 408 ")
        assert read_all(silent) == b""
        assert 0.3 < time.monotonic() - began < 3.0


def test_a_head_has_a_size() -> None:
    with Bare(max_head_bytes=4096) as bare:
        for head in (
            b"GET / HTTP/1.1\r\nx: " + b"a" * 5000,  # never ends
            b"GET / HTTP/1.1\r\nx: " + b"a" * 5000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 2000 + b"\r\n",
            b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
        ):
            connection = bare.connect()
            connection.sendall(head)
            assert read_all(connection)[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400"), head[:40]
        assert bare.good_request() < 1.0


def test_a_connection_serves_again_and_again_within_its_limits() -> None:
    with Bare(head_s=0.3) as bare, bare.connect() as connection:
        for _ in range(3):
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"yes"):
                answer += connection.recv(4096)
            time.sleep(0.4)  # longer than a head may take: between requests another clock runs
        connection.sendall(b"GET / HTTP/1.1\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_many_slow_clients_do_not_slow_the_others() -> None:
    """Figure 13, small."""
    with Bare(head_s=30.0) as bare:
        alone = statistics.median(bare.good_request() for _ in range(40))
        slow = [bare.connect() for _ in range(200)]
        for connection in slow:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: ")
        among = []
        for _ in range(40):
            slow[len(among)].sendall(b"x")
            among.append(bare.good_request())
        for connection in slow:
            connection.close()
        assert statistics.median(among) < 3 * alone + 0.01


def test_a_body_that_stops_is_given_up() -> None:
    with Server.scripted(config={"body_s": 0.3}) as server:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b'content-length: 100\r\n\r\n{"prompt"'
        )
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["code"] == "body_timeout"


# more than the buffers of a connection hold
BULKY = {"n": 16, "logprobs": True, "top_logprobs": 20}


def test_a_client_that_takes_nothing_is_given_up() -> None:
    """Its answer must not fill the memory, and must not go on for nobody."""
    with Server.scripted(config={"send_s": 0.3}) as server:
        connection = server.open_stream("long", **BULKY)
        until(lambda: server.lines("request"), 20, server.log)
        assert not read_all(connection).endswith(b"0\r\n\r\n")  # what was on the way, without the end
        (line,) = server.lines("request")
        assert line["status"] == 499
        assert server.chat("hello").status == 200


def test_a_client_that_takes_nothing_does_not_keep_the_server() -> None:
    with Server.scripted(config={"drain_s": 0.0}) as server, server.open_stream("long", **BULKY):
        time.sleep(3.0)  # until the buffers are full
        server.signal()
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log()
