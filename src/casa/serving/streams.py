"""One WebSocket of /v1/streams, from its hello to its end (docs/serving.md, "Streams", has its messages and events).

reader    hello -> questions, pause ... -> the worker; frames -> the newest waits
opener    the newest frame, opened as a picture -> the worker
sender    the stream's outbox -> events. Whatever ends one of the three ends all, and frees the session.
"""

import asyncio
import json
import secrets
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from casa.errors import UserError
from casa.serving.admission import RateLimiter, ServerState
from casa.serving.baseline import InsertionTally
from casa.serving.handover import FIRST_SECONDS, Handover, HandoverInfo
from casa.serving.limits import Limits, number, words
from casa.serving.live import LiveStream, Outbox, QueuedFrame, Transcript
from casa.serving.metrics import OverloadedError
from casa.serving.pictures import read_frame
from casa.serving.sockets import FAILED, LATER, MOVED, NORMAL, POLICY, StreamEnded, WebSocketHandler
from casa.streaming import Sampling, supports_text_bound

CLOSING_SECONDS = 0.5  # until a stream that has just been left counts no more
KEYS = {
    "hello": {"prompt", "fps", "max_text_tokens", "max_new_tokens", "sampling", "seed", "token", "handover"},
    "frame": {"time", "number"},
    "ask": {"question"},
    "pause": set(),
    "resume": set(),
    "close": set(),
}
LONGEST_VIDEO = 365 * 24 * 3600.0


@dataclass(frozen=True)
class Hello:
    """What a client asks of its stream. settings: StreamingSession's."""

    fps: float
    settings: dict[str, Any]
    token: str


def read_message(text: str, limits: Limits) -> dict[str, Any]:
    """A JSON object with a known type and nothing that this type does not have. Raises UserError otherwise."""
    if len(text) > limits.message_bytes:
        raise UserError(f"a message has at most {limits.message_bytes} characters.")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("this is no JSON; text messages are JSON objects, and frames are binary.") from error
    kind = message.get("type") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in KEYS:
        raise UserError(f"a message is a JSON object whose type is one of {', '.join(KEYS)}.")
    if unknown := sorted(message.keys() - KEYS[kind] - {"type"}):
        known = ", ".join(sorted(KEYS[kind])) or "nothing else"
        raise UserError(f"a message of type {kind} has no {unknown[0][:80]!r}; it has {known}.")
    return message


def read_hello(message: dict[str, Any], limits: Limits, fps: float, bounded: bool = True) -> Hello:
    """The first message, as `read_message` gave it. Raises UserError for a value out of bounds.

    Without a seed, a fresh one is drawn. fps: unless the client says otherwise. bounded: text has a bound, likewise.
    """
    if message["type"] != "hello":
        raise UserError("the first message is of type hello.")
    bound = number(int, message, "max_text_tokens", 1, limits.max_text_tokens, limits.text_tokens)
    most = limits.new_tokens
    settings: dict[str, Any] = {
        "max_text_tokens": bound if bounded or message.get("max_text_tokens") is not None else None,
        "max_new_tokens": number(int, message, "max_new_tokens", 1, most, min(32, most)),
        "seed": number(int, message, "seed", 0, 2**63 - 1, secrets.randbits(62)),
        "sampling": _sampling(message.get("sampling")),
    }
    if message.get("prompt") is not None:
        settings["prompt"] = words(message, "prompt", limits)
    token = message.get("token")
    fps = number(float, message, "fps", 0.01, limits.frames_per_second, fps)
    return Hello(fps, settings, token if isinstance(token, str) else "")


def read_time(message: dict[str, Any]) -> float:
    """Where the next frame stands in its video, in seconds."""
    if message.get("time") is None:
        raise UserError("a frame message has a time.")
    return number(float, message, "time", 0, LONGEST_VIDEO, 0.0)


def _sampling(given: object) -> Sampling:
    defaults = Sampling().to_dict()
    found = given or {}
    if not isinstance(found, dict) or not found.keys() <= defaults.keys():
        raise UserError(f"sampling is an object with any of {', '.join(sorted(defaults))}.")
    return Sampling(
        **{name: number(type(default), found, name, -1000, 1000, default) for name, default in defaults.items()}
    )


