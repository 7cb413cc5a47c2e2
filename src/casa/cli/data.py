"""`casa data`: a look at one's own data before training on them; `make` draws some."""

import json as json_module
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casa.cli.options import (
    SHAPES,
    Column,
    DataSplit,
    Json,
    Outside,
    Root,
    Shape,
    Subset,
    VideoFps,
    console,
    pairs,
    table,
    writable,
)
from casa.errors import UserError

if TYPE_CHECKING:
    from numpy.random import Generator

    from casa.data.check import Checked
    from casa.evaluation import Example

_LISTED = 20  # bad records that are printed one by one
_QUESTIONS = 16  # drawn per picture by `casa data make`; some of them are kept

data_app = typer.Typer(
    help="Look at data before training on them, or draw some.\n\nExample: casa data check pages.jsonl",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@data_app.callback()
def data() -> None:
    """Look at data before training on them, or draw some."""


@data_app.command("check")
def check(
    path: Annotated[str, typer.Argument(help="A file, a folder, a glob in quotes, or hub:owner/name.")],
    shape: Shape = SHAPES[0],
    root: Root = None,
    outside: Outside = False,
    column: Column = None,
    fps: VideoFps = 2.0,
    split: DataSplit = "train",
    subset: Subset = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at so many records only.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 2 if any record is bad.")] = False,
    json: Json = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Show samples with their windows, as an HTML page.", callback=writable)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=200, help="How many are shown.")] = 12,
    report: Annotated[
        Path | None, typer.Option(help="Write every bad record here, one JSON object per line.", callback=writable)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Count with this model's tokens: a folder, or casa-tiny.")] = None,
) -> None:
    """Read a data set as training would: what is in it, how long and large it is, and what cannot be used.

    Example: casa data check pages.jsonl --sheet sheet.html
    """
    from rich.console import Console

    from casa.data import BadRecordReport, parse_data_settings
    from casa.data.check import check_data, image_tokens
    from casa.figures import check_page_path

    values: dict[str, Any] = {"path": path, "shape": shape, "root": root, "outside": outside, "fps": fps}
    if report is not None and report.exists():
        raise UserError(f"{report} exists already: remove it, or name another file for the report.")
    if sheet is not None:
        check_page_path(sheet)
    values |= {"split": split, "subset": subset, "columns": pairs(column, "--column", "image=photo")}
    settings = parse_data_settings({"sources": [values]}, "the options")
    count_text, count_image = (None, image_tokens) if model is None else _counters(model)
    notes = Console(stderr=True)
    with notes.status("reading") as status:
        found = check_data(
            settings,
            limit=limit,
            count_text=count_text,
            count_image=count_image,
            samples=samples,
            report=BadRecordReport(report),
            progress=lambda rows: status.update(f"{rows:,} records read"),
        )
    if sheet is not None and found.samples:
        from casa.data.sheet import write_sheet

        write_sheet(found.samples, sheet, path, _summary(found))
    if json:
        print(json_module.dumps({"path": path, **found.to_dict()}, ensure_ascii=False, indent=2))
    else:
        _show(found, path)
    if found.report.unwritten is not None:
        raise UserError(f"{found.report.unwritten}: write the report elsewhere.")
    if not found.records:
        raise UserError(f"{path} has no record to learn from: {_first_bad(found)}")
    if strict and found.report.total:
        raise UserError(_first_bad(found))


def _first_bad(found: "Checked") -> str:
    if not found.report.total:
        return "it holds no rows."
    origin, bad = found.report.first[0]
    more = f" ({found.report.total - 1:,} more)" if found.report.total > 1 else ""
    return f"{origin}: {bad}{more}"


def _counters(model: str) -> tuple[Callable[[str], int], Callable[[int, int], int]]:
    """How many tokens a text, and a picture of (width, height) px, have in a model."""
    from functools import cache

    from PIL import Image

    from casa.models import CasaProcessor

    processor = CasaProcessor.from_pretrained(model)

    @cache
    def of_image(width: int, height: int) -> int:
        found = processor.image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
        merged = getattr(processor.image_processor, "merge_size", 1) ** 2
        return int(found["image_grid_thw"].prod()) // merged

    return lambda text: len(processor.tokenizer.encode(text, add_special_tokens=False)), of_image


def _summary(found: "Checked") -> str:
    from casa.figures import counted

    whole = "" if found.complete else " looked at, and there are more"
    return f"{counted(found.records, 'good record')} and {found.report.total:,} bad{whole}"


def _show(found: "Checked", path: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from casa.data.check import QUANTITIES
    from casa.data.record import REASONS

    shown = console(width=120)
    shown.print(Text(f"{path}: {_summary(found)}", style="bold"), soft_wrap=True)
    if statistics := found.statistics():
        sizes = table("per record", "least", "median", "mean", "95 %", "most", "total")
        for name, label in QUANTITIES.items():
            if name in statistics:
                row = [f"{value:,.10g}" for value in statistics[name].values()]
                # a sum of widths says nothing
                sizes.add_row(label, *row[:-1], "" if name in ("width", "height") else row[-1])
        shown.print()
        shown.print(sizes)
    if found.report.total:
        reasons = Table("bad records", "", "", box=None, pad_edge=False, header_style="dim")
        for reason, count in found.report.counts.most_common():
            reasons.add_row(f"{count:,}", reason, REASONS[reason])
        shown.print()
        shown.print(reasons)
        shown.print()
        for origin, bad in found.report.first[:_LISTED]:
            # the data's own words are never markup
            shown.print(Text(f"{origin}: {bad}"), soft_wrap=True)
        if found.report.total > _LISTED:
            shown.print(f"and {found.report.total - _LISTED:,} more; --report FILE lists them all.")


@data_app.command("make")
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
    from rich.progress import Progress, TaskID

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

            def told(done: int, task: TaskID = task) -> None:
                progress.update(task, completed=done)

            if name == "clips":
                write_clips(
                    out / "clips.jsonl", training_clip, count, (seed, number), prompt=PROMPT, fps=FPS, told=told
                )
                continue
            sides = (page_task.MIN_SIDE, min(largest, greatest[name]))

            def drawn(
                rng: "Generator", size: tuple[int, int] | None, draw: "Callable[..., Example]" = draws[name]
            ) -> "Example":
                return draw(rng, "train", turns=_QUESTIONS, sizes=None if size is None else [size])

            write_pictures(out / f"{name}.tar", drawn, count, (seed, number), turns=turns, sides=sides, told=told)
    print(f"{out}: {pages:,} pages, {scenes:,} scenes, {clips:,} clips")
