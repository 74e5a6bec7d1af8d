"""The chat page's files: those that are there and no others."""

from __future__ import annotations

from pathlib import Path

from gemcut.server.pages import HEADERS, pages


def test_files_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "vendor").mkdir()
    for name in ("index.html", "app.js", "vendor/a.woff2", "style.css", ".secret", "vendor/data"):
        (tmp_path / name).write_text(name)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("")
    found = pages(tmp_path)
    assert {path: page.kind for path, page in found.items()} == {
        "/": b"text/html; charset=utf-8",
        "/index.html": b"text/html; charset=utf-8",
        "/app.js": b"text/javascript; charset=utf-8",
        "/style.css": b"text/css; charset=utf-8",
        "/vendor/a.woff2": b"font/woff2",
        "/vendor/data": b"application/octet-stream",
    }
    assert found["/"].read() == b"index.html"
    (tmp_path / "index.html").write_text("changed")
    assert found["/"].read() == b"changed"


def test_without_a_page_there_is_none(tmp_path: Path) -> None:
    assert pages(tmp_path) == {}
    assert pages(tmp_path / "nowhere") == {}


def test_a_page_loads_nothing_from_elsewhere() -> None:
    policy = dict(HEADERS)[b"content-security-policy"]
    assert policy.startswith(b"default-src 'none';")
    assert b"http" not in policy
    assert b"unsafe" not in policy
