"""Live streams by the clock: one for minutes, and as many as this machine sustains.

A film is watched as a camera's stream would be, decoded again and again. Lag is from when a frame was due to when its
caption was there: whatever falls behind shows in it, or as dropped frames.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import count as counting
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol

from PIL import Image

from casa.benchmarks.harness import Benchmark, Figures, handwriting, percentiles, table, write_film
from casa.benchmarks.settings import LiveSettings, StreamSettings
from casa.media import probe, read_frames
from casa.media.pictures import picture_from
from casa.memory import resident_bytes
from casa.models.auto import load_pretrained
from casa.streaming import FrameCaption, StreamingEngine, StreamingSession, watch_live

LAP = 60.0  # s of film, which then begins again
CAMERA_FPS = 10.0
WARM = 2  # steps before the clock counts
POLL_SECONDS = 0.001  # between looks at whether a frame has come
LOAD_SECONDS = 10.0  # for which every number of sessions is tried


class LapFrame(NamedTuple):
    """A frame as `watch_live` takes it; time in seconds over all laps."""

    image: Image.Image
    time: float


def laps(path: Path, fps: float, seconds: float, lap: float) -> Iterator[LapFrame]:
    """The film over and over, sampled at `fps`, until `seconds` are over."""
    for number in counting():
        with read_frames(path, fps=fps) as film:
            for frame in film:
                time = number * lap + frame.time
                if time >= seconds - 1e-6:
                    return
                yield LapFrame(frame.image, time)


def bench_live(settings: LiveSettings) -> Benchmark:
    """Watches for so many minutes, which it takes."""
    model, processor = load_pretrained(settings.model, settings.device, settings.weights)
    seconds, fps, bound = 60 * settings.minutes, settings.fps, settings.max_text_tokens or None
    lap = min(LAP, max(2.0, math.ceil(seconds))) if settings.video is None else probe(settings.video).duration
    session = StreamingSession(model, processor, max_text_tokens=bound, max_new_tokens=16)
    with TemporaryDirectory() as folder:
        film = Path(settings.video or Path(folder) / "film.mp4")
        if settings.video is None:
            write_film(film, lap, settings.size, CAMERA_FPS, min(fps, CAMERA_FPS), settings.seed)
        # what is slow the first time only (codec, kernels) is no part of watching
        session.step(next(laps(film, fps, seconds, lap)).image)
        moments = watch_live(session, laps(film, fps, seconds, lap), fps, in_real_time=True)
        rows = list(by_minute(moments, fps, seconds, lambda: (session.usage.cache_bytes, resident_bytes())))
    found = live_summary(rows, fps)
    columns = {"minute": "{minute}", "frames": "{frames}", "dropped": "{dropped}", "cut": "{cut}"}
    columns |= {"lag, median": "{median_lag_ms:.0f} ms", "most": "{max_lag_ms:.0f} ms"}
    shown = f"{table(rows, columns | {'cache': '{cache_bytes!K:.0f} KiB'})}\nkeeps pace: {found['keeps_pace']}"
    drawn = {"size": settings.size, "seed": settings.seed} if settings.video is None else {"video": film.name}
    told = drawn | {"max_text_tokens": bound, "weights_as": settings.weights}
    return Benchmark("live", told, found, shown, str(model.device), settings.model)


def by_minute(
    moments: Iterable[FrameCaption], fps: float, seconds: float, held: Callable[[], tuple[int, int]]
) -> Iterator[Figures]:
    """Rows of the moments, one for each minute of the stream; a minute of which nothing was watched has a row too.

    Args:
        moments: In order of their times.
        fps: Frames that are due each second.
        seconds: Length of the stream.
        held: Bytes of the cache and of the process, now.
    """
    waiting = iter(moments)
    moment = next(waiting, None)
    for minute in range(math.ceil(seconds / 60 - 1e-9)):
        part = []
        while moment is not None and moment.time < 60 * (minute + 1) - 1e-6:
            part.append(moment)
            moment = next(waiting, None)
        yield _minute(minute, part, fps, seconds, held())


def _minute(minute: int, part: list[FrameCaption], fps: float, seconds: float, held: tuple[int, int]) -> Figures:
    """frames: due in this minute; watched, dropped, cut, said: of these. took_ms: of finding the words, median.
    cache_bytes, resident_bytes: of the session and the process, at its end."""
    end = min(60.0 * (minute + 1), seconds)
    due = math.ceil(end * fps - 1e-6) - math.ceil(60 * minute * fps - 1e-6)
    lags = [1000 * moment.lag for moment in part] or [math.nan]
    return {
        "minute": minute,
        "frames": due,
        "watched": len(part),
        "dropped": due - len(part),
        "cut": sum(not moment.complete for moment in part),
        "said": sum(bool(moment.text) for moment in part),
        "median_lag_ms": round(median(lags), 1),
        "max_lag_ms": round(max(lags), 1),
        "took_ms": round(median([1000 * moment.latency for moment in part] or [math.nan]), 1),
        "cache_bytes": held[0],
        "resident_bytes": held[1],
    }


def live_summary(minutes: list[Figures], fps: float) -> Figures:
    """Sums up the minutes of a run.

    Args:
        minutes: Figures of each.
        fps: Frames a second of the film.

    Returns:
        The minutes, and over all of them keeps_pace (no frame was dropped, no caption cut, and no minute's median lag
        above the time between two frames), accumulated_lag_ms (of the last minute over the first one) and growth_bytes
        (of the process, from the end of the second minute, when all that is made once is there, to that of the last;
        None where there is no third).
    """
    worst = max(minute["median_lag_ms"] for minute in minutes)
    frames, dropped, cut = (sum(minute[name] for minute in minutes) for name in ("frames", "dropped", "cut"))
    growth = minutes[-1]["resident_bytes"] - minutes[1]["resident_bytes"] if len(minutes) > 2 else None
    return {
        "fps": fps,
        "frames": frames,
        "dropped": dropped,
        "cut": cut,
        "accumulated_lag_ms": round(minutes[-1]["median_lag_ms"] - minutes[0]["median_lag_ms"], 1),
        "max_lag_ms": max(minute["max_lag_ms"] for minute in minutes),
        "growth_bytes": growth,
        "keeps_pace": bool(dropped == 0 and cut == 0 and worst <= 1000 / fps),
        "minutes": minutes,
    }


def bench_sessions(settings: StreamSettings, most: int, seconds: float = LOAD_SECONDS) -> Benchmark:
    """More and more sessions in one batch, each with a new frame every 1 / fps seconds, by the real clock.

    Loads are 1, 2, 4, ... up to `most` sessions, each for `seconds`, which it takes; behind the first that is not
    sustained, those halfway between it and the last that was.
    """
    model, processor = load_pretrained(settings.model, settings.device)
    fps, bound = settings.fps, settings.max_text_tokens or None

    def load(count: int) -> Figures:
        engine = StreamingEngine(model, processor, max_sessions=count, max_batch_size=count)
        films = {str(number): handwriting(settings.seed + number, settings.size) for number in range(count)}
        for name in films:
            engine.open(name, max_text_tokens=bound, max_new_tokens=16)
        for _ in range(WARM):
            for name, film in films.items():
                engine.offer(name, next(film))
            engine.step()
        frames = max(1, round(seconds * fps))
        return try_load(engine, {name: [_jpeg(f) for f in islice(film, frames)] for name, film in films.items()}, fps)

    loads = search(load, most)
    sustained = max((one["sessions"] for one in loads if one["sustained"]), default=0)
    columns = {"sessions": "{sessions}", "step, median": "{median_ms:.1f} ms", "95th": "{p95_ms:.1f} ms"}
    columns |= {"frames": "{frames}", "dropped": "{dropped}", "behind": "{behind_ms:.0f} ms"}
    columns |= {"cache of all": "{bytes!K:.0f} KiB", "sustained": "{sustained}"}
    shown = f"{table(loads, columns)}\na step may take {1000 / fps:.0f} ms"
    told = {"size": settings.size, "seed": settings.seed, "max_text_tokens": bound}
    found = {"fps": fps, "sustained": sustained, "loads": loads}
    return Benchmark("stream", told, found, shown, str(model.device), settings.model)


def try_load(engine: StreamingEngine, clips: Mapping[str, list[bytes]], fps: float) -> Figures:
    """Watches by the real clock: frames come whether the engine is ready or not, and are opened in a thread beside it.

    Args:
        engine: With a session for each clip.
        clips: Frames of each session, as JPEG.
        fps: At which they come.

    Returns:
        frames that came, of all sessions, and of these watched and dropped; median_ms and p95_ms of a step over all
        sessions; behind_ms, from the last frame's coming until all was said; bytes of all caches at the end; sustained,
        whether no frame was dropped and half of the steps take no longer than it takes the next frames to come.
    """
    took, watched = [], 0
    with ThreadPoolExecutor(1) as pool:
        fed = pool.submit(feed, engine, clips, fps)
        while not fed.done() or engine.waiting:
            if not engine.waiting:
                time.sleep(POLL_SECONDS)
                continue
            began = time.perf_counter()
            watched += sum(event.error is None for event in engine.step())
            took.append(1000 * (time.perf_counter() - began))
        behind = time.monotonic() - fed.result()
    dropped = sum(engine.dropped(name) for name in clips)
    middle, high = percentiles(took, 50, 95)
    return {
        "sessions": len(clips),
        "median_ms": middle,
        "p95_ms": high,
        "frames": sum(map(len, clips.values())),
        "watched": watched,
        "dropped": dropped,
        "behind_ms": round(1000 * behind, 1),
        "sustained": dropped == 0 and middle <= 1000 / fps,
        "bytes": sum(engine.session(name).usage.cache_bytes for name in clips),
    }


def search(load: Callable[[int], Figures], most: int) -> list[Figures]:
    """Loads that were tried on the way to the most sessions that are sustained, in order of their numbers."""
    found: list[Figures] = []
    good, bad = 0, most + 1
    while bad - good > 1:
        count = min(max(1, 2 * good), most) if bad > most else (good + bad) // 2
        found.append(load(count))
        good, bad = (count, bad) if found[-1]["sustained"] else (good, count)
    return sorted(found, key=lambda one: one["sessions"])


class TakesFrames(Protocol):
    """An engine, as far as its frames go."""

    def offer(self, name: str, frame: Image.Image, /) -> bool: ...


def feed(
    engine: TakesFrames,
    clips: Mapping[str, list[bytes]],
    fps: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Opens each session's frames and offers them, 1 / fps seconds apart, the sessions evenly between one another.

    Returns when the last one was there, by `clock`.
    """
    apart = 1 / (fps * len(clips))
    due = [
        (number / fps + place * apart, name, data)
        for place, (name, clip) in enumerate(clips.items())
        for number, data in enumerate(clip)
    ]
    began = clock()
    for at, name, data in sorted(due, key=lambda frame: frame[0]):
        sleep(max(0.0, began + at - clock()))
        engine.offer(name, picture_from(BytesIO(data)))
    return clock()


def _jpeg(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()
