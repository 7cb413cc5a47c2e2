"""casa: Cross-Attention via Self-Attention. Eyes for language models; live video at constant memory.

    eyes = casa.load("casa-tiny")
    eyes.ask("page.png", "Read line 1.")

Names are imported on first use: the operation and its layers need torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casa.attention import casa_attention
    from casa.errors import UserError
    from casa.models import (
        CasaCache,
        CasaConfig,
        CasaForConditionalGeneration,
        CasaProcessor,
        FusionConfig,
        ImageCache,
        adapt,
    )
    from casa.models.backbones import register_decoder
    from casa.pipeline import CasaPipeline, evaluate, load, train
    from casa.streaming import FrameCaption, Sampling, StreamingEngine, StreamingSession
    from casa.vision import register_encoder
    from casa.windows import WindowLayout

__version__ = "0.2.0"

# all that is public at the top, by where it lives; tests hold the imports above and `__all__` to it
EXPORTS = {
    "casa.pipeline": ("CasaPipeline", "evaluate", "load", "train"),
    "casa.models": (
        "CasaCache",
        "CasaConfig",
        "CasaForConditionalGeneration",
        "CasaProcessor",
        "FusionConfig",
        "ImageCache",
        "adapt",
    ),
    "casa.models.backbones": ("register_decoder",),
    "casa.vision": ("register_encoder",),
    "casa.streaming": ("FrameCaption", "Sampling", "StreamingEngine", "StreamingSession"),
    "casa.windows": ("WindowLayout",),
    "casa.attention": ("casa_attention",),
    "casa.errors": ("UserError",),
}
# rooms that are at hand without an import of their own
ROOMS = ("analysis", "data", "evaluation", "media", "models", "serving", "streaming", "training", "vision")
_HOME = {name: module for module, names in EXPORTS.items() for name in names}

__all__ = [
    "CasaCache",
    "CasaConfig",
    "CasaForConditionalGeneration",
    "CasaPipeline",
    "CasaProcessor",
    "FrameCaption",
    "FusionConfig",
    "ImageCache",
    "Sampling",
    "StreamingEngine",
    "StreamingSession",
    "UserError",
    "WindowLayout",
    "adapt",
    "casa_attention",
    "evaluate",
    "load",
    "register_decoder",
    "register_encoder",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in ROOMS:
        return import_module(f"casa.{name}")
    raise AttributeError(f"module 'casa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
