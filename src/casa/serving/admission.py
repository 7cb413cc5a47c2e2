"""Who may come in, and when: the guard before every route, how often something may happen, and the line of the chats.

A browser says from which page a request comes (Origin) and for which host it is meant (Host). The two must agree. A
page of another site may have its own name lead to this machine; so without a token, Host must be a name that is known.
"""

import asyncio
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address
from statistics import median
from time import monotonic
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from casa.models import CasaForConditionalGeneration, CasaProcessor, ImageCache
from casa.models.image_cache import encode_pixels
from casa.serving.baseline import InsertionCosts
from casa.serving.completion import Detokenizer
from casa.serving.handover import Handover
from casa.serving.limits import Limits
from casa.serving.live import TranscriptStore
from casa.serving.metrics import Metrics
from casa.serving.worker import Worker
from casa.streaming.pacing import Clock

READERS = 2  # requests of chats read at once; one may wait for a picture from elsewhere
BURST_SECONDS = 2.0
POLL_SECONDS = 0.5  # between looks at whether who waits is still there
MAX_SECONDS = 60  # that anybody is told to stay away
RETRY_SECONDS = 1  # a place among the chats is free again within an answer
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
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


class RateLimiter:
    """`take` says whether one more is allowed now; on average `per_second`, at once two seconds' worth."""

    def __init__(self, per_second: float, clock: Clock = monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._max = max(1.0, per_second * BURST_SECONDS)
        self._left, self._at = self._max, clock()

    def take(self) -> bool:
        now = self._clock()
        self._left = min(self._max, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ChatPlace:
    """One in the line of the chats, and then among the served."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.since: float | None = None  # when it was served, if it is


class ChatQueue:
    """`places` that are served at once, and room for `room` more to wait: who asks first goes first.

    To be used within one event loop.
    """

    def __init__(self, places: int, room: int, clock: Clock = monotonic) -> None:
        self._places, self._room, self._clock = places, room, clock
        self._waiting: deque[ChatPlace] = deque()
        self._served: set[ChatPlace] = set()
        self._seconds: deque[float] = deque(maxlen=16)  # that the last ones had a place
        self.here = 0  # all that have joined and not left

    @property
    def served(self) -> int:
        """Those that have a place."""
        return len(self._served)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def join(self) -> ChatPlace | None:
        """Somebody new, who is to `leave` whatever happens; None if there is no room."""
        if self.here >= self._places + self._room:
            return None
        self.here += 1
        return ChatPlace()

    async def turn(self, place: ChatPlace, is_gone: Callable[[], Awaitable[bool]]) -> bool:
        """Waits until a place is served; False if who it is for has gone before."""
        self._waiting.append(place)
        self._call()
        while not place.called.is_set():
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await place.called.wait()
            except TimeoutError:
                if await is_gone():
                    return False
        return True

    def leave(self, place: ChatPlace) -> None:
        if place.since is not None:
            self._served.remove(place)
            self._seconds.append(self._clock() - place.since)
        elif place in self._waiting:
            self._waiting.remove(place)
        self.here -= 1
        self._call()

    def expected_seconds(self) -> int:
        """After how long a newcomer may find room; 1 or more.

        By how long the last ones had a place, or those who have one now, if that is longer already.
        """
        now = self._clock()
        so_far = [now - place.since for place in self._served if place.since is not None]
        each = max((median(seconds) for seconds in (self._seconds, so_far) if seconds), default=0.0)
        return max(1, min(MAX_SECONDS, math.ceil(each * (self.waiting + 1) / self._places)))

    def _call(self) -> None:
        """Gives free places to those who have waited longest."""
        while self._waiting and self.served < self._places:
            place = self._waiting.popleft()
            self._served.add(place)
            place.since = self._clock()
            place.called.set()


@dataclass(kw_only=True)
class AppState:
    """What the guard asks, and the transport: limits, the token, names, and who is in."""

    limits: Limits
    token: str | None  # asked of everyone, if there is one
    hosts: frozenset[str] = frozenset()  # names that the server goes by
    connections: int = 0  # WebSockets that there are now
    requests: int = 0  # and HTTP requests
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.transcripts = TranscriptStore(self.limits.ended_streams, self.limits.ended_seconds)

    def admits(self, token: str) -> bool:
        """Whether this is the token, if one is asked for: whatever JSON can write, half a surrogate pair too."""
        if self.token is None:
            return True
        given, expected = (one.encode("utf-8", "surrogatepass") for one in (token, self.token))
        return compare_digest(given, expected)


@dataclass(kw_only=True)
class ServerState(AppState):
    """What all routes of one server share.

    Pictures are opened off the event loop: frames by one thread, in the order in which they came, each stream with one
    at most; those of chats by others, so that no chat, however many pictures it has, delays a stream's frame.
    """

    name: str  # by which clients call the model
    model: CasaForConditionalGeneration  # which belongs to the worker's thread
    processor: CasaProcessor
    fps: float  # of a stream that does not say
    allow_fetch: bool  # whether chats may name pictures on the public internet
    worker: Worker
    costs: InsertionCosts | None  # None for a model that is the insertion baseline itself
    images: ImageCache | None = None  # pictures of chats that were looked at
    handover: Handover | None = None  # of a replica, whose streams go on elsewhere
    measured: threading.Event = field(default_factory=threading.Event)  # once the tries at start are over
    frame_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "casa-frames"))
    chat_threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READERS, "casa-chats"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chats = ChatQueue(self.limits.chats, self.limits.waiting_chats)
        self.detokenizer = Detokenizer(self.processor.tokenizer)
        self.scope = scope_of(self.token)
        self.loop: asyncio.AbstractEventLoop | None = None  # once it runs

    def close(self) -> None:
        """Ends the threads, once all streams and chats have ended."""
        self.worker.stop()
        self.frame_thread.shutdown(cancel_futures=True)
        # one may wait for a picture from elsewhere
        self.chat_threads.shutdown(wait=False, cancel_futures=True)

    def read_picture(self, image: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stands for a picture's pixels. What was shown with one token is found again with that token alone."""
        if self.images is None:
            return encode_pixels(self.model, image)
        return self.images.read(self.model, image, self.scope)


def scope_of(token: str | None) -> str:
    """Within which pictures are found again: those that were shown with the same token."""
    return "" if token is None else sha256(token.encode()).hexdigest()


def bearer(authorization: str) -> str:
    """The token of an Authorization header; "" if it has none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    *,
    close: bool = False,
    retry_seconds: int = RETRY_SECONDS,
) -> JSONResponse:
    """An error as the OpenAI interface writes it; every route answers so.

    `param` is the part of the request that is wrong, `code` OpenAI's name for it. `close` ends the connection, since a
    body that was not read is still on its way. `retry_seconds`: Retry-After, where another try may do (429, 503).
    """
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"Connection": "close"} if close else {}
    if status in (429, 503):
        headers["Retry-After"] = str(retry_seconds)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


class Guard:
    """An ASGI application around another: turns pages of other sites away, asks for the token, and keeps the room.

    WebSockets bring their token in their first message, or as a header. Whether the server lives may be asked however
    full it is.
    """

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, kind = self._state, scope["type"]
        if kind not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(headers, scope["path"] if kind == "http" else HEALTH)
        if kind == "websocket":
            if refused is not None:  # before it is accepted, this is answered as HTTP 403
                await send({"type": "websocket.close", "code": 1008, "reason": "from another site"})
            else:
                await self._app(scope, receive, send)
            return
        if refused is not None:
            await refused(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        counts = scope["path"] != HEALTH
        state.requests += counts
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            state.requests -= counts

    def _refusal(self, headers: dict[str, str], path: str) -> JSONResponse | None:
        """Why a request is turned away; None if it may come in."""
        state, host = self._state, headers.get("host", "")
        if is_foreign(headers.get("origin"), host):
            return error_response(403, "this server does not answer pages of other sites.", close=True)
        if state.token is None and not is_own(host, state.hosts):
            sentence = "this server does not go by that name; allow the host when it is started, or set a token."
            return error_response(403, sentence, close=True)
        if path.startswith(GUARDED) and not state.admits(bearer(headers.get("authorization", ""))):
            sentence = "give the server's token: Authorization: Bearer <token>."
            return error_response(401, sentence, code="invalid_api_key", close=True)
        if path != HEALTH and state.requests >= (most := 2 * state.limits.connections):
            return error_response(503, f"{most} requests are under way; try again later.", code="busy", close=True)
        return None


def is_foreign(origin: str | None, host: str) -> bool:
    """Whether a browser sends this from a page of another site. Programs other than browsers send no origin."""
    try:
        return origin is not None and urlsplit(origin).netloc.lower() != host.lower()
    except ValueError:
        return True


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
