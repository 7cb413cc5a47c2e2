"""Clients of a casa server that behave as cameras do, and count what becomes of every frame.

Of each frame that was sent, exactly one thing is to be told: that it was watched (`usage`), or that it was dropped.
"""

import asyncio
import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed


@dataclass
class StreamLog:
    """What one stream was told.

    Attributes:
        sent: Frames.
        watched: Their numbers, as told.
        captions: (frame, text).
        dropped: As last told.
        lags: Seconds, of every frame watched.
        moved: The events.
        times: When each frame was told of, by the monotonic clock.
        refused: Why it was not let in, or was ended.
        waits: Frames at the end that nothing was told of.
    """

    sent: int = 0
    watched: list[int] = field(default_factory=list)
    captions: list[tuple[int, str]] = field(default_factory=list)
    dropped: int = 0
    lags: list[float] = field(default_factory=list)
    moved: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refused: str | None = None

    @property
    def twice(self) -> int:
        """Frames and captions that were told of more than once."""
        told = Counter(self.watched), Counter(frame for frame, _ in self.captions)
        return sum(count - 1 for counts in told for count in counts.values())

    @property
    def lost(self) -> int:
        """Frames of which nothing was told."""
        return self.sent - len(set(self.watched)) - self.dropped

    @property
    def silence(self) -> float:
        """The longest time in seconds between two frames that were told of."""
        return max((after - before for before, after in zip(self.times, self.times[1:], strict=False)), default=0.0)


def noise(count: int, size: int, seed: int = 0) -> list[bytes]:
    """`count` frames of noise as JPEG, of `size` x `size` px."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        # large squares: noise by the pixel is what no camera sends
        small = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((size, size), Image.Resampling.NEAREST).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


async def watch(
    url: str,
    frames: Sequence[bytes],
    *,
    fps: float = 2.0,
    hello: dict[str, Any] | None = None,
    token: str | None = None,
    log: StreamLog | None = None,
    stop: asyncio.Event | None = None,
    patience: float = 30.0,
) -> StreamLog:
    """Sends frames by the clock, over and over if `stop` is given, which then ends it; waits until all are told of.

    Args:
        url: ws://host:port/v1/streams
        frames: Picture files.
        fps: How many a second.
        hello: What else the stream asks for.
        token: The server's.
        log: To be filled, and looked at meanwhile.
        stop: Ends it.
        patience: Seconds that are waited for the last frames.
    """
    log = log if log is not None else StreamLog()
    try:
        async with connect(url, open_timeout=patience, proxy=None, max_size=2**22) as socket:
            begin = {"type": "hello", "fps": fps, **(hello or {}), **({"token": token} if token else {})}
            await socket.send(json.dumps(begin))
            first = json.loads(await socket.recv())
            if first["type"] != "ready":
                log.refused = first["message"]
                return log
            reader = asyncio.create_task(_read(socket, log))
            begun = time.monotonic()
            while not reader.done() and (log.sent < len(frames) if stop is None else not stop.is_set()):
                await socket.send(json.dumps({"type": "frame", "time": round(log.sent / fps, 3)}))
                await socket.send(frames[log.sent % len(frames)])
                log.sent += 1
                await asyncio.sleep(max(0.0, begun + log.sent / fps - time.monotonic()))
            end = time.monotonic() + patience
            while log.lost > 0 and not reader.done() and time.monotonic() < end:
                await asyncio.sleep(0.02)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
    except (OSError, ConnectionClosed) as error:
        log.refused = log.refused or str(error)
    return log


async def _read(socket: Any, log: StreamLog) -> None:
    async for text in socket:
        event = json.loads(text)
        kind = event["type"]
        if kind == "usage":
            log.watched.append(event["frame"])
            log.times.append(time.monotonic())
            log.lags.append(event["lag"])
            log.dropped = max(log.dropped, event["dropped"])
        elif kind == "caption":
            log.captions.append((event["frame"], event["text"]))
        elif kind == "dropped":
            log.dropped = max(log.dropped, event["count"])
        elif kind == "moved":
            log.moved.append(event)
        elif kind == "error":
            log.errors.append(event["message"])
            if event["fatal"]:
                log.refused = event["message"]
