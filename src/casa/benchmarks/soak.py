"""A soak: one session over a hundred thousand frames and more, its memory and its latency followed all the way.

Nothing is held back for the measurement: every frame is encoded, captioned and measured as any other. What is found is
on disk after every block of frames, with the session itself beside it, so that a soak that was killed can go on.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from PIL import Image

from casa.atomic import write_text
from casa.benchmarks.plots import finish, panels
from casa.benchmarks.stream import handwriting
from casa.errors import UserError
from casa.figures import BLUE, GREEN, GREY, ORANGE
from casa.memory import resident_bytes
from casa.streaming import StreamingSession

DRAWN = 480  # different frames: four minutes of film, shown again and again
SMALLEST = 224  # px: handwriting is drawn no smaller, and shrunk


@dataclass(frozen=True)
class Block:
    """So many frames in a row, the last one counted as `frames`.

    median_ms, p95_ms, max_ms: a frame's time, from pixels to its whole caption. cache_bytes, text_tokens: the least and
    the most that the session held after a frame. image_tokens: the most. said: frames with a caption. resident_bytes:
    of the process, at the end of the block. process: counts the processes of a soak that was taken up again, from 0.
    cpu_ms: of processor time a frame, on average, which other work on the machine does not lengthen.
    """

    frames: int
    median_ms: float
    p95_ms: float
    max_ms: float
    cache_bytes: tuple[int, int]
    text_tokens: tuple[int, int]
    image_tokens: int
    said: int
    resident_bytes: int
    process: int
    cpu_ms: float | None = None


def film(size: int, seed: int = 0, count: int = DRAWN) -> list[Image.Image]:
    """`count` frames of numbers in handwriting, `size` x `size` px."""
    drawn = handwriting(seed, max(size, SMALLEST))
    return [next(drawn).resize((size, size), Image.Resampling.BICUBIC) for _ in range(count)]


def soak(
    session: StreamingSession,
    pictures: list[Image.Image],
    frames: int,
    *,
    block: int = 1000,
    state: Path | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Iterator[list[Block]]:
    """Watches until the session has seen `frames` frames; all blocks so far, after each one.

    pictures: shown in turn, over and over. state: where the session is saved after each block, the blocks among its
    notes; a session loaded from there goes on with both.
    Raises UserError for numbers that cannot be.
    """
    if frames < 1 or block < 1:
        raise UserError("frames and block are 1 or more.")
    blocks = [_block(told) for told in session.notes.get("blocks", [])]
    process = blocks[-1].process + 1 if blocks else 0
    while session.frames < frames:
        count = min(block, frames - session.frames)
        blocks.append(_watch(session, pictures, count, process, clock))
        session.notes["blocks"] = [asdict(one) for one in blocks]
        if state is not None:
            session.save(state)
        yield blocks


def _watch(
    session: StreamingSession, pictures: list[Image.Image], count: int, process: int, clock: Callable[[], float]
) -> Block:
    took, held, text, images, said = [], [], [], 0, 0
    started = process_time()
    for _ in range(count):
        picture = pictures[session.frames % len(pictures)]
        began = clock()
        said += bool(session.step(picture))
        took.append(1000 * (clock() - began))
        usage = session.usage
        held.append(usage.cache_bytes)
        text.append(usage.text_tokens)
        images = max(images, usage.image_tokens)
    middle, high = np.percentile(took, [50, 95]).round(2).tolist()
    return Block(
        frames=session.frames,
        median_ms=middle,
        p95_ms=high,
        max_ms=round(max(took), 2),
        cache_bytes=(min(held), max(held)),
        text_tokens=(min(text), max(text)),
        image_tokens=images,
        said=said,
        resident_bytes=resident_bytes(),
        process=process,
        cpu_ms=round(1000 * (process_time() - started) / count, 2),
    )


def _block(told: dict[str, Any]) -> Block:
    # JSON knows no tuples
    pairs: dict[str, Any] = {name: tuple(told[name]) for name in ("cache_bytes", "text_tokens")}
    return Block(**(told | pairs))


def allowed_bytes(session: StreamingSession, asked: bool = True) -> int | None:
    """The most that a bounded session may hold: text up to its bound, the frame at hand, and the text of its window.

    None without a bound. To be called after the first frame. asked: whether questions may come; the window's text then
    grows up to the bound as well, in buffers that double. If none do, it is that of one step.
    """
    usage = session.usage
    if session.max_text_tokens is None:
        return None
    text, image = usage.text_bytes // usage.text_tokens, usage.image_bytes // usage.image_tokens
    bound = session.max_text_tokens
    window = bound + max(bound, 16) if asked else session.most_step_tokens
    return bound * text + (usage.image_tokens + window) * image


def soak_summary(blocks: list[Block], allowed: int | None) -> dict[str, Any]:
    """First block beside last. allowed: bytes, of `allowed_bytes`.

    most_cache_bytes: of the first, the second and the last block; in the second the bound was long reached.
    constant: no frame of any block left the session with more than what is allowed. None without a bound.
    """
    second = blocks[min(1, len(blocks) - 1)]
    most = max(block.cache_bytes[1] for block in blocks)
    return {
        "frames": blocks[-1].frames,
        "said": sum(block.said for block in blocks),
        "median_ms": [blocks[0].median_ms, second.median_ms, blocks[-1].median_ms],
        "cpu_ms": [blocks[0].cpu_ms, second.cpu_ms, blocks[-1].cpu_ms],
        "most_cache_bytes": [block.cache_bytes[1] for block in (blocks[0], second, blocks[-1])],
        "most_cache_bytes_of_all": most,
        "allowed_cache_bytes": allowed,
        "constant": None if allowed is None else most <= allowed,
        "most_text_tokens": max(block.text_tokens[1] for block in blocks),
        "resident_bytes": [block.resident_bytes for block in (blocks[0], second, blocks[-1])],
        "processes": blocks[-1].process + 1,
    }


def soak_table(found: dict[str, Any]) -> str:
    """The summary as a few lines."""
    rows = [
        f"{found['frames']:,} frames, {found['said']:,} of them with a caption; most text {found['most_text_tokens']}"
    ]
    rows.append(f"{'block':24}{'first':>12}{'second':>12}{'last':>12}")
    for name, key, unit, size in (
        ("a frame, median", "median_ms", "ms", 1),
        ("its processor time", "cpu_ms", "ms", 1),
        ("cache, most", "most_cache_bytes", "KiB", 2**10),
        ("process, at its end", "resident_bytes", "MiB", 2**20),
    ):
        rows.append(
            f"{name:24}"
            + "".join(f"{'' if value is None else f'{value / size:.1f} {unit}':>12}" for value in found[key])
        )
    if found["constant"] is not None:
        most, allowed = found["most_cache_bytes_of_all"], found["allowed_cache_bytes"]
        rows.append(f"never above its bound: {found['constant']} ({most:,} of {allowed:,} bytes)")
    return "\n".join(rows)


def write_soak(
    path: str | os.PathLike[str], settings: dict[str, Any], blocks: list[Block], allowed: int | None
) -> None:
    """Settings, summary and blocks as JSON, whole or not at all."""
    record = settings | soak_summary(blocks, allowed) | {"blocks": [asdict(block) for block in blocks]}
    write_text(path, json.dumps(record) + "\n")


def plot_soak(blocks: list[Block], path: str | os.PathLike[str]) -> None:
    """Cache and process memory, and latency, over frames, as a PNG."""
    figure, (memory, process, latency) = panels(3)
    at = [block.frames for block in blocks]
    low, high = zip(*(block.cache_bytes for block in blocks), strict=True)
    memory.plot(at, [size / 1024 for size in high], color=BLUE, linewidth=1.8, label="the most in a block")
    memory.plot(at, [size / 1024 for size in low], color=GREY, linewidth=1, label="the least")
    process.plot(at, [b.resident_bytes / 2**20 for b in blocks], color=GREEN, linewidth=1.8, label="resident")
    latency.plot(at, [block.median_ms for block in blocks], color=BLUE, linewidth=1.8, label="median of a block")
    spent = [(block.frames, block.cpu_ms) for block in blocks if block.cpu_ms is not None]
    if spent:
        latency.plot(*zip(*spent, strict=True), color=GREEN, linewidth=1, label="processor time, mean")
    latency.plot(at, [block.p95_ms for block in blocks], color=ORANGE, linewidth=1, label="95th percentile")
    for axes, label in ((memory, "cache (KiB)"), (process, "process (MiB)"), (latency, "a frame (ms)")):
        axes.set(xlabel="frame", ylabel=label)
    finish(figure, [memory, process, latency], path)
