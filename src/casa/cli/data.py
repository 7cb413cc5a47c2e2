"""`casa data`: a look at one's own data before training on them; `make` draws some."""

import json as json_module
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casa.cli.data_make import make
from casa.errors import UserError

if TYPE_CHECKING:
    from casa.data.check import Checked

# as casa.data.settings has them, which is not loaded for a help text
SHAPES = (
    *("auto", "chat", "llava", "finevision", "llava-video", "live-whisperx", "vqa", "prompt-completion"),
    "caption",
)
# bad records that are printed one by one
_LISTED = 20


data_app = typer.Typer(
    help="Look at data before training on them, or draw some.\n\nExample: casa data check pages.jsonl",
    no_args_is_help=True,
    rich_markup_mode=None,
)
data_app.command("make")(make)


@data_app.callback()
def data() -> None:
    """Look at data before training on them, or draw some."""


@data_app.command("check")
def check(
    path: Annotated[str, typer.Argument(help="A file, a folder, a glob in quotes, or hub:owner/name.")],
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = SHAPES[0],
    root: Annotated[str | None, typer.Option(help="Where relative picture paths start.")] = None,
    outside: Annotated[bool, typer.Option("--outside", help="Paths may lead out of the root.")] = False,
    column: Annotated[list[str] | None, typer.Option(help="Its name here and in the data: image=photo.")] = None,
    fps: Annotated[float, typer.Option(help="Frames of a video looked at per second.")] = 2.0,
    split: Annotated[str, typer.Option(help="Of a hub data set, or of a saved DatasetDict.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Of a hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at so many records only.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 2 if any record is bad.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Show samples with their windows, as an HTML page.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=200, help="How many are shown.")] = 12,
    report: Annotated[Path | None, typer.Option(help="Write every bad record here, one JSON object per line.")] = None,
    model: Annotated[str | None, typer.Option(help="Count with this model's tokens: a folder, or casa-tiny.")] = None,
) -> None:
    """Read a data set as training would: what is in it, how long and large it is, and what cannot be used.

    Example: casa data check pages.jsonl --sheet sheet.html
    """
    from rich.console import Console

    from casa.atomic import check_writable
    from casa.data import Report, parse_data_settings
    from casa.data.check import check_data, image_tokens
    from casa.data.html_report import check_report_path

    values: dict[str, Any] = {"path": path, "shape": shape, "root": root, "outside": outside, "fps": fps}
    if report is not None and report.exists():
        raise UserError(f"{report} exists already: remove it, or name another file for the report.")
    # said before the data are read, not after
    if sheet is not None:
        check_report_path(sheet)
    check_writable(sheet, report)
    values |= {"split": split, "subset": subset, "columns": dict(map(_pair, column or ()))}
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
            report=Report(report),
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


def _pair(column: str) -> tuple[str, str]:
    known, equals, actual = column.partition("=")
    if not (known and equals and actual):
        raise UserError(f"--column {column!r} names nothing; write its name here and in the data: image=photo.")
    return known, actual


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
    from casa.data.html_report import counted

    whole = "" if found.complete else " looked at, and there are more"
    return f"{counted(found.records, 'good record')} and {found.report.total:,} bad{whole}"


def _show(found: "Checked", path: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from casa.data.bad import REASONS
    from casa.data.check import QUANTITIES

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a log has no edge to wrap at
    console.print(Text(f"{path}: {_summary(found)}", style="bold"))
    if statistics := found.statistics():
        table = Table("per record", box=None, pad_edge=False, header_style="dim")
        for name in ("least", "median", "mean", "95 %", "most", "total"):
            table.add_column(name, justify="right")
        for name, label in QUANTITIES.items():
            if name in statistics:
                row = [f"{value:,.10g}" for value in statistics[name].values()]
                # a sum of widths says nothing
                table.add_row(label, *row[:-1], "" if name in ("width", "height") else row[-1])
        console.print()
        console.print(table)
    if found.report.total:
        table = Table("bad records", "", "", box=None, pad_edge=False, header_style="dim")
        for reason, count in found.report.counts.most_common():
            table.add_row(f"{count:,}", reason, REASONS[reason])
        console.print()
        console.print(table)
        console.print()
        for origin, bad in found.report.first[:_LISTED]:
            # the data's own words are never markup
            console.print(Text(f"{origin}: {bad}"))
        if found.report.total > _LISTED:
            console.print(f"and {found.report.total - _LISTED:,} more; --report FILE lists them all.")
