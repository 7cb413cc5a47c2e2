"""`casa inspect`: one answer looked into, as a page; or a whole set, as tables and plots."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casa.cli.ask import sort_words
from casa.cli.options import Device
from casa.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

FILMS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".ts", ".mpg", ".mpeg")


def inspect(
    words: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PICTURE... QUESTION", help="MODEL is casa-tiny if left out.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("inspect.html"),
    answer: Annotated[str | None, typer.Option(help="Look into these words instead of the model's own.")] = None,
    self_attention: Annotated[
        bool, typer.Option("--self-attention", help="Look into the text model's own self-attention instead.")
    ] = False,
    fps: Annotated[float, typer.Option(help="Frames per second that are looked at, of a film.")] = 1.0,
    max_frames: Annotated[int, typer.Option(min=1, help="The most frames of a film, evenly chosen.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    device: Device = "auto",
) -> None:
    """Ask about pictures or a film and write a page that shows where every token of the answer looked.

    Example: casa inspect casa-tiny page.png "Read line 2." --out report.html

    Example: casa inspect ./my-casa film.mp4 "What happens?" --fps 2
    """
    name, shown, question = sort_words(words)
    from casa.analysis.inspect_page import check_page_path, write_inspection
    from casa.analysis.inspection import inspect_answer
    from casa.atomic import check_writable
    from casa.pipeline import load

    check_page_path(out)
    check_writable(out)
    pictures, labels = _pictures(shown, fps, max_frames)
    eyes = load(name, device=device)
    found = inspect_answer(
        eyes.model,
        eyes.processor,
        pictures,
        question,
        answer=answer,
        labels=labels,
        max_new_tokens=max_new_tokens,
        self_attention=self_attention,
    )
    write_inspection(out, found, model=name)
    print(f"{found.answer}\n{out}: where each of its tokens looked.")


def _pictures(names: list[str], fps: float, most: int) -> tuple[list["Image.Image"], list[str]]:
    """The pictures, with a line about each; a film stands for its frames."""
    from casa.media import open_picture, open_source
    from casa.media.pictures import as_picture

    pictures, labels = [], []
    for name in names:
        if Path(name).suffix.lower() not in FILMS:
            pictures.append(open_picture(name))
            labels.append(Path(name).name)
            continue
        kept, stride = [], 1
        with open_source(name, fps) as frames:
            for frame in frames:
                if frame.index % stride == 0:
                    kept.append((frame.time, frame.picture))
                if len(kept) == 2 * most:
                    # a long film is not held whole
                    kept, stride = kept[::2], 2 * stride
        if not kept:
            raise UserError(f"{name} has no frame at {fps} frames a second; give a larger fps.", field="fps")
        count = min(most, len(kept))
        kept = [kept[number * len(kept) // count] for number in range(count)]
        pictures += [as_picture(picture) for _, picture in kept]
        labels += [f"{time:.1f} s" for time, _ in kept]
    return pictures, labels
