"""Pictures of noise, and some that are not what they say, for tests of whatever looks at them."""

import struct
import zlib

import numpy as np

SIZES = ((56, 84), (28, 28), (84, 56))  # height and width in px, in turn


def noise_frames(seed: int, count: int) -> list[np.ndarray]:
    """`count` frames of noise, uint8 (H, W, 3), of three sizes; which one comes first hangs on the seed."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 255, (*SIZES[(seed + n) % 3], 3), dtype=np.uint8) for n in range(count)]


def claimed_png(width: int, height: int) -> bytes:
    """A PNG that claims a size in px, and of whose pixels hardly any are there."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + _chunk(b"IDAT", zlib.compress(bytes(100)))


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
