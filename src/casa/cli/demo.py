"""`casa demo`: the shipped model on the shipped film, or on one's own video."""

import json
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("demo"),
    video: Annotated[Path | None, typer.Option(help="Your own video; the shipped film if left out.")] = None,
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or casa-tiny.")] = "casa-tiny",
    record: Annotated[Path | None, typer.Option(help="Write the figures to this .json file too.")] = None,
) -> None:
    """Watch a video as if live, ask about one frame, and write captions, captioned video and plots.

    Example: casa demo --out demo --video my.mp4
    """
    from casa.atomic import check_writable, write_text
    from casa.demo import run_demo
    from casa.provenance import provenance

    check_writable(record)
    found = run_demo(model, video=video, out=out)
    if record is not None:
        shown = {"demo": str(video or "the shipped film"), "model": model, "seed": found.seed}
        facts = {**shown, **provenance(model=model), **found.figures()}
        write_text(record, json.dumps(facts, indent=2) + "\n")
