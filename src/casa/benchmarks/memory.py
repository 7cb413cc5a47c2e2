"""Host memory of captioning a long film over that of a short one, each in a process of its own."""

import json
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from casa.benchmarks.apart import measured_apart, told
from casa.benchmarks.host_memory import peak_bytes
from casa.benchmarks.soak import film
from casa.captioning import Request, caption
from casa.errors import UserError
from casa.media import VideoWriter
from casa.models.at_hand import load_at_hand

DRAWN = 60  # different frames of a film


def draw_film(path: Path, seconds: float, size: int, fps: float, seed: int = 0) -> None:
    """A film of so many seconds, `size` x `size` px, out of a few drawn frames."""
    pictures = [np.asarray(picture) for picture in film(size, seed, DRAWN)]
    with VideoWriter(path, (size, size), fps, preset="ultrafast", crf=30) as video:
        for picture in islice(cycle(pictures), round(seconds * fps)):
            video.write(picture)


def bench_memory(
    model: str,
    minutes: float = 60.0,
    short_minutes: float = 1.0,
    size: int = 112,
    fps: float = 2.0,
    max_text_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Peak bytes of two processes that caption films of both lengths, into a file, and what the long one has more.

    model: a checkpoint's folder, or casa-tiny. seed: of the films. Raises UserError for lengths that cannot be, or
    where the system does not tell what a process holds.
    """
    if not 0 < short_minutes < minutes:
        raise UserError("give a short and a long film: 0 < short minutes < minutes.")
    if not peak_bytes():
        raise UserError("this system does not tell how much memory a process has held; measure on Linux.")
    found = []
    with TemporaryDirectory() as folder:
        for length in (short_minutes, minutes):
            path = Path(folder) / "film.mp4"
            draw_film(path, 60 * length, size, fps, seed)
            given = [str(model), str(path), fps, max_text_tokens]
            found.append({"minutes": length} | measured_apart(__name__, given, f"captioning {path.name}"))
    return {"films": found, "more_bytes": found[1]["peak_bytes"] - found[0]["peak_bytes"]}


def child() -> None:
    """What the process of its own does: prints frames watched, captions said and peak bytes."""
    model, path, fps, max_text_tokens = told()
    request = Request(path, (Path(path).with_suffix(".srt"),), fps=fps, max_text_tokens=max_text_tokens)
    report = caption(request, model, load_at_hand)
    print(json.dumps({"frames": report.count.frames, "captions": report.said, "peak_bytes": peak_bytes()}))


def memory_table(found: dict[str, Any]) -> str:
    """The two films and their difference as aligned lines."""
    lines = [f"{'film':>10}{'frames':>9}{'captions':>10}{'peak of the process':>22}"]
    for row in found["films"]:
        lines.append(
            f"{row['minutes']:6g} min{row['frames']:9}{row['captions']:10}{row['peak_bytes'] / 2**20:18.0f} MiB"
        )
    return "\n".join([*lines, f"more: {found['more_bytes'] / 1e6:.1f} MB"])
