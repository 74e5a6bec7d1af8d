"""The chat page's files, as they lie in `page/`. No other file can be named."""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "page"
# everything comes from here; formulas and diagrams set styles of their own
POLICY = (
    b"default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    b"font-src 'self' data:; "
    b"object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
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
