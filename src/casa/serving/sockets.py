"""What the WebSockets of a server and of an ingress have in common: how one begins, and every way in which it ends."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from casa.serving.admission import AppState, bearer

NORMAL, POLICY, FAILED, LATER = 1000, 1008, 1011, 1013
MOVED = 4001  # of a replica: the stream's state is saved, and it goes on elsewhere

log = logging.getLogger("casa.serving")


class StreamEnded(Exception):  # noqa: N818  (no error, but the way out)
    """The stream is over, with this close code. message: the last, fatal error event, if there is one."""

    def __init__(self, code: int, message: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class WebSocketHandler:
    """One client's WebSocket, which takes up room among the connections until it is closed, by whichever side."""

    def __init__(self, socket: WebSocket, state: AppState) -> None:
        self._socket, self._app, self._limits = socket, state, state.limits

    async def run(self) -> None:
        """Returns when the socket is closed."""
        await self._socket.accept()
        self._app.connections += 1
        try:
            if self._app.connections > self._limits.connections:
                raise StreamEnded(LATER, f"all {self._limits.connections} connections are taken; try again later.")
            await self._handle()
        except StreamEnded as end:
            await self._close(end)
        except WebSocketDisconnect:
            pass
        except Exception as error:
            log.exception("a stream ended by a fault of the server")
            await self._close(StreamEnded(FAILED, f"the server failed at this ({type(error).__name__}); try again."))
        finally:
            self._app.connections -= 1
            await self._free()

    async def _handle(self) -> None:
        """All of it. Raises StreamEnded."""
        raise NotImplementedError

    async def _free(self) -> None:
        """Gives back what was taken, whatever has happened."""

    def _check_token(self, token: str) -> None:
        """Takes the hello's token, or else the header's. Raises StreamEnded if it is not the server's."""
        if not self._app.admits(token or bearer(self._socket.headers.get("authorization", ""))):
            raise StreamEnded(POLICY, "give the server's token in the hello, or as Authorization: Bearer <token>.")

    async def _together(self, *parts: Coroutine[Any, Any, None]) -> None:
        """Runs all parts until one of them ends, which ends all."""
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, event: dict[str, Any]) -> None:
        """Sends an event. Raises StreamEnded where nobody reads it."""
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                await self._socket.send_json(event)
        except TimeoutError as error:
            raise StreamEnded(POLICY) from error

    async def _close(self, end: StreamEnded) -> None:
        """The last words, if the other side still listens, and a close code."""
        with suppress(TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
            async with asyncio.timeout(self._limits.send_seconds):
                if end.message is not None:
                    self._app.metrics.count("errors")
                    await self._socket.send_json({"type": "error", "message": end.message, "fatal": True})
                await self._socket.close(end.code)
