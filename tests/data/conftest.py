"""Pictures, files of rows and contexts for the tests of data."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from casa.data import Origin, Picture, SourceSettings, Text
from casa.data.pictures import RowContext


def png(colour: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, colour).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a.png, b.png and c.png."""
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    return tmp_path


@pytest.fixture
def context(root: Path) -> Any:
    """Makes the context of a row in `root`; videos have one frame per 1/fps seconds, without being read."""

    def frames(path: Path, fps: float, start: float, end: float | None, side: int, max_frames: int, thin: bool):
        count = round(((3.0 if end is None else end) - start) * fps)
        return [Picture(png(), start + k / fps) for k in range(count)]

    def make(**settings: Any) -> RowContext:
        return RowContext(Origin("rows.jsonl", 7), SourceSettings("rows.jsonl", **settings), root, frames_of=frames)

    return make


@pytest.fixture
def written() -> Any:
    """Writes rows as JSON lines."""

    def write(path: Path, rows: Iterable[Any]) -> Path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def told() -> Any:
    """A record as plain values: (role, parts), a picture being the name of its file, its time, or "bytes"."""

    def part(entry: Text | Picture) -> Any:
        if isinstance(entry, Text):
            return entry.text if entry.start is None else (entry.text, entry.start, entry.end)
        if entry.time is not None:
            return entry.time
        return "bytes" if isinstance(entry.source, bytes) else Path(entry.source).name

    return lambda record: [(message.role, [part(entry) for entry in message.parts]) for message in record.messages]
