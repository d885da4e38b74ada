"""The page at `/`: files of this package, served as they are, which ask through the server's own API."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import Response

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Names and types of the files by path."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Nothing comes from another host or from text in the page, and no other page may frame it."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def file_route(path: str) -> Callable[[], Awaitable[Response]]:
    """Return the route that sends the file of a path in `FILES`."""
    name, kind = FILES[path]

    async def send() -> Response:
        content = files(__package__).joinpath(name).read_bytes()
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    return send
