"""The web page at `/`: its files, read once, and the headers that keep everything else out of it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}
POLICY = {  # scripts, styles, pictures and connections of this server only; nothing inline, no frames, no HTML made from text
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{what} {where}" for what, where in POLICY.items()),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # kept, and asked for again each time, which costs no body: a new server is never shown with an old page
}


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent; `etag` changes when its bytes do."""

    body: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """The files of the page by their names; what is of no kind that a page has, as the copies that editors leave, is none of them."""
    page = {}
    for path in sorted(path for path in FOLDER.iterdir() if path.suffix in TYPES):
        body = path.read_bytes()
        page[path.name] = PageFile(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return page


def page_answer(page: dict[str, PageFile], name: str, request: Request) -> Response:
    """A file, or 304 when the browser has it. Raises HTTPException, 404, if there is none of this name."""
    if name not in page:
        raise HTTPException(404)
    file = page[name]
    headers = HEADERS | {"etag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
