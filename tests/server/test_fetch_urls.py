"""Pictures by URL in requests: off, on, and on for a name that leads inside."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from server_rig import HERE, PICTURE, Server

CHAT = "/v1/chat/completions"
# a server to which loopback is public
LENIENT = (
    "import runpy; from gemcut.media import fetch; fetch.is_public = lambda address: True; "
    f"runpy.run_path({str(HERE / 'scripted_server.py')!r}, run_name='__main__')"
)


class Pictures(BaseHTTPRequestHandler):
    """Serves one picture and counts."""

    hits = 0

    def do_GET(self) -> None:
        type(self).hits += 1
        body = PICTURE.read_bytes() if self.path == "/sign.png" else b"no picture"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    """Of the pictures' server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as pictures:
        Pictures.hits = 0
        thread = threading.Thread(target=pictures.serve_forever)
        thread.start()
        yield pictures.server_port
        pictures.shutdown()
        thread.join()


def asked(url: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "script:hello"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4}


def test_off_by_default(scripted: Server, port: int) -> None:
    reply = scripted.post(CHAT, asked(f"http://localhost:{port}/sign.png"))
    assert reply.status == 400
    assert "Fetching is off" in reply.error["message"]
    assert Pictures.hits == 0


def test_a_listed_name_that_leads_inside_is_not_asked(port: int) -> None:
    with Server.scripted(config={"image_domains": [f"localhost:{port}"]}) as server:
        for url, told in (
            (f"http://localhost:{port}/sign.png", "not a host of the public network"),
            (f"http://elsewhere.test:{port}/sign.png", "No picture is fetched from elsewhere.test"),
            (f"http://127.0.0.1:{port}/sign.png", "names no host"),
        ):
            reply = server.post(CHAT, asked(url))
            assert (reply.status, reply.error["param"]) == (400, "messages[0].content[0]")
            assert told in reply.error["message"]
    assert Pictures.hits == 0


def test_a_picture_is_fetched_decoded_and_bound_by_its_bytes(port: int) -> None:
    settings = {"config": {"image_domains": [f"localhost:{port}"]}}
    with Server([sys.executable, "-c", LENIENT, json.dumps(settings)]).wait() as server:
        reply = server.post(CHAT, asked(f"http://localhost:{port}/sign.png"))
        assert reply.status == 200
        assert reply.json["usage"]["prompt_tokens_details"]["image_tokens"] > 0
        refused = server.post(CHAT, asked(f"http://localhost:{port}/text"))
        assert (refused.status, refused.error["param"]) == (400, "messages[0].content[0]")
        source = {"type": "url", "url": f"http://localhost:{port}/sign.png"}
        message = {"role": "user", "content": [{"type": "image", "source": source}]}
        answer = server.post("/v1/messages", {"messages": [message], "max_tokens": 4, "model": "scripted"})
        assert answer.status == 200, answer.body
    assert Pictures.hits == 3
