"""The page at `/`: files as they are, for a browser that talks to this server alone.

A browser cannot show a key when it opens a page, so these paths need none; what they hold is the
same for everyone. The page asks for the key and sends it with its requests, which are guarded as
all are. The policy keeps the page from loading, sending to, or being framed by anything else.
"""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {
    "/": "index.html",
    "/page/style.css": "style.css",
    "/page/icon.svg": "icon.svg",
    "/favicon.ico": "icon.svg",  # what a browser asks for beside any answer that it shows alone
    **{f"/page/{name}.js": f"{name}.js" for name in ("main", "answer", "api", "panels")},
}
"""Paths, and the files beside this one that they show."""

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


async def show(request: Request) -> Response:
    """Shows a file of the page."""
    name = FILES[request.url.path]
    content = files(__name__).joinpath(name).read_bytes()
    return Response(content, headers=HEADERS, media_type=TYPES[name.rpartition(".")[2]])


ROUTES = [Route(path, show) for path in FILES]
