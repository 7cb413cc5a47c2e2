"""The operation: text attends to its window's images and text. One meaning, several implementations."""

from casa.attention.dispatch import casa_attention, implementations

__all__ = ["casa_attention", "implementations"]
