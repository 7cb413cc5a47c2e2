"""`casa demo`: the shipped model on the shipped film, or on one's own video."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("demo"),
    video: Annotated[Path | None, typer.Option(help="Your own video; the shipped film if left out.")] = None,
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or casa-tiny.")] = "casa-tiny",
) -> None:
    """Watch a video as if live, ask about one frame, and write captions, captioned video and plots.

    Example: casa demo --out demo --video my.mp4
    """
    from casa.demo import run_demo

    run_demo(model, video=video, out=out)
