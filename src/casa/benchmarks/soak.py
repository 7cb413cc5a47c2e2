"""Does watching stay the same size for ever?

bench_soak      one session over a hundred thousand frames and more, its memory and latency followed all the way.
                Every frame is encoded, captioned and measured as any other. After every block of frames the result
                is on disk, with the session beside it, so that a soak that was killed can go on.
bench_memory    host memory of captioning a long film over that of a short one, each in a process of its own
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
from casa.captioning import CaptionRequest, caption
from casa.errors import UserError
from casa.memory import peak_resident_bytes, resident_bytes
from casa.models.auto import load_pretrained
from casa.streaming import StreamingSession

DRAWN = 480  # different frames: four minutes of film, shown again and again
MAX_NEW_TOKENS = 16


def bench_soak(
    model: str = "casa-tiny",
    frames: int = 100_000,
    max_text_tokens: int | None = 128,
    size: int = 112,
    block: int = 1000,
    seed: int = 0,
    device: str = "auto",
    state: Path | None = None,
    resume: bool = False,
) -> Iterator[Benchmark]:
    """What is found so far, after every block of frames.

    Args:
        block: Frames in a row of the result.
        state: Where the session is saved after each block; it is gone at the end.
        resume: Go on with the session there.

    Raises:
        UserError: numbers that cannot be, or a state of other settings.
    """
    if frames < 1 or block < 1:
        raise UserError("frames and block are 1 or more.", field=("frames", "block"))
    loaded, processor = load_pretrained(model, device)
    settings = {"size": size, "seed": seed, "max_text_tokens": max_text_tokens, "max_new_tokens": MAX_NEW_TOKENS}
    settings |= {"block": block}
    if resume and state is not None and state.exists():
        session = StreamingSession.load(state, loaded, processor)
        if session.notes.get("settings") != settings | {"model": model}:
            raise UserError(
                f"{state} is of a soak with other settings; give those, or leave out resume.", field="resume"
            )
        if session.frames >= frames:
            raise UserError(f"that soak has seen {session.frames} frames already; raise frames.", field="frames")
    else:
        session = StreamingSession(loaded, processor, max_text_tokens=max_text_tokens, max_new_tokens=MAX_NEW_TOKENS)
        session.notes["settings"] = settings | {"model": model}
    for blocks in soak(session, list(islice(handwriting(seed, size), DRAWN)), frames, block=block, state=state):
        found = soak_summary(blocks, allowed_bytes(session, asked=False))
        shown, panels = soak_table(found), soak_panels(blocks)
        yield Benchmark("soak", settings, found | {"blocks": blocks}, shown, str(loaded.device), model, panels)
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
    """A block: so many frames in a row, the last one counted as `frames`.

    median_ms, p95_ms, max_ms: a frame's time, from pixels to its whole caption. cpu_ms: of processor time a frame, on
    average, which other work on the machine does not lengthen. cache_bytes, text_tokens: the least and the most that
    the session held after a frame. image_tokens: the most. said: frames with a caption. resident_bytes: of the process,
    at the end. process: counts the processes of a soak that was taken up again, from 0.
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
    return {
        "frames": session.frames,
        **dict(zip(("median_ms", "p95_ms", "max_ms"), percentiles(took, 50, 95, 100, digits=2), strict=True)),
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
    """First block, second (in which the bound was long reached) and last. allowed: bytes, of `allowed_bytes`.

    constant: no frame of any block left the session with more than what is allowed. None without a bound.
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
    names = {"median_ms": "a frame, median", "cpu_ms": "its processor time"}
    rows = [{"title": title, "unit": "ms", "block": found[name]} for name, title in names.items()]
    for name, title, unit, size in (
        ("most_cache_bytes", "cache, most", "KiB", 2**10),
        ("resident_bytes", "process, at its end", "MiB", 2**20),
    ):
        rows.append({"title": title, "unit": unit, "block": [value / size for value in found[name]]})
    blocks = {title: f"{{block[{at}]:.1f}} {{unit}}" for at, title in enumerate(("first", "second", "last"))}
    said = (
        f"{found['frames']:,} frames, {found['said']:,} of them with a caption; most text {found['most_text_tokens']}"
    )
    bound = ""
    if found["constant"] is not None:
        most, allowed = found["most_cache_bytes_of_all"], found["allowed_cache_bytes"]
        bound = f"\nnever above its bound: {found['constant']} ({most:,} of {allowed:,} bytes)"
    return f"{said}\n{table(rows, {'block': '{title}', **blocks})}{bound}"


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


def bench_memory(
    model: str = "casa-tiny",
    minutes: float = 60.0,
    short: float = 1.0,
    size: int = 112,
    fps: float = 2.0,
    film_fps: float = 25.0,
    max_text_tokens: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 32,
) -> Benchmark:
    """Peak bytes of two processes that caption films of both lengths, into a file, and what the long one has more.

    Args:
        minutes: Of the long film; short: of the short one.
        fps: Frames watched per second; film_fps: frames that are there, all of them decoded.
        max_text_tokens: With a bound, what is left is not the text's.

    Raises:
        UserError: numbers that cannot be, or a system that does not tell what a process holds.
    """
    if not 0 < short < minutes:
        raise UserError("give a short and a long film: 0 < short < minutes.", field=("short", "minutes"))
    if not 0 < fps <= film_fps:
        raise UserError(f"{fps} of {film_fps} frames per second cannot be watched; give 0 < fps <= film_fps.")
    if not peak_resident_bytes():
        raise UserError("this system does not tell how much memory a process has held; measure on Linux.")
    films = []
    with TemporaryDirectory() as folder:
        for length in (short, minutes):
            path = Path(folder) / "film.mp4"
            decoded = write_film(path, 60 * length, size, film_fps, fps, seed)
            held = in_own_process(peak_of_captioning, str(model), str(path), fps, max_text_tokens, max_new_tokens)
            films.append({"minutes": length, "decoded": decoded, **held})
    more = films[1]["peak_bytes"] - films[0]["peak_bytes"]
    columns = {"film": "{minutes:g} min", "decoded": "{decoded:,}", "watched": "{frames:,}", "captions": "{captions}"}
    shown = table(films, columns | {"peak of the process": "{peak_bytes!M:.0f} MiB"})
    settings = {"size": size, "fps": fps, "film_fps": film_fps, "max_text_tokens": max_text_tokens, "seed": seed}
    found = {"films": films, "more_bytes": more}
    return Benchmark("memory", settings, found, f"{shown}\nmore: {more / 1e6:.1f} MB", model=model)


def peak_of_captioning(
    model: str, path: str, fps: float, max_text_tokens: int | None, max_new_tokens: int
) -> dict[str, int]:
    """Frames watched, captions said and the peak of this process."""
    out = Path(path).with_suffix(".srt")
    request = CaptionRequest(path, (out,), fps=fps, max_text_tokens=max_text_tokens, max_new_tokens=max_new_tokens)
    report = caption(request, model, load_pretrained)
    return {"frames": report.count.frames, "captions": report.said, "peak_bytes": peak_resident_bytes()}
