"""Records of drawn pictures, for tests of what is made of them."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from casa.data.record import Message, Origin, Picture, Record, Text


def drawn(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    """An encoded picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


@pytest.fixture
def picture() -> Callable[..., Picture]:
    """A picture of so many px: picture(width, height, seed, time=None)."""

    def make(width: int = 56, height: int = 28, seed: int = 0, time: float | None = None) -> Picture:
        return Picture(drawn(width, height, seed), time)

    return make


@pytest.fixture
def chat() -> Callable[..., Record]:
    """A record of turns: chat(("user", picture, "read it"), ("assistant", "407"), line=3)."""

    def make(*turns: tuple, line: int = 1) -> Record:
        messages = []
        for role, *parts in turns:
            messages.append(Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts)))
        return Record(tuple(messages), Origin("drawn.jsonl", line))

    return make
