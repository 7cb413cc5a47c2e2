"""One client's stream behind an ingress: it stays with a replica, and moves to another when that one ends or dies.

    client  --frames, questions-->  Relay  --the same-->  replica A   (dies)
            <--events, moved------         --the same-->  replica B, from the state that A has saved

The newest frame that was not told of is kept, and goes to the next replica; so do questions without an answer.
"""

import asyncio
import json
import secrets
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from fastapi import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from casa.errors import UserError
from casa.serving.live import Transcript
from casa.serving.replicas import Report
from casa.serving.sockets import FAILED, LATER, MOVED, NORMAL, POLICY, StreamEnded, WebSocketHandler
from casa.serving.streams import read_message

if TYPE_CHECKING:
    from casa.serving.ingress import IngressState

WAIT_SECONDS = 60.0  # for a replica, where there is none, or none that has room for a stream that moves
AGAIN_SECONDS = 0.2
OPEN_SECONDS = 3.0  # for a replica to take a connection; one on a node that is gone does not even refuse it
# a replica is asked so often whether it is there, and left if it does not say so in time: nothing else tells of a node
# that has lost its power
PING_SECONDS, PONG_SECONDS = 1.0, 2.5
USUAL_FPS = 2.0
GONE = (None, MOVED, 1001, 1006, 1011, 1012)  # how a socket is closed by a replica that ends, or dies
TOLD = ("caption", "usage")  # events that say that a frame is done with, and all before it


