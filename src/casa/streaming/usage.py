"""What a live session holds in memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """text_tokens, image_tokens: tokens held, in the text model's cache and in the visible windows.

    cache_bytes: all of it, which is text_bytes (the text model's cache), image_bytes (image keys and values of
    the visible windows; under insertion they are part of text_bytes) and window_bytes (the text of the open window
    in the CASA layers).
    """

    text_tokens: int
    image_tokens: int
    cache_bytes: int
    text_bytes: int
    image_bytes: int
    window_bytes: int