class StreamHandler(WebSocketHandler):
    """One client's stream."""

    def __init__(self, socket: WebSocket, state: ServerState) -> None:
        super().__init__(socket, state)
        self._state, self._worker = state, state.worker
        self._outbox = Outbox(state.limits.outbox, lambda: state.metrics.count("missed"))
        self._stream: LiveStream | None = None
        self._frames = RateLimiter(state.limits.frames_per_second)
        self._messages = RateLimiter(state.limits.messages_per_second)
        self._begun = monotonic()
        self._number, self._faults, self._paused = 0, 0, False
        self._sending = self._leaving = False
        self._time: float | None = None  # of the next frame, if its sender has said so
        # of the newest frame, which is not opened yet: number, place in the video in seconds, bytes, and when it came
        self._newest: tuple[int, float, bytes, float] | None = None
        self._arrived = asyncio.Event()

    async def _handle(self) -> None:
        if self._state.handover is not None and self._state.handover.draining:
            raise StreamEnded(LATER, "this replica is about to end.")
        stream = await self._open()
        parts = [self._read(stream), self._open_frames(stream), self._send()]
        if (handover := self._state.handover) is not None:
            parts.append(self._keep(stream, handover))
        await self._together(*parts)

    async def _free(self) -> None:
        if self._stream is not None:
            self._state.transcripts.end(self._stream.name)
            self._worker.close(self._stream)

    async def _open(self) -> LiveStream:
        """Reads the hello and opens the stream."""
        state, worker = self._state, self._worker
        try:
            text = await self._receive(self._limits.hello_seconds, "send a hello first, as JSON.")
            if not isinstance(text, str):
                raise UserError("the first message is a hello, as JSON.")
            message = read_message(text, self._limits)
            hello = read_hello(message, self._limits, state.fps, supports_text_bound(state.model))
        except UserError as error:
            raise StreamEnded(POLICY, str(error)) from error
        self._check_token(hello.token)
        handover_info = self._handover_info(message)
        name = secrets.token_urlsafe(12) if handover_info is None else handover_info.stream
        transcript = Transcript(self._limits.captions)
        stream = LiveStream(name, hello.fps, self._outbox, transcript, state.metrics, worker.load.recent)
        # known from here on, so that it is closed whatever happens while it is opened
        self._stream = stream
        try:
            advice = await self._admitted(stream, hello.settings, handover_info)
        except UserError as error:
            full = isinstance(error, OverloadedError) or len(worker.engine) >= worker.engine.max_sessions
            raise StreamEnded(LATER if full else POLICY, str(error)) from error
        except Exception as error:
            raise StreamEnded(FAILED, f"the stream cannot be opened ({type(error).__name__}).") from error
        session, costs, processor = stream.session, state.costs, state.processor
        assert session is not None
        if costs is not None:
            # on the model's thread, which the tokenizer belongs to as well
            tally = worker.call(lambda: InsertionTally(costs, processor, session.usage.text_tokens))
            stream.tally = await asyncio.wrap_future(tally)
        state.transcripts.open(name, transcript)
        state.metrics.count("streams")
        self._begun = monotonic()
        ready = {
            "stream": name,
            "model": state.name,
            "fps": hello.fps,
            "prompt": session.prompt,
            "max_text_tokens": session.max_text_tokens,
            "cache_bytes": session.usage.cache_bytes,
            "advice": advice,
            "insertion": costs and {"cache_bytes": "computed", "latency": "measured" if costs.is_measured else None},
        }
        if handover_info is not None:
            ready["frame"] = stream.frame
        self._outbox.put({"type": "ready", **ready})
        for told in stream.said:
            if handover_info is not None and told["frame"] > handover_info.known:
                self._outbox.put(told)
        return stream

    def _handover_info(self, message: dict[str, Any]) -> HandoverInfo | None:
        """What an ingress says of a stream; None where streams come by themselves."""
        if self._state.handover is None:
            if "handover" in message:
                raise StreamEnded(POLICY, "a message of type hello has no 'handover' here.")
            return None
        try:
            return HandoverInfo(**message.get("handover") or {})
        except TypeError as error:
            raise StreamEnded(POLICY, "streams come to a replica by its ingress.") from error

    async def _admitted(
        self, stream: LiveStream, settings: dict[str, Any], handover_info: HandoverInfo | None
    ) -> str | None:
        """Opens the stream; what it is to be told."""
        handover, moved = self._state.handover, None
        if handover is not None and handover_info is not None and handover_info.moved:
            moved = partial(handover.load, stream, self._state.model, self._state.processor)
        try:
            return await asyncio.wrap_future(self._worker.open(stream, moved, **settings))
        except OverloadedError:
            if handover is not None:  # there may be room on another replica
                raise
            # a page that goes from one video to the next opens a stream while it closes another
            await asyncio.sleep(CLOSING_SECONDS)
            return await asyncio.wrap_future(self._worker.open(stream, **settings))

    async def _keep(self, stream: LiveStream, handover: Handover) -> None:
        """Saves the stream every few seconds, and hands it over when its replica is to end."""
        saved = 0
        # the first time soon: until then a stream that moves begins anew
        while not await handover.is_draining(handover.seconds if saved else FIRST_SECONDS):
            if stream.frame != saved:
                saved = stream.frame
                await asyncio.wrap_future(self._worker.call(partial(handover.save, stream)))

        def leave() -> None:
            # on the model's thread: what was said until here is told, and nothing afterwards
            handover.save(stream)
            self._worker.engine.close(stream.name)

        # what comes from now on is for the next replica
        self._leaving = True
        await asyncio.wrap_future(self._worker.call(leave))
        while len(self._outbox) or self._sending:
            await asyncio.sleep(0.005)
        raise StreamEnded(MOVED)

    async def _read(self, stream: LiveStream) -> None:
        while True:
            given = await self._receive(self._limits.idle_seconds, "nothing was sent for too long.")
            is_frame = isinstance(given, bytes)
            self._number += is_frame
            if self._leaving:
                continue
            try:
                if not self._messages.take():
                    raise UserError(f"more than {self._limits.messages_per_second:g} messages a second; send fewer.")
                if isinstance(given, bytes):
                    self._frame(stream, given)
                else:
                    self._message(stream, read_message(given, self._limits))
            except UserError as error:
                self._wrong(str(error), self._number if is_frame else None)

    def _frame(self, stream: LiveStream, data: bytes) -> None:
        """Lets a frame wait in place of the one that waits already, if there is one."""
        time, self._time = self._time, None
        arrived = monotonic()
        if len(data) > self._limits.frame_bytes:
            raise UserError(f"a frame has at most {self._limits.frame_bytes} bytes; send a smaller picture.")
        if not self._frames.take():
            stream.drop(late=False)
            raise UserError(f"more than {self._limits.frames_per_second:g} frames a second; send fewer.")
        if self._paused:
            return
        if self._newest is not None:
            stream.drop()
        place = arrived - self._begun if time is None else time
        self._newest = self._number, round(place, 3), data, arrived
        self._arrived.set()

    async def _open_frames(self, stream: LiveStream) -> None:
        thread, loop = self._state.frame_thread, asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            if self._newest is None:
                continue
            (number, place, data, arrived), self._newest = self._newest, None
            try:
                picture = await loop.run_in_executor(thread, read_frame, data, self._limits)
            except UserError as error:
                self._wrong(str(error), number)
            except MemoryError:
                self._wrong("there is not enough memory for this frame; send a smaller picture.", number)
            else:
                self._faults = 0
                if not self._leaving:
                    self._worker.offer(stream, QueuedFrame(number, place, picture, arrived))

    def _message(self, stream: LiveStream, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "frame":
            self._time = read_time(message)
            if self._state.handover is not None:
                self._number = number(int, message, "number", 1, 2**53, self._number + 1) - 1
            elif "number" in message:
                raise UserError("a message of type frame has no 'number' here.")
        elif kind == "ask":
            self._worker.ask(stream, words(message, "question", self._limits))
            self._faults = 0
        elif kind in ("pause", "resume"):
            self._paused, self._newest = kind == "pause", None
            self._worker.pause(stream, self._paused)
            self._outbox.put({"type": "paused" if self._paused else "resumed"})
        elif kind == "close":
            raise StreamEnded(NORMAL)
        else:
            raise UserError("hello was said already.")

    async def _send(self) -> None:
        while True:
            self._sending = False
            event = await self._outbox.get()
            self._sending = True
            await self._tell(event)

    async def _receive(self, seconds: float, sentence: str) -> str | bytes:
        """The next message. Raises StreamEnded if none comes in time, WebSocketDisconnect at the end."""
        try:
            async with asyncio.timeout(seconds):
                message = await self._socket.receive()
        except TimeoutError as error:
            raise StreamEnded(POLICY, sentence) from error
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code") or NORMAL)
        data = message.get("bytes")
        return data if data is not None else message.get("text") or ""

    def _wrong(self, sentence: str, frame: int | None = None) -> None:
        """Answers a wrong message. frame: number of the one that is wrong."""
        self._state.metrics.count("errors")
        self._faults += 1
        if self._faults >= self._limits.faults:
            raise StreamEnded(POLICY, f"{sentence} That makes {self._faults} wrong messages in a row; the stream ends.")
        about = {} if frame is None else {"frame": frame}
        self._outbox.put({"type": "error", "message": sentence, "fatal": False, **about})

    async def _close(self, end: StreamEnded) -> None:
        if end.code == NORMAL:
            if self._state.handover is not None and self._stream is not None:
                self._state.handover.forget(self._stream.name)
            with suppress(StreamEnded, WebSocketDisconnect, RuntimeError, OSError):
                while len(self._outbox):
                    await self._tell(await self._outbox.get())
        await super()._close(end)
