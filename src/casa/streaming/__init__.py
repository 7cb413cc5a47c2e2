"""Live sessions: one model watching one stream at constant memory."""

from casa.streaming.sampling import Sampling
from casa.streaming.session import StreamingSession
from casa.streaming.usage import Usage

__all__ = ["Sampling", "StreamingSession", "Usage"]
