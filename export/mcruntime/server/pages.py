"""The page for people at ``/``, the page of the interface at ``/docs``, and what they ask for: a few routes.

The files lie in the package, are read once, and are served by name: nothing from a request is joined into a path. They
hold no key and no model's data, so they are open to all; what the page then asks for is not.
"""

from __future__ import annotations

import asyncio
import hashlib
import weakref
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from mcruntime.server import wiring
from mcruntime.server.about import about
from mcruntime.server.models import Model
from mcruntime.server.openapi import openapi
from mcruntime.server.web import MODEL, Request, Response, Route, as_json

if TYPE_CHECKING:
    from mcruntime.server.app import App

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = ("index.html", "docs.html", "page.css", "page.js", "wiring.js", "docs.js", "common.js", "icon.svg")
PLACES = {"/": "index.html", "/docs": "docs.html", **{f"/page/{name}": name for name in FILES if ".html" not in name}}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = (
    ("content-security-policy", POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-cache"),  # kept, and asked about every time: a new version of the server is seen at once
)
ABOUT = f"{MODEL}/about"


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    body: bytes
    content_type: str
    tag: str  # changes with the content

    async def __call__(self, request: Request) -> Response:
        """The file, or 304 where the browser has it already."""
        headers = (*HEADERS, ("etag", self.tag))
        known = [tag.strip().removeprefix("W/") for tag in request.header("if-none-match").split(",")]
        if self.tag in known or "*" in known:
            return Response(b"", 304, self.content_type, headers)
        return Response(self.body, 200, self.content_type, headers)


def load_assets() -> dict[str, Asset]:
    """The page's files by the path they are served at."""
    folder = files("mcruntime.server") / "page"
    found = {}
    for path, name in PLACES.items():
        body = (folder / name).read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        found[path] = Asset(body, TYPES[name[name.rindex(".") :]], tag)
    return found


def routes(app: App) -> list[Route]:
    """What ``App`` needs to serve the pages."""
    known: weakref.WeakKeyDictionary[Model, dict[str, Any]] = weakref.WeakKeyDictionary()  # files read once a model

    async def tell(request: Request) -> Response:
        model = app.models.find(request.args["model"], request.args["version"])
        if model not in known:
            known[model] = await asyncio.to_thread(about, model)
        return as_json({**known[model], "versions": app.models.versions(model.spec.name)})

    async def describe(request: Request) -> Response:
        return as_json(openapi(app, names))

    assets = load_assets()
    names = [path.removeprefix("/page/") for path in assets if path.startswith("/page/")]
    pages = [Route(path.replace(".", r"\."), {"GET": asset}, open_to_all=True) for path, asset in assets.items()]
    return [*pages, Route(r"/openapi\.json", {"GET": describe}), Route(ABOUT, {"GET": tell}), wiring.route(app)]
