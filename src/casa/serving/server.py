"""Runs the app with uvicorn. Its connections have two clocks of their own: who does not read, or ask, is let go.

silent   connected, and no whole request has come       cut after `body_seconds`, or for a newer one if many are
stalled  what was written to it stays unread            cut after `send_seconds`
"""

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from casa.errors import UserError
from casa.serving.admission import AppState
from casa.serving.limits import Limits

GRACE_SECONDS = 3
MAX_PARTS = 1024  # of one message


class Server:
    """Listens from the start, so that the port is known (port 0: a free one) and an error is the caller's.

    Raises UserError if nothing can listen there.
    """

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
        state: AppState = app.state.casa
        limits = state.limits
        self._state = state
        self.host = host
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        http, websocket = protocols(limits)
        config: Any = uvicorn.Config(
            app,
            loop="asyncio",  # the same everywhere, whatever else is installed
            log_level="warning",
            access_log=False,
            http=http,
            ws=websocket,
            # twice, so that a frame that is only somewhat too large gets its sentence
            ws_max_size=2 * max(limits.frame_bytes, limits.message_bytes),
            # who does not answer has vanished
            ws_ping_interval=limits.ping_seconds,
            ws_ping_timeout=limits.ping_seconds,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=GRACE_SECONDS,
            server_header=False,
        )
        self._server = uvicorn.Server(config)

    @property
    def url(self) -> str:
        """The page's address; the token stands behind the #, which browsers keep to themselves."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        shown = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        token = f"#token={self._state.token}" if self._state.token is not None else ""
        return f"http://{shown}:{self.port}/{token}"

    @property
    def is_running(self) -> bool:
        return self._server.started

    def run(self) -> None:
        """Serves until it is stopped, or Ctrl-C, which is how it is meant to end."""
        # uvicorn has let everybody finish by then, and passes the signal on
        with suppress(KeyboardInterrupt):
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = True


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken; choose another port.", field="port") from error
        raise UserError(
            f"nothing can listen at {host}, port {port}; choose another host or port.", field=("host", "port")
        ) from error


def protocols(limits: Limits) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """uvicorn's classes for HTTP and for WebSockets, with these limits."""

    silent: dict[_Impatient, None] = {}  # those of the server at hand, in the order in which they fell silent
    max_silent = 2 * limits.connections

    class Http(_Impatient, H11Protocol):
        silent_seconds, stalled_seconds = limits.body_seconds, limits.send_seconds

        def expect_request(self) -> None:
            super().expect_request()
            silent[self] = None
            # who asks is not cut for those who do not
            if len(silent) > max_silent:
                oldest = next(iter(silent))
                oldest.expect_nothing()
                oldest.cut()

        def expect_nothing(self) -> None:
            super().expect_nothing()
            silent.pop(self, None)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.expect_request()

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            # a cycle begins with a whole head
            if self.cycle is not before:
                self.expect_nothing()

        def handle_websocket_upgrade(self, event: Any) -> None:
            self.expect_nothing()
            super().handle_websocket_upgrade(event)

        def on_response_complete(self) -> None:
            # before whatever waits already is read
            self.expect_request()
            super().on_response_complete()

    class WebSocket(_Impatient, WebSocketsSansIOProtocol):
        stalled_seconds = limits.send_seconds

        def handle_cont(self, event: Any) -> None:
            # empty parts count nothing towards the largest message, and a message could have them without end
            if len(self.frames) >= MAX_PARTS:
                self.cut()
            else:
                super().handle_cont(event)

        def handle_ping(self) -> None:
            # who sends pings and reads no answers would fill this server's memory with them
            if self.stall is not None:
                self.cut()
            else:
                super().handle_ping()

    return Http, WebSocket


def call_later(seconds: float, act: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, act)


class _Impatient(asyncio.Protocol):
    """A connection that is cut off without another word: a polite end would wait for what its peer does not read."""

    silent_seconds = stalled_seconds = 20.0
    transport: Any
    silence: asyncio.TimerHandle | None = None
    stall: asyncio.TimerHandle | None = None

    def expect_request(self) -> None:
        self.expect_nothing()
        self.silence = call_later(self.silent_seconds, self.cut)

    def expect_nothing(self) -> None:
        if self.silence is not None:
            self.silence.cancel()
            self.silence = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall = call_later(self.stalled_seconds, self.cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flows()

    def connection_lost(self, exc: Exception | None) -> None:
        self.expect_nothing()
        self._flows()
        super().connection_lost(exc)

    def cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _flows(self) -> None:
        if self.stall is not None:
            self.stall.cancel()
            self.stall = None
