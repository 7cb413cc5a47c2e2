"""What all routes of one server share.

Pictures are opened off the event loop: frames by one thread, in the order in which they came, each stream with one at
most; those of chats by others, so that no chat, however many pictures it has, delays a stream's frame.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hmac import compare_digest

from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.serving.baseline import InsertionCosts
from casa.serving.limits import Limits
from casa.serving.metrics import Metrics
from casa.serving.rate import Line
from casa.serving.transcript import Shelf
from casa.serving.worker import Worker

READERS = 2  # requests of chats read at once; one may wait for a picture from elsewhere


@dataclass
class ServerState:
    """hosts: names that the server goes by. costs: None for a model that is the insertion baseline itself.
    connections, requests: WebSockets and HTTP requests that there are now. line: of the chats.
    """

    name: str
    model: CasaForConditionalGeneration
    processor: CasaProcessor
    limits: Limits
    fps: float
    token: str | None
    allow_fetch: bool
    hosts: frozenset[str]
    worker: Worker
    shelf: Shelf
    costs: InsertionCosts | None
    metrics: Metrics = field(default_factory=Metrics)
    connections: int = 0
    requests: int = 0
    line: Line = field(init=False)
    frame_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "casa-frames"))
    chat_threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READERS, "casa-chats"))

    def __post_init__(self) -> None:
        self.line = Line(self.limits.chats, self.limits.waiting_chats)

    @property
    def chats(self) -> int:
        """Chats under way, waiting, or on their way in."""
        return self.line.here

    def close(self) -> None:
        """Ends the threads, once all streams and chats have ended."""
        self.worker.stop()
        self.frame_thread.shutdown(cancel_futures=True)
        # one may wait for a picture from elsewhere
        self.chat_threads.shutdown(wait=False, cancel_futures=True)

    def admits(self, token: str) -> bool:
        """Whether this is the token, if one is asked for."""
        return self.token is None or compare_digest(_bytes(token), _bytes(self.token))


def _bytes(token: str) -> bytes:
    """Whatever JSON can write, half a surrogate pair too."""
    return token.encode("utf-8", "surrogatepass")


def bearer(authorization: str) -> str:
    """The token of an Authorization header; "" if it has none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
