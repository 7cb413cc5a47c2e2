"""Live sessions at constant memory: one stream, or many in one batch on one model."""

from casa.streaming.engine import SessionEvent, StreamingEngine
from casa.streaming.pacing import FrameCaption, WatchCounts, watch, watch_live
from casa.streaming.sampling import Sampling
from casa.streaming.session import StreamingSession
from casa.streaming.state import Usage, supports_text_bound

__all__ = [
    "FrameCaption",
    "Sampling",
    "SessionEvent",
    "StreamingEngine",
    "StreamingSession",
    "Usage",
    "WatchCounts",
    "supports_text_bound",
    "watch",
    "watch_live",
]
