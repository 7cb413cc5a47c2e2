"""What the verbs of `casa bench` share: options of the same meaning, and how a result is told."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer


def writable(path: Path | None) -> Path | None:
    """An option's file, once it is known that it can be written: before the hours of a measurement, not after."""
    from casa.atomic import check_writable

    check_writable(path)
    return path


Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or casa-tiny.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON here too.", callback=writable)]
Seed = Annotated[int, typer.Option(help="Another seed draws another film.")]


def report(record: dict[str, Any], table: str, as_json: bool, out: Path | None) -> None:
    """Prints the table, or the record as JSON, which is written to `out` too."""
    from casa.atomic import write_text

    text = json_module.dumps(record, indent=2)
    if out is not None:
        write_text(out, text + "\n")
    print(text if as_json else table)
