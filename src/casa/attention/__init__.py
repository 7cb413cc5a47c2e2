"""The operation: text attends to its window's images and text. One meaning, several implementations."""

from casa.attention.common import bias_of
from casa.attention.dispatch import casa_attention, implementations

__all__ = ["bias_of", "casa_attention", "implementations"]
