"""The chat page's files, as they lie in `page/`. No other file can be named."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "page"
# Everything comes from here, and no script makes HTML or scripts out of text.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),  # kept by browsers, and asked for again with its tag
]
_KINDS = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".woff2": "font/woff2",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file."""

    path: Path
    kind: bytes

    def read(self) -> bytes:
        """Its content now: whoever works on the page sees a change at the next reload."""
        return self.path.read_bytes()


def tag(content: bytes) -> bytes:
    """The ETag of a content."""
    return b'"%s"' % hashlib.sha256(content).hexdigest()[:32].encode()


def pages(folder: Path = FOLDER) -> dict[str, Page]:
    """URL path -> file; `/` is index.html."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith((".", "__")) for part in name.split("/")):
            continue
        kind = _KINDS.get(path.suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        if kind.startswith("text/"):
            kind += "; charset=utf-8"
        found[f"/{name}"] = Page(path, kind.encode())
    if "/index.html" in found:
        found["/"] = found["/index.html"]
    return found
