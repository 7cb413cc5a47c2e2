"""Pictures that are not what they say, for tests of whatever opens some."""

import struct
import zlib


def claimed_png(width: int, height: int) -> bytes:
    """A PNG that claims a size in px, and of whose pixels hardly any are there."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + _chunk(b"IDAT", zlib.compress(bytes(100)))


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