class Relay(WebSocketHandler):
    """Passes messages between a client and the replica that has its stream."""

    def __init__(self, socket: WebSocket, state: "IngressState") -> None:
        super().__init__(socket, state)
        self._state = state
        self.name = secrets.token_urlsafe(12)
        self._transcript = Transcript(state.limits.captions)
        self._hello: dict[str, Any] = {}
        self._replica: ClientConnection | None = None
        self._place = ""  # the replica's name
        self._ready = asyncio.Event()  # set while a replica takes messages
        self._begun = monotonic()
        self._sent = self._known = 0  # frames that the client sent; the last one that it was told of
        self._time: float | None = None  # of the next frame, as its sender says
        self._newest: tuple[int, float, bytes] | None = None  # number, place, picture: not told of yet
        self._again = 0  # the number of the last one that was passed on a second time
        self._questions: deque[str] = deque(maxlen=state.limits.questions)  # not answered yet
        self._paused = False
        self._lost = 0  # frames that earlier replicas dropped, and those that came while there was none
        self._passed = self._watched = 0  # frames that this replica was given, and that it has told of
        self._lock = asyncio.Lock()  # messages to a replica come in pairs
        self._moves = 0
        self._silent_since: float | None = None

    async def _handle(self) -> None:
        await self._greet()
        await self._together(self._read(), self._follow())

    async def _greet(self) -> None:
        """Reads the hello. Everything in it but the token is the replica's to judge."""
        try:
            async with asyncio.timeout(self._limits.hello_seconds):
                text = await self._socket.receive_text()
            self._hello = read_message(text, self._limits)
        except (TimeoutError, KeyError) as error:
            raise StreamEnded(POLICY, "send a hello first, as JSON.") from error
        except UserError as error:
            raise StreamEnded(POLICY, str(error)) from error
        if "handover" in self._hello:
            raise StreamEnded(POLICY, "a message of type hello has no 'handover'.")
        token = self._hello.pop("token", None)
        self._check_token(token if isinstance(token, str) else "")
        # of whoever goes on with the stream, the same draws
        self._hello.setdefault("seed", secrets.randbits(62))

    async def _read(self) -> None:
        """What the client sends; a replica that is not there now is told later what still matters."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code") or NORMAL)
            data, text = message.get("bytes"), message.get("text")
            if data is not None:
                await self._frame(data)
                continue
            parsed = _parsed(text or "")
            kind = parsed.get("type")
            if kind == "frame" and isinstance(parsed.get("time"), int | float):
                self._time = float(parsed["time"])
                continue
            if kind == "close":
                raise StreamEnded(NORMAL)
            if kind == "ask" and isinstance(parsed.get("question"), str):
                self._questions.append(parsed["question"])
            if kind in ("pause", "resume"):
                self._paused = kind == "pause"
            await self._pass(text or "")

    async def _frame(self, data: bytes) -> None:
        self._sent += 1
        time, self._time = self._time, None
        if self._paused:
            return
        place = monotonic() - self._begun if time is None else time
        async with self._lock:
            if self._newest is not None and not self._ready.is_set():
                self._lost += 1
            self._newest = self._sent, round(place, 3), data
            await self._give(*self._newest)

    async def _give(self, number: int, place: float, data: bytes) -> None:
        """A frame to the replica, whose lock is held."""
        if self._ready.is_set():
            self._passed += 1
            await self._send(json.dumps({"type": "frame", "time": place, "number": number}), data)

    async def _pass(self, message: str) -> None:
        async with self._lock:
            if self._ready.is_set():
                await self._send(message)

    async def _send(self, *messages: str | bytes) -> None:
        with suppress(ConnectionClosed):  # which `_follow` sees, too
            for message in messages:
                assert self._replica is not None
                await self._replica.send(message)

    async def _follow(self) -> None:
        """Has the stream at a replica, and passes on what that says, until the stream ends."""
        end, refused = monotonic() + WAIT_SECONDS, ""
        while True:
            code, sentence = await self._open_somewhere()
            if self._replica is not None and code is None:
                end = monotonic() + WAIT_SECONDS
                code, sentence = await self._listen(self._replica)
                if sentence is not None or code not in GONE:
                    raise StreamEnded(code or FAILED, sentence)
                if code != MOVED:
                    self._state.replicas.lost(self._place)
                await self._left()
                continue
            refused = sentence or refused
            # one that is on its way is not turned away for want of room while others may come
            if (code is not None and not self._moves) or monotonic() >= end:
                raise StreamEnded(code or LATER, refused or "there is no replica; try again later.")
            await asyncio.sleep(AGAIN_SECONDS)

    async def _left(self) -> None:
        """Notes that the replica has gone, and what it leaves undone."""
        async with self._lock:
            self._ready.clear()
            self._state.metrics.count("moved")
            self._moves += 1
            self._silent_since = monotonic() if self._silent_since is None else self._silent_since
            pending = self._newest is not None
            self._lost += max(0, self._passed - self._watched - pending)
            self._passed = self._watched = 0
            if self._newest is not None and self._newest[0] == self._again:
                # a frame at which two replicas have ended is not shown to a third
                self._newest, self._lost = None, self._lost + 1

    async def _open_somewhere(self) -> tuple[int | None, str | None]:
        """Opens the stream at the least busy replica that takes it. Else the close code and the words of a refusal."""
        self._replica, refused = None, (None, None)
        await self._state.replicas.some(WAIT_SECONDS)
        for replica in self._state.replicas.least_busy():
            code, sentence = await self._open(replica)
            if self._replica is not None:
                return None, None
            if code is not None and code != LATER:
                return code, sentence
            refused = refused if code is None else (code, sentence)
        return refused

    async def _open(self, replica: Report) -> tuple[int | None, str | None]:
        """Opens the stream at a replica. None, None if that cannot be reached."""
        hello = self._hello | {
            "token": self._state.secret,
            "handover": {"stream": self.name, "moved": self._moves > 0, "known": self._known},
        }
        # before it is open: all streams of a replica that ends choose at once
        fps = hello.get("fps")
        self._state.replicas.took(replica.name, fps if isinstance(fps, int | float) else USUAL_FPS)
        try:
            # closed by `_free`, or by the replica
            opened = await connect(
                f"ws://{replica.address}/v1/streams",
                open_timeout=OPEN_SECONDS,
                close_timeout=1,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                max_size=2**22,
                compression=None,
                proxy=None,
            ).__aenter__()
        except (OSError, WebSocketException, TimeoutError):
            self._state.replicas.lost(replica.name)
            return None, None
        try:
            await opened.send(json.dumps(hello))
            async with asyncio.timeout(WAIT_SECONDS):
                event = json.loads(await opened.recv())
            if event["type"] != "ready":
                await opened.wait_closed()
                return opened.close_code or LATER, event.get("message")
        except (ConnectionClosed, TimeoutError):
            self._state.replicas.lost(replica.name)
            return None, None
        self._replica, self._place = opened, replica.name
        await self._welcome(event)
        return None, None

    async def _welcome(self, event: dict[str, Any]) -> None:
        """Tells the client where it is; then the replica, what that does not know."""
        frame = event.pop("frame", 0)
        if not self._moves:
            self._state.transcripts.open(self.name, self._transcript)
            self._state.metrics.count("streams")
            self._begun = monotonic()
            await self._tell(event)
        else:
            silent = 0.0 if self._silent_since is None else monotonic() - self._silent_since
            about = {"frame": frame, "seconds": round(silent, 3), "count": self._moves}
            await self._tell({"type": "moved", "stream": self.name, **about})
        async with self._lock:
            self._ready.set()
            if self._paused:
                await self._send('{"type": "pause"}')
            for question in self._questions:
                await self._send(json.dumps({"type": "ask", "question": question}))
            if self._newest is not None and self._newest[0] <= frame:
                self._newest = None
            if self._newest is not None:
                self._again = self._newest[0] if self._moves else 0
                await self._give(*self._newest)

    async def _listen(self, replica: ClientConnection) -> tuple[int | None, str | None]:
        """Passes on what a replica says until it says no more: its close code, None without one, and last words."""
        words = None
        try:
            async for text in replica:
                event = json.loads(text)
                kind = event["type"]
                if kind == "error" and event["fatal"]:
                    words = event["message"]
                    continue
                await self._note(kind, event)
                await self._tell(event)
        except ConnectionClosed:
            pass
        code = replica.close_code
        return code, words

    async def _note(self, kind: str, event: dict[str, Any]) -> None:
        """What an event says of what is done with."""
        if kind in TOLD or (kind == "error" and "frame" in event):
            self._known, self._silent_since = max(self._known, event["frame"]), None
            self._watched += kind != "caption"
            if self._newest is not None and self._newest[0] <= self._known:
                self._newest = None
        if kind == "caption":
            self._transcript.add(event["time"], event["text"], event["lag"])
        elif kind == "answer" and self._questions:
            self._questions.popleft()
        for name in ("dropped", "count"):
            if name in event and kind in ("usage", "dropped"):
                event[name] += self._lost

    async def _free(self) -> None:
        """Ends the stream at its replica, which then forgets it."""
        self._state.transcripts.end(self.name)
        if self._replica is not None:
            with suppress(ConnectionClosed, OSError):
                await self._replica.send('{"type": "close"}')
                await self._replica.close()


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
