"""One WebSocket of /v1/streams, from its hello to its end.

    reader    hello -> questions, pause ... -> the worker; frames -> the newest waits
    opener    the newest frame, opened as a picture -> the worker
    sender    the stream's outbox -> events

A wrong message is answered by an error event and forgotten; what cannot go on ends with a fatal one and a close code.
The reader waits for neither, so that the newest frame wins and questions are heard however fast frames come.
Whatever ends one ends all, and frees the session.
"""

import asyncio
import logging
import secrets
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from casa.errors import UserError
from casa.serving.baseline import InsertionTally
from casa.serving.live import LiveStream, Ticket
from casa.serving.load import OverloadedError
from casa.serving.outbox import Outbox
from casa.serving.pictures import read_frame
from casa.serving.rate import Rate
from casa.serving.state import ServerState, bearer
from casa.serving.stream_messages import read_hello, read_message, read_time, words
from casa.serving.transcript import Transcript
from casa.streaming import forgets

NORMAL, POLICY, FAILED, LATER = 1000, 1008, 1011, 1013
CLOSING_SECONDS = 0.5  # until a stream that has just been left counts no more

log = logging.getLogger("casa.serving")


class _Ended(Exception):  # noqa: N818  (no error, but the way out)
    """The conversation is over. message: the last, fatal error event, if there is one."""

    def __init__(self, code: int, message: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@dataclass(frozen=True)
class _Frame:
    """As it came: its number, place in the video in seconds, bytes, and when."""

    number: int
    time: float
    data: bytes
    arrived: float


class Conversation:
    def __init__(self, socket: WebSocket, state: ServerState) -> None:
        self._socket, self._state, self._limits = socket, state, state.limits
        self._outbox = Outbox(state.limits.outbox, lambda: state.metrics.count("missed"))
        self._stream: LiveStream | None = None
        self._frames = Rate(state.limits.frames_per_second)
        self._messages = Rate(state.limits.messages_per_second)
        self._begun = monotonic()
        self._number, self._faults = 0, 0
        self._time: float | None = None  # of the next frame, if its sender has said so
        self._newest: _Frame | None = None  # not opened yet
        self._arrived = asyncio.Event()

    async def run(self) -> None:
        """Returns when the socket is closed, by whichever side."""
        await self._socket.accept()
        self._state.connections += 1
        try:
            if self._state.connections > self._limits.connections:
                raise _Ended(LATER, f"all {self._limits.connections} connections are taken; try again later.")
            await self._open()
            await self._both()
        except _Ended as end:
            await self._close(end)
        except WebSocketDisconnect:
            pass
        except Exception as error:
            log.exception("a stream ended by a fault of the server")
            await self._close(_Ended(FAILED, f"the server failed at this ({type(error).__name__}); try again."))
        finally:
            self._state.connections -= 1
            if self._stream is not None:
                self._state.shelf.end(self._stream.name)
                self._state.worker.close(self._stream)

    async def _open(self) -> None:
        """Reads the hello and opens the stream."""
        try:
            text = await self._receive(self._limits.hello_seconds, "send a hello first, as JSON.")
            if not isinstance(text, str):
                raise UserError("the first message is a hello, as JSON.")
            message = read_message(text, self._limits)
            hello = read_hello(message, self._limits, self._state.fps, forgets(self._state.model))
        except UserError as error:
            raise _Ended(POLICY, str(error)) from error
        token = hello.token or bearer(self._socket.headers.get("authorization", ""))
        if not self._state.admits(token):
            raise _Ended(POLICY, "give the server's token in the hello, or as Authorization: Bearer <token>.")
        name = secrets.token_urlsafe(12)
        transcript = Transcript(self._limits.captions)
        stream = LiveStream(
            name, hello.fps, self._outbox, transcript, self._state.metrics, self._state.worker.load.recent
        )
        # known from here on, so that it is closed whatever happens while it is opened
        self._stream = stream
        try:
            advice = await self._admitted(stream, hello.settings)
        except UserError as error:
            full = isinstance(error, OverloadedError)
            full = full or len(self._state.worker.engine) >= self._state.worker.engine.most_sessions
            raise _Ended(LATER if full else POLICY, str(error)) from error
        except Exception as error:
            raise _Ended(FAILED, f"the stream cannot be opened ({type(error).__name__}).") from error
        session = stream.session
        assert session is not None
        costs, processor = self._state.costs, self._state.processor
        if costs is not None:
            # on the model's thread, which the tokenizer belongs to as well
            job = self._state.worker.call(lambda: InsertionTally(costs, processor, session.usage.text_tokens))
            stream.tally = await asyncio.wrap_future(job)
        self._state.shelf.open(name, transcript)
        self._state.metrics.count("streams")
        self._begun = monotonic()
        self._outbox.put(
            {
                "type": "ready",
                "stream": name,
                "model": self._state.name,
                "fps": hello.fps,
                "prompt": session.prompt,
                "max_text_tokens": session.max_text_tokens,
                "cache_bytes": session.usage.cache_bytes,
                "advice": advice,
                "insertion": None
                if costs is None
                else {"cache_bytes": "computed", "latency": "measured" if costs.is_measured else None},
            }
        )

    async def _admitted(self, stream: LiveStream, settings: dict[str, Any]) -> str | None:
        """Opens the stream; what it is to be told."""
        try:
            return await asyncio.wrap_future(self._state.worker.open(stream, **settings))
        except OverloadedError:
            # a page that goes from one video to the next opens a stream while it closes another
            await asyncio.sleep(CLOSING_SECONDS)
            return await asyncio.wrap_future(self._state.worker.open(stream, **settings))

    async def _both(self) -> None:
        tasks = [asyncio.create_task(part) for part in (self._read(), self._open_frames(), self._send())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            given = await self._receive(self._limits.idle_seconds, "nothing was sent for too long.")
            is_frame = isinstance(given, bytes)
            self._number += is_frame
            try:
                if not self._messages.take():
                    raise UserError(f"more than {self._limits.messages_per_second:g} messages a second; send fewer.")
                if isinstance(given, bytes):
                    self._frame(given)
                else:
                    self._message(read_message(given, self._limits))
            except UserError as error:
                self._wrong(str(error), self._number if is_frame else None)

    def _frame(self, data: bytes) -> None:
        """Lets a frame wait in place of the one that waits already, if there is one."""
        assert self._stream is not None
        time, self._time = self._time, None
        arrived = monotonic()
        if len(data) > self._limits.frame_bytes:
            raise UserError(f"a frame has at most {self._limits.frame_bytes} bytes; send a smaller picture.")
        if not self._frames.take():
            self._state.worker.refuse(self._stream)
            raise UserError(f"more than {self._limits.frames_per_second:g} frames a second; send fewer.")
        if self._stream.paused:
            return
        if self._newest is not None:
            self._state.worker.drop(self._stream)
        place = arrived - self._begun if time is None else time
        self._newest = _Frame(self._number, round(place, 3), data, arrived)
        self._arrived.set()

    async def _open_frames(self) -> None:
        assert self._stream is not None
        thread, loop = self._state.frame_thread, asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            frame, self._newest = self._newest, None
            if frame is None:
                continue
            try:
                picture = await loop.run_in_executor(thread, read_frame, frame.data, self._limits)
            except UserError as error:
                self._wrong(str(error), frame.number)
            except MemoryError:
                self._wrong("there is not enough memory for this frame; send a smaller picture.", frame.number)
            else:
                self._faults = 0
                self._state.worker.offer(self._stream, Ticket(frame.number, frame.time, picture, frame.arrived))

    def _message(self, message: dict[str, Any]) -> None:
        assert self._stream is not None
        kind, worker = message["type"], self._state.worker
        if kind == "frame":
            self._time = read_time(message)
        elif kind == "ask":
            worker.ask(self._stream, words(message, "question", self._limits))
            self._faults = 0
        elif kind in ("pause", "resume"):
            worker.pause(self._stream, kind == "pause")
            self._newest = None
            self._outbox.put({"type": "paused" if kind == "pause" else "resumed"})
        elif kind == "close":
            raise _Ended(NORMAL)
        else:
            raise UserError("hello was said already.")

    async def _send(self) -> None:
        while True:
            event = await self._outbox.get()
            try:
                async with asyncio.timeout(self._limits.send_seconds):
                    await self._socket.send_json(event)
            except TimeoutError as error:
                raise _Ended(POLICY) from error

    async def _receive(self, seconds: float, sentence: str) -> str | bytes:
        """The next message. Raises _Ended if none comes in time, WebSocketDisconnect at the end."""
        try:
            async with asyncio.timeout(seconds):
                message = await self._socket.receive()
        except TimeoutError as error:
            raise _Ended(POLICY, sentence) from error
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code") or NORMAL)
        data = message.get("bytes")
        return data if data is not None else message.get("text") or ""

    def _wrong(self, sentence: str, frame: int | None = None) -> None:
        """frame: number of the one that is wrong."""
        self._state.metrics.count("errors")
        self._faults += 1
        if self._faults >= self._limits.faults:
            raise _Ended(POLICY, f"{sentence} That makes {self._faults} wrong messages in a row; the stream ends.")
        about = {} if frame is None else {"frame": frame}
        self._outbox.put({"type": "error", "message": sentence, "fatal": False, **about})

    async def _close(self, end: _Ended) -> None:
        """The last words, if the other side still listens, and a close code."""
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                while len(self._outbox) and end.code == NORMAL:
                    await self._socket.send_json(await self._outbox.get())
                if end.message is not None:
                    self._state.metrics.count("errors")
                    await self._socket.send_json({"type": "error", "message": end.message, "fatal": True})
                await self._socket.close(end.code)
        except (TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
            pass  # it has gone
