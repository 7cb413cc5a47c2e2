"""From a source to captions on disk: what `casa caption` does, for programs too."""

from casa.captioning.batch import BatchReport, BatchRequest, caption_batch
from casa.captioning.request import CaptionRequest, TimedQuestion
from casa.captioning.run import CaptionReport, GracefulStop, caption

__all__ = [
    "BatchReport",
    "BatchRequest",
    "CaptionReport",
    "CaptionRequest",
    "GracefulStop",
    "TimedQuestion",
    "caption",
    "caption_batch",
]
