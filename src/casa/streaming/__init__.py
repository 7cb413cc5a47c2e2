"""Live sessions at constant memory: one stream, or many in one batch on one model."""

from casa.streaming.bound import forgets
from casa.streaming.engine import Event, StreamingEngine
from casa.streaming.pacing import Count, FrameCaption, watch, watch_live
from casa.streaming.sampling import Sampling
from casa.streaming.session import StreamingSession
from casa.streaming.usage import Usage

__all__ = [
    "Count",
    "Event",
    "FrameCaption",
    "Sampling",
    "StreamingEngine",
    "StreamingSession",
    "Usage",
    "forgets",
    "watch",
    "watch_live",
]
