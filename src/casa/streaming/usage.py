"""What a live session holds in memory, and how much of what it had to say it was not let say."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Usage:
    """text_tokens, image_tokens: tokens held, in the text model's cache and in the visible windows.

    cache_bytes: all of it, which is text_bytes (the text model's cache), image_bytes (image keys and values of
    the visible windows; under insertion they are part of text_bytes) and window_bytes (the text of the open window
    in the CASA layers).
    held_bytes: the memory that this takes: cache_bytes, the room that buffers keep for the text to come, and whatever
    in them nobody reads. Sessions that remember the same are equal, whatever room they have; 0 if nobody asked.
    cut: captions and answers so far that time cut short, in which case something was said, if not all.
    """

    text_tokens: int
    image_tokens: int
    cache_bytes: int
    text_bytes: int
    image_bytes: int
    window_bytes: int
    held_bytes: int = field(default=0, compare=False)
    cut: int = field(default=0, compare=False)
