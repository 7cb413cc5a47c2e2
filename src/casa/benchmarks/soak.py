"""Does watching stay the same size for ever?

`bench_soak` follows memory and latency of one session over a hundred thousand frames and more; one that was killed
goes on. `bench_memory` compares host memory of captioning a long film with that of a short one.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

from PIL import Image

from casa.benchmarks.harness import (
    Benchmark,
    Figures,
    Panel,
    handwriting,
    in_own_process,
    percentiles,
    table,
    write_film,
)
from casa.benchmarks.settings import MemorySettings, SoakSettings
from casa.captioning import CaptionRequest, caption
from casa.errors import UserError
from casa.memory import peak_resident_bytes, resident_bytes
from casa.models.auto import load_pretrained
from casa.streaming import StreamingSession

DRAWN = 480  # different frames: four minutes of film, shown again and again
MAX_NEW_TOKENS = 16


def bench_soak(settings: SoakSettings, state: Path | None = None, resume: bool = False) -> Iterator[Benchmark]:
    """What is found so far, after every block of frames.

    Args:
        settings: How many frames, and which.
        state: Where the session is saved after each block; it is gone at the end.
        resume: Go on with the session there.

    Raises:
        UserError: A state of other settings, or of as many frames.
    """
    model, processor = load_pretrained(settings.model, settings.device)
    bound = settings.max_text_tokens or None
    told = {"size": settings.size, "seed": settings.seed, "max_text_tokens": bound, "max_new_tokens": MAX_NEW_TOKENS}
    told["block"] = settings.block
    if resume and state is not None and state.exists():
        session = StreamingSession.load(state, model, processor)
        if session.notes.get("settings") != told | {"model": settings.model}:
            raise UserError(
                f"{state} is of a soak with other settings; give those, or leave out resume.", field="resume"
            )
        if session.frames >= settings.frames:
            raise UserError(f"that soak has seen {session.frames} frames already; raise frames.", field="frames")
    else:
        session = StreamingSession(model, processor, max_text_tokens=bound, max_new_tokens=MAX_NEW_TOKENS)
        session.notes["settings"] = told | {"model": settings.model}
    pictures = list(islice(handwriting(settings.seed, settings.size), DRAWN))
    for blocks in soak(session, pictures, settings.frames, block=settings.block, state=state):
        found = soak_summary(blocks, allowed_bytes(session, asked=False))
        shown, panels = soak_table(found), soak_panels(blocks)
        yield Benchmark("soak", told, found | {"blocks": blocks}, shown, str(model.device), settings.model, panels)
    if state is not None:
        state.unlink(missing_ok=True)


def soak(
    session: StreamingSession,
    pictures: Sequence[Image.Image],
    frames: int,
    *,
    block: int = 1000,
    state: Path | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Iterator[list[Figures]]:
    """Watches until the session has seen `frames` frames; all blocks so far, after each one.

    Args:
        pictures: Shown in turn, over and over.
        state: Where the session is saved after each block, the blocks among its notes; a session loaded from there goes
            on with both.
    """
    blocks: list[Figures] = list(session.notes.get("blocks", []))
    process = blocks[-1]["process"] + 1 if blocks else 0
    while session.frames < frames:
        count = min(block, frames - session.frames)
        blocks.append(_watch(session, pictures, count, clock) | {"process": process})
        session.notes["blocks"] = blocks
        if state is not None:
            session.save(state)
        yield blocks


def _watch(
    session: StreamingSession, pictures: Sequence[Image.Image], count: int, clock: Callable[[], float]
) -> Figures:
    """A block of `count` frames; `frames` is the number of the last one.

    median_ms, p95_ms, max_ms: a frame's time, from pixels to its whole caption. cpu_ms: processor time of a frame, on
    average, which other work on the machine does not lengthen. cache_bytes, text_tokens: the least and the most that
    the session held after a frame. image_tokens: the most. said: frames with a caption. resident_bytes: of the process,
    at the end.
    """
    took, usages, said = [], [], 0
    started = process_time()
    for _ in range(count):
        picture = pictures[session.frames % len(pictures)]
        began = clock()
        said += bool(session.step(picture))
        took.append(1000 * (clock() - began))
        usages.append(session.usage)
    cpu = 1000 * (process_time() - started) / count
    held, text = [usage.cache_bytes for usage in usages], [usage.text_tokens for usage in usages]
    middle, high, most = percentiles(took, 50, 95, 100, digits=2)
    return {
        "frames": session.frames,
        "median_ms": middle,
        "p95_ms": high,
        "max_ms": most,
        "cpu_ms": round(cpu, 2),
        "cache_bytes": [min(held), max(held)],
        "text_tokens": [min(text), max(text)],
        "image_tokens": max(usage.image_tokens for usage in usages),
        "said": said,
        "resident_bytes": resident_bytes(),
    }


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
    window = bound + max(bound, 16) if asked else session.max_step_tokens
    return bound * text + (usage.image_tokens + window) * image


def soak_summary(blocks: list[Figures], allowed: int | None) -> Figures:
    """First block, second (in which the bound was long reached) and last.

    constant: no frame of any block left the session with more than what is allowed. None without a bound.

    Args:
        allowed: Bytes, of `allowed_bytes`.
    """
    three = blocks[0], blocks[min(1, len(blocks) - 1)], blocks[-1]
    most = max(block["cache_bytes"][1] for block in blocks)
    return {
        "frames": blocks[-1]["frames"],
        "said": sum(block["said"] for block in blocks),
        **{name: [block.get(name) for block in three] for name in ("median_ms", "cpu_ms", "resident_bytes")},
        "most_cache_bytes": [block["cache_bytes"][1] for block in three],
        "most_cache_bytes_of_all": most,
        "allowed_cache_bytes": allowed,
        "constant": None if allowed is None else most <= allowed,
        "most_text_tokens": max(block["text_tokens"][1] for block in blocks),
        "processes": blocks[-1]["process"] + 1,
    }


def soak_table(found: Figures) -> str:
    """The summary as a few lines."""
    rows = [
        {"title": title, "unit": unit, "block": [value / size for value in found[name]]}
        for name, title, unit, size in (
            ("median_ms", "a frame, median", "ms", 1),
            ("cpu_ms", "its processor time", "ms", 1),
            ("most_cache_bytes", "cache, most", "KiB", 2**10),
            ("resident_bytes", "process, at its end", "MiB", 2**20),
        )
    ]
    blocks = {title: f"{{block[{at}]:.1f}} {{unit}}" for at, title in enumerate(("first", "second", "last"))}
    told = "{frames:,} frames, {said:,} of them with a caption; most text {most_text_tokens}".format(**found)
    told += f"\n{table(rows, {'block': '{title}', **blocks})}"
    if found["constant"] is not None:
        bound = "\nnever above its bound: {constant} ({most_cache_bytes_of_all:,} of {allowed_cache_bytes:,} bytes)"
        told += bound.format(**found)
    return told


def soak_panels(blocks: list[Figures]) -> tuple[Panel, ...]:
    """Cache and process memory, and latency, over frames."""
    at = [block["frames"] for block in blocks]

    def over_frames(name: str, unit: float = 1, place: int | None = None) -> tuple[list[int], list[float]]:
        values = [block[name] if place is None else block[name][place] for block in blocks]
        return at, [value / unit for value in values]

    kept = {"the most in a block": over_frames("cache_bytes", 2**10, 1)}
    kept |= {"the least": over_frames("cache_bytes", 2**10, 0)}
    took = {"median of a block": over_frames("median_ms"), "processor time, mean": over_frames("cpu_ms")}
    return (
        Panel("frame", "cache (KiB)", kept),
        Panel("frame", "process (MiB)", {"resident": over_frames("resident_bytes", 2**20)}),
        Panel("frame", "a frame (ms)", took | {"95th percentile": over_frames("p95_ms")}),
    )


def bench_memory(settings: MemorySettings, max_new_tokens: int = 32) -> Benchmark:
    """Peak bytes of two processes that caption films of both lengths, into a file, and what the long one has more.

    Raises:
        UserError: Numbers that cannot be, or a system that does not tell what a process holds.
    """
    short, minutes, fps, film_fps = settings.short, settings.minutes, settings.fps, settings.film_fps
    bound = settings.max_text_tokens or None
    if short >= minutes:
        raise UserError(f"short is {short}, and minutes {minutes}; give it less than that.", field=("short", "minutes"))
    if fps > film_fps:
        raise UserError(f"fps is {fps}, and film_fps {film_fps}; give no more than that.", field=("fps", "film_fps"))
    if not peak_resident_bytes():
        raise UserError("this system does not tell how much memory a process has held; measure on Linux.")
    films = []
    with TemporaryDirectory() as folder:
        for length in (short, minutes):
            path = Path(folder) / "film.mp4"
            decoded = write_film(path, 60 * length, settings.size, film_fps, fps, settings.seed)
            held = in_own_process(peak_of_captioning, settings.model, str(path), fps, bound, max_new_tokens)
            films.append({"minutes": length, "decoded": decoded, **held})
    more = films[1]["peak_bytes"] - films[0]["peak_bytes"]
    columns = {"film": "{minutes:g} min", "decoded": "{decoded:,}", "watched": "{frames:,}", "captions": "{captions}"}
    shown = table(films, columns | {"peak of the process": "{peak_bytes!M:.0f} MiB"})
    told = {"size": settings.size, "fps": fps, "film_fps": film_fps, "max_text_tokens": bound, "seed": settings.seed}
    found = {"films": films, "more_bytes": more}
    return Benchmark("memory", told, found, f"{shown}\nmore: {more / 1e6:.1f} MB", model=settings.model)


def peak_of_captioning(
    model: str, path: str, fps: float, max_text_tokens: int | None, max_new_tokens: int
) -> dict[str, int]:
    """Frames watched, captions said and the peak of this process."""
    out = Path(path).with_suffix(".srt")
    request = CaptionRequest(path, (out,), fps=fps, max_text_tokens=max_text_tokens, max_new_tokens=max_new_tokens)
    report = caption(request, model, load_pretrained)
    return {"frames": report.count.frames, "captions": report.said, "peak_bytes": peak_resident_bytes()}
