"""Live sessions at constant memory: one stream, or many in one batch on one model."""

from casa.streaming.engine import Event, StreamingEngine
from casa.streaming.sampling import Sampling
from casa.streaming.session import StreamingSession
from casa.streaming.usage import Usage

__all__ = ["Event", "Sampling", "StreamingEngine", "StreamingSession", "Usage"]
