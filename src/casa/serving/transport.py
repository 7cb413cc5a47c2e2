"""uvicorn's connections, with two clocks of their own: a peer that does not read, or does not ask, is let go.

    silent   connected, and no whole request has come       cut after `body_seconds`, or for a newer one if many are
    stalled  what was written to it stays unread            cut after `send_seconds`

Both are cut off without another word: a polite end would wait for what the peer does not read. Who asks is not cut for
those who do not, so that the server answers (`/health` above all) however many connect and say nothing.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from casa.serving.limits import Limits

MOST_PARTS = 1024  # of one message


def protocols(limits: Limits) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """uvicorn's classes for HTTP and for WebSockets, with these limits."""

    silent: dict[Any, None] = {}  # those of the server at hand, in the order in which they fell silent
    most_silent = 2 * limits.connections

    class Http(_Impatient, H11Protocol):
        silent_seconds, stalled_seconds = limits.body_seconds, limits.send_seconds

        def expect_request(self) -> None:
            super().expect_request()
            silent[self] = None
            if len(silent) > most_silent:
                oldest = next(iter(silent))
                oldest.expect_nothing()
                oldest._cut()

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
            if len(self.frames) >= MOST_PARTS:
                self.transport.abort()
            else:
                super().handle_cont(event)

        def handle_ping(self) -> None:
            # who sends pings and reads no answers would fill this server's memory with them
            if self.is_stalled:
                self.transport.abort()
            else:
                super().handle_ping()

    return Http, WebSocket


class _Impatient(asyncio.Protocol):
    silent_seconds = stalled_seconds = 20.0
    transport: Any
    _silence: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    @property
    def is_stalled(self) -> bool:
        return self._stall is not None

    def expect_request(self) -> None:
        self.expect_nothing()
        self._silence = asyncio.get_running_loop().call_later(self.silent_seconds, self._cut)

    def expect_nothing(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = asyncio.get_running_loop().call_later(self.stalled_seconds, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flows()

    def connection_lost(self, exc: Exception | None) -> None:
        self.expect_nothing()
        self._flows()
        super().connection_lost(exc)

    def _flows(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()
