"""Streams that leave a replica: their states are saved every few seconds and at its end, and loaded by another one.

    watched, told   1 2 3 4 5 6 | killed            watched, told   1 2 3 4 5 6 | drained
    saved           . . 3 . . .                     saved           . . 3 . . 6
    goes on from    the state of 3, with frame 7    goes on from    the state of 6, with frame 7

No frame is told of twice: what was told is known to whoever passes it on, and what a state holds that was not told, it
tells when it is loaded.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import StreamingSession

if TYPE_CHECKING:
    from casa.serving.live import LiveStream

SAVE_SECONDS = 2.0
FIRST_SECONDS = 0.2  # until the first save


@dataclass(frozen=True)
class HandoverInfo:
    """What an ingress says of a stream in its hello.

    Args:
        stream: Its name.
        moved: Whether another replica had it.
        known: The number of the last frame that its client was told of.
    """

    stream: str
    moved: bool = False
    known: int = 0


class Handover:
    """Where states lie, in a folder that all replicas see, and when they are saved.

    Args:
        folder: One file for each stream.
        seconds: Between two saves of a stream.
    """

    def __init__(self, folder: Path, seconds: float = SAVE_SECONDS) -> None:
        self.folder, self.seconds = folder, seconds
        self.draining = False
        with suppress(OSError):  # what was said in streams is nobody else's to read
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder, and cannot be made one; name another for states.")
        self._drain = asyncio.Event()

    def path(self, stream: str) -> Path:
        """The file of a stream. Raises UserError for a name that is none."""
        if not stream.replace("-", "").replace("_", "").isalnum():
            raise UserError("a stream has a name of letters and digits.")
        return self.folder / f"{stream}.session"

    def save(self, stream: "LiveStream") -> None:
        """Saves a stream; on the model's thread."""
        if stream.session is not None:
            stream.session.notes = {"frame": stream.frame, "said": list(stream.said)}
            stream.session.save(self.path(stream.name))

    def load(
        self, stream: "LiveStream", model: CasaForConditionalGeneration, processor: CasaProcessor
    ) -> StreamingSession | None:
        """The session of a stream that was elsewhere, on the model's thread; None if it left none that can be read."""
        path = self.path(stream.name)
        try:
            session = StreamingSession.load(path, model, processor)
        except UserError:
            return None
        stream.frame = session.notes["frame"]
        stream.said.extend(session.notes["said"])
        return session

    def forget(self, stream: str) -> None:
        """Removes the state of a stream that has ended."""
        self.path(stream).unlink(missing_ok=True)

    def drain(self) -> None:
        """Has all streams leave; in the server's event loop."""
        self.draining = True
        self._drain.set()

    async def is_draining(self, seconds: float) -> bool:
        """Waits for so long; True as soon as all streams are to leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._drain.wait()
        return self.draining
