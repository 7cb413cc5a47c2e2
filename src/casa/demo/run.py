"""`casa demo`: watches a video as if live, asks about one frame, measures, and writes all of it into a folder."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from PIL import Image

from casa.analysis.plots import plot_attention, plot_cost
from casa.analysis.streaming_cost import Comparison, CostRow
from casa.demo.clip import Clip, shipped_clip
from casa.demo.poster import STILLS, write_poster
from casa.demo.progress import Report, shown
from casa.demo.questions import ask, look, questions_for
from casa.demo.report import DemoReport, heading, line
from casa.errors import UserError
from casa.media import burn_captions, captions_from_frames, read_frames, write_captions
from casa.models import CasaProcessor
from casa.models.auto import load_pretrained

FPS = 2.0
LONGEST_SIDE = 448  # px; what live captioning is trained on
# about what the longest clips of training hold: beyond what it has met, the model repeats and overlooks numbers
# (docs/log.md), so the oldest text is forgotten
MOST_TEXT_TOKENS = 128
MOST_NEW_TOKENS = 16


def run_demo(
    model_name_or_path: str | os.PathLike[str] = "casa-tiny",
    video: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "demo",
    report: Report = print,
) -> DemoReport:
    """Captions a video at 2 fps through a live session, with an insertion session of the same size beside it.

    video: the shipped clip if left out, whose truth is known; of one's own, a whole video. Frames are shown to the
    model at 448 px at most. out: a folder, made if need be; files of an earlier run in it are replaced, each
    whole or not at all: captions.srt, .vtt and .jsonl, captioned.mp4, memory.png, attention.png, and demo.png with
    all of it at a glance.
    report: takes lines of text; by default they are printed.
    Raises UserError for a video or model that cannot be read, or an `out` that cannot be written.
    """
    start = perf_counter()
    folder = _folder(out)
    clip = shipped_clip() if video is None else None
    path = clip.path if clip is not None else Path(video or "")
    with read_frames(path, fps=FPS) as frames:  # refuses a bad video before a model is loaded
        info = frames.info
        total = max(1, math.ceil(info.duration * FPS - 1e-6)) if math.isfinite(info.duration) else None
        report(f"Loading {model_name_or_path} ...")
        model, processor = load_pretrained(model_name_or_path)
        report(f"Watching {path.name} at {FPS:g} frames a second, as if live; insertion, of the same size, beside it.")
        report(heading(clip is not None))
        comparison = Comparison(model, processor, max_text_tokens=_bound(processor), max_new_tokens=MOST_NEW_TOKENS)
        ask_at, number = _frame_to_ask_about(clip, total)
        times: list[float] = []
        rows: list[CostRow] = []
        picture: Image.Image | None = None
        stills: list[tuple[Image.Image, str]] = []
        asked_at = 0.0
        with shown("frames watched", total, report) as advance:
            for frame in frames:
                shrunk = _shrunk(frame.image)
                rows.append(comparison.step(shrunk))
                times.append(frame.time)
                if rows[-1].caption and len(stills) < STILLS:
                    stills.append((shrunk, rows[-1].caption))
                if picture is None or frame.time <= ask_at + 1e-6:
                    picture, asked_at = shrunk, frame.time
                told = line(frame.time, rows[-1].caption, clip.truth([frame.time])[0] if clip is not None else None)
                if told is not None:
                    report(told)
                advance(len(rows))
    assert picture is not None  # a video without a single frame is refused when it is opened

    said = tuple(row.caption for row in rows)
    answers = ask(model, processor, picture, questions_for(number))
    captions = captions_from_frames(times, said, end=info.duration)
    files = [folder / f"captions.{kind}" for kind in ("srt", "vtt", "jsonl")]
    for file in files:
        write_captions(file, captions)
    files += [folder / name for name in ("captioned.mp4", "memory.png", "attention.png")]
    with shown("frames drawn", info.frames, report) as advance:
        burn_captions(path, captions, files[3], progress=_counted(advance))
    plot_cost(rows, files[4], fps=FPS)
    seen = look(model, processor, picture, answers[-1] if clip is None else answers[0])
    plot_attention(seen.shares, picture, files[5], token=seen.token, written=seen.written)
    files.append(folder / "demo.png")
    write_poster(files[6], stills, files[4:6])

    found = DemoReport(
        times=tuple(times),
        said=said,
        truth=tuple(clip.truth(times)) if clip is not None else None,
        rows=tuple(rows),
        asked_at=asked_at,
        answers=tuple(answers),
        files=tuple(files),
        seconds=perf_counter() - start,
        seed=clip.seed if clip is not None else None,
    )
    for told in found.lines():
        report(told)
    return found


def _folder(out: str | os.PathLike[str]) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{out} is a file: name a folder to write into.") from error
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): name another folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be written into: name another folder.")
    return folder


def _bound(processor: CasaProcessor) -> int:
    """Room for the prompt, however long, and for what is said."""
    prompt = len(processor.tokenizer.encode(processor.stream_prompt, add_special_tokens=False))
    return MOST_TEXT_TOKENS + prompt


def _frame_to_ask_about(clip: Clip | None, total: int | None) -> tuple[float, str | None]:
    """When (s), and what is seen then if that is known: a long number, or else the middle of the video."""
    if clip is None or not clip.captions:
        return ((total or 0) // 2 / FPS, None)
    time, number = max(clip.captions, key=lambda caption: len(caption[1]))
    return time, number


def _shrunk(image: Image.Image) -> Image.Image:
    scale = LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )


def _counted(advance: Callable[[int], None]) -> Callable[[int, int | None], None]:
    return lambda done, _: advance(done)
