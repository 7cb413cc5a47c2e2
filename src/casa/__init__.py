"""casa: Cross-Attention via Self-Attention. Eyes for language models; live video at constant memory.

The operation and its layers need torch alone; names that need transformers are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casa.attention import casa_attention
    from casa.models import CasaConfig, CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt
    from casa.streaming import StreamingSession
    from casa.windows import WindowLayout

_ROOMS = {
    "WindowLayout": "casa.windows",
    "casa_attention": "casa.attention",
    "FusionConfig": "casa.models",
    "CasaConfig": "casa.models",
    "CasaForConditionalGeneration": "casa.models",
    "CasaProcessor": "casa.models",
    "adapt": "casa.models",
    "StreamingSession": "casa.streaming",
}

__version__ = "0.1.0"
__all__ = [
    "CasaConfig",
    "CasaForConditionalGeneration",
    "CasaProcessor",
    "FusionConfig",
    "StreamingSession",
    "WindowLayout",
    "adapt",
    "casa_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'casa' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
