"""`casa demo` watches a video as if live, asks about one frame, measures, and writes all of it into a folder."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from PIL import Image

from casa.analysis.attention_maps import AttentionShares, attention_shares
from casa.analysis.plots import plot_attention, plot_cost
from casa.analysis.streaming_cost import Comparison, CostRow
from casa.demo.report import STILLS, DemoReport, FrameAnswer, heading, line, write_poster
from casa.errors import UserError
from casa.figures import new_figure
from casa.media import burn_captions, captions_from_frames, read_frames, write_captions
from casa.pipeline import CasaPipeline, load

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "demo"
FPS = 2.0
MAX_SIDE = 448  # px; what live captioning is trained on
# about what the longest clips of training hold: beyond what it has met, the model repeats and overlooks numbers
# (docs/log.md), so the oldest text is forgotten
MAX_TEXT_TOKENS = 128
MAX_NEW_TOKENS = 16

Report = Callable[[str], object]
"""Takes one line of text, as `print` does."""


@dataclass(frozen=True)
class DemoFilm:
    """A video and the true captions of its frames, as sampled twice a second from time 0.

    Attributes:
        captions: (time in seconds, text) of the frames that show something new; all others are silent.
        seed: What the film was drawn from.
    """

    path: Path
    seed: int
    captions: tuple[tuple[float, str], ...]

    def truth(self, times: Sequence[float]) -> list[str]:
        """The true caption of each of the frames sampled at `times` (s): "" where nothing is new."""
        at = {round(time * FPS): text for time, text in self.captions}
        return [at.get(round(time * FPS), "") for time in times]


def shipped_film(path: Path = SHIPPED / "clip.mp4") -> DemoFilm:
    """The film in the package: a minute of handwriting that casa-tiny was never trained on.

    Its truth lies beside it, as JSON.
    """
    given = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return DemoFilm(path, given["seed"], tuple((row["time"], row["text"]) for row in given["captions"]))


def run_demo(
    model_name_or_path: str | os.PathLike[str] = "casa-tiny",
    video: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "demo",
    report: Report = print,
) -> DemoReport:
    """Captions a video at 2 fps through a live session, with an insertion session of the same size beside it.

    Args:
        model_name_or_path: A checkpoint's folder, or casa-tiny.
        video: A whole video; the shipped film, whose truth is known, if None. Frames are shown to the model at 448 px
            at most.
        out: A folder, made if need be. Files of an earlier run in it are replaced, each whole or not at all:
            captions.srt, .vtt and .jsonl, captioned.mp4, memory.png, attention.png, and demo.png with all of it at a
            glance.
        report: Takes lines of text.

    Raises:
        UserError: The video or model cannot be read, `out` cannot be written, or matplotlib is not there.
    """
    start = perf_counter()
    new_figure(1, 1)  # without matplotlib this is said before a minute of film
    folder = _folder(out)
    film = shipped_film() if video is None else None
    path = film.path if film is not None else Path(video or "")
    times: list[float] = []
    rows: list[CostRow] = []
    stills: list[tuple[Image.Image, str]] = []
    picture: Image.Image | None = None
    asked_at = 0.0
    with read_frames(path, fps=FPS) as frames:  # refuses a bad video before a model is loaded
        info = frames.info
        total = max(1, math.ceil(info.duration * FPS - 1e-6)) if math.isfinite(info.duration) else None
        report(f"Loading {model_name_or_path} ...")
        eyes = load(model_name_or_path)
        report(f"Watching {path.name} at {FPS:g} frames a second, as if live; insertion, of the same size, beside it.")
        report(heading(film is not None))
        prompt = eyes.processor.tokenizer.encode(eyes.processor.stream_prompt, add_special_tokens=False)
        bound = MAX_TEXT_TOKENS + len(prompt)  # room for the prompt, however long, and for what is said
        comparison = Comparison(eyes.model, eyes.processor, max_text_tokens=bound, max_new_tokens=MAX_NEW_TOKENS)
        ask_at, number = _frame_to_ask_about(film, total)
        with _progress("frames watched", total) as advance:
            for frame in frames:
                shrunk = _shrunk(frame.image)
                rows.append(comparison.step(shrunk))
                times.append(frame.time)
                if rows[-1].caption and len(stills) < STILLS:
                    stills.append((shrunk, rows[-1].caption))
                if picture is None or frame.time <= ask_at + 1e-6:
                    picture, asked_at = shrunk, frame.time
                truth = film.truth([frame.time])[0] if film is not None else None
                if (told := line(frame.time, rows[-1].caption, truth)) is not None:
                    report(told)
                advance(len(rows))
    assert picture is not None  # a video without a single frame is refused when it is opened

    said = tuple(row.caption for row in rows)
    asked = questions_for(number)
    given = eyes.ask(picture, [question for question, _ in asked], max_new_tokens=MAX_NEW_TOKENS)
    answers = [FrameAnswer(question, text, truth) for (question, truth), text in zip(asked, given, strict=True)]
    captions = captions_from_frames(times, said, end=info.duration)
    files = [folder / f"captions.{kind}" for kind in ("srt", "vtt", "jsonl")]
    for file in files:
        write_captions(file, captions)
    files += [folder / name for name in ("captioned.mp4", "memory.png", "attention.png", "demo.png")]
    with _progress("frames drawn", info.frames) as advance:
        burn_captions(path, captions, files[3], progress=lambda done, _: advance(done))
    plot_cost(rows, files[4], fps=FPS)
    shares, token, written = _look(eyes, picture, answers[-1] if film is None else answers[0])
    plot_attention(shares, picture, files[5], token=token, written=written)
    write_poster(files[6], stills, files[4:6])

    found = DemoReport(
        times=tuple(times),
        said=said,
        truth=tuple(film.truth(times)) if film is not None else None,
        rows=tuple(rows),
        asked_at=asked_at,
        answers=tuple(answers),
        files=tuple(files),
        seconds=perf_counter() - start,
        seed=film.seed if film is not None else None,
    )
    for told in found.lines():
        report(told)
    return found


def questions_for(number: str | None) -> list[tuple[str, str | None]]:
    """What is asked about a frame that shows `number` (None: nobody knows what it shows), with the truth."""
    if number is None:
        return [("How many lines are there?", None), ("Read line 1.", None)]
    return [
        ("Read line 1.", number),
        ("How many digits are in line 1?", str(len(number))),
        (f"What is digit {len(number)} of line 1?", number[-1]),
    ]


def _look(eyes: CasaPipeline, picture: Image.Image, found: FrameAnswer) -> tuple[AttentionShares, int, str]:
    """Where the model looked while it wrote an answer.

    Returns:
        Attention of the tokens that write the answer; the index in the text of the one that writes its second token,
        or the first if there is one; and the answer with the part that is being written in brackets.
    """
    processor = eyes.processor
    question = {
        "role": "user",
        "content": [{"type": "image", "image": picture}, {"type": "text", "text": found.question}],
    }
    answer = {"role": "assistant", "content": [{"type": "text", "text": found.answer}]}
    settings: dict[str, Any] = {"tokenize": True, "return_dict": True}
    start = processor.apply_chat_template([question], add_generation_prompt=True, **settings)["input_ids"].shape[1]
    inputs = processor.apply_chat_template([question, answer], **settings).to(eyes.model.device)
    ids = inputs["input_ids"][0, start:].tolist()
    stop = processor.tokenizer.eos_token_id
    length = max(1, ids.index(stop) if stop in ids else len(ids))
    # a token is decided one place before it stands
    shares = attention_shares(eyes.model, inputs, range(start - 1, start - 1 + length))
    chosen = min(1, length - 1)
    parts = (ids[:chosen], ids[chosen : chosen + 1], ids[chosen + 1 : length])
    before, written, after = (processor.tokenizer.decode(part) for part in parts)
    return shares, start - 1 + chosen, f"{before}[{written}]{after}"


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


def _frame_to_ask_about(film: DemoFilm | None, total: int | None) -> tuple[float, str | None]:
    """When (s), and what is seen then if that is known: a long number, or else the middle of the video."""
    if film is None or not film.captions:
        return ((total or 0) // 2 / FPS, None)
    return max(film.captions, key=lambda caption: len(caption[1]))


def _shrunk(image: Image.Image) -> Image.Image:
    scale = MAX_SIDE / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


@contextmanager
def _progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, nothing elsewhere; told how many are done so far. Lines printed meanwhile appear above."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
