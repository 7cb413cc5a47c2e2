"""In front of every route: pages of other sites are turned away, the token is asked for where one is set, and requests
beyond what there is room for are told to come later. Whether the server lives may be asked however full it is.

A browser says from which page a request comes (Origin) and for which host it is meant (Host). The two must agree. But a
page of another site may have its own name lead to this machine, and then they do: so without a token, Host must be an
address, localhost, or a name that the server was told.
"""

from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from casa.serving.errors import error_response
from casa.serving.state import ServerState, bearer

Scope = dict[str, Any]
App = Callable[[Scope, Callable[..., Any], Callable[..., Any]], Awaitable[None]]

GUARDED = ("/v1/", "/metrics")
HEALTH = "/health"
# nothing from elsewhere, nothing inline; pictures and videos of the user's own choice are blobs
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", POLICY.encode()),
]


class Guard:
    """An ASGI application around another. WebSockets bring their token in their first message, or as a header."""

    def __init__(self, app: App, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        refused = ""
        if is_foreign(headers.get("origin"), host):
            refused = "this server does not answer pages of other sites."
        elif self._state.token is None and not is_own(host, self._state.hosts):
            refused = "this server does not go by that name; start it with --allow-host <name>, or with a token."
        if refused:
            if scope["type"] == "websocket":
                # before it is accepted, this is answered as HTTP 403
                await send({"type": "websocket.close", "code": 1008, "reason": "from another site"})
                return
            await error_response(403, refused, close=True)(scope, receive, send)  # type: ignore[arg-type]
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path.startswith(GUARDED) and not self._state.admits(bearer(headers.get("authorization", ""))):
            answer = error_response(
                401, "give the server's token: Authorization: Bearer <token>.", code="invalid_api_key", close=True
            )
            await answer(scope, receive, send)  # type: ignore[arg-type]
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        if path == HEALTH:
            await self._app(scope, receive, send_with_headers)
            return
        if self._state.requests >= (most := 2 * self._state.limits.connections):
            full = error_response(503, f"{most} requests are under way; try again later.", code="busy", close=True)
            await full(scope, receive, send)  # type: ignore[arg-type]
            return
        self._state.requests += 1
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._state.requests -= 1


def is_foreign(origin: str | None, host: str) -> bool:
    """Whether a browser sends this from a page of another site. Programs other than browsers send no origin."""
    return origin is not None and _netloc(origin) != host.lower()


def is_own(host: str, hosts: frozenset[str]) -> bool:
    """Whether a Host header is one that no other site can have: an address, localhost, or one of `hosts`."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in hosts or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        # programs of the first version of HTTP send no Host
        return not host
    return True


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
