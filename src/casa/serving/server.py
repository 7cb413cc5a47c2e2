"""Runs the app with uvicorn, with the limits of the transport set to those of the app."""

import errno
import socket
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI

from casa.errors import UserError
from casa.serving.state import ServerState
from casa.serving.transport import protocols

GRACE_SECONDS = 3


class Server:
    """Listens from the start, so that the port is known (port 0: a free one) and an error is the caller's.

    Raises UserError if nothing can listen there.
    """

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
        state: ServerState = app.state.casa
        limits = state.limits
        self._state = state
        self.host = host
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        http, websocket = protocols(limits)
        config: Any = uvicorn.Config(
            app,
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
            raise UserError(f"port {port} of {host} is taken; choose another with --port.") from error
        raise UserError(f"nothing can listen at {host}, port {port}; choose another --host or --port.") from error
