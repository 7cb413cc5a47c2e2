"""`casa data make`: the offline tasks as data sets, to train on with recipes of one's own."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casa.errors import UserError

if TYPE_CHECKING:
    from numpy.random import Generator

    from casa.evaluation import Example

_QUESTIONS = 16  # drawn per picture; some of them are kept


def make(
    out: Annotated[Path, typer.Argument(help="A folder, new or empty.")],
    pages: Annotated[int, typer.Option(min=0, help="Pages of handwritten digits.")] = 2000,
    scenes: Annotated[int, typer.Option(min=0, help="Scenes of coloured shapes.")] = 2000,
    clips: Annotated[int, typer.Option(min=0, help="Clips in which numbers come and go.")] = 300,
    turns: Annotated[int, typer.Option(min=1, max=16, help="Questions about a picture, at most.")] = 8,
    largest: Annotated[int, typer.Option(min=112, max=672, help="Longest side of a picture, in px.")] = 672,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same data.")] = 1,
) -> None:
    """Draw the training split of the offline tasks into files: pages.tar, scenes.tar, and clips.jsonl with its videos.

    Writers, photographs and places of the held-out split are never among them.

    Example: casa data make data/tiny --seed 1
    """
    from rich.progress import Progress

    from casa.data.made import write_clips, write_pictures
    from casa.evaluation import page, scene, training_clip
    from casa.evaluation import pages as page_task
    from casa.evaluation import scenes as scene_task
    from casa.evaluation.stream import FPS, PROMPT

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name a new folder.")
    if not pages + scenes + clips:
        raise UserError("nothing is asked for: give --pages, --scenes or --clips a number above 0.")
    draws = {"pages": page, "scenes": scene}
    greatest = {"pages": page_task.MAX_SIDE, "scenes": scene_task.MAX_SIDE}
    out.mkdir(parents=True, exist_ok=True)
    with Progress(transient=True) as progress:
        for number, (name, count) in enumerate({"pages": pages, "scenes": scenes, "clips": clips}.items()):
            if not count:
                continue
            task = progress.add_task(name, total=count)

            def told(done: int, task: int = task) -> None:
                progress.update(task, completed=done)  # type: ignore[arg-type]

            if name == "clips":
                write_clips(
                    out / "clips.jsonl",
                    training_clip,
                    count,
                    (seed, number),
                    prompt=PROMPT,
                    fps=FPS,
                    told=told,
                )
                continue
            sides = (page_task.MIN_SIDE, min(largest, greatest[name]))

            def drawn(
                rng: "Generator", size: tuple[int, int] | None, draw: "Callable[..., Example]" = draws[name]
            ) -> "Example":
                return draw(rng, "train", turns=_QUESTIONS, sizes=None if size is None else [size])

            write_pictures(out / f"{name}.tar", drawn, count, (seed, number), turns=turns, sides=sides, told=told)
    print(f"{out}: {pages:,} pages, {scenes:,} scenes, {clips:,} clips")
