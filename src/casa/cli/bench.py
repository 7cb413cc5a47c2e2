"""`casa bench`: measurements, side by side in one run."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from casa.cli.model_at_hand import load, pick_device

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON here too.")]


def attention(
    device: Device = "auto",
    impls: Annotated[str | None, typer.Option(help="Implementations to time, with commas.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 9,
    seed: Annotated[int, typer.Option(help="Seed of the tensors and of the ragged windows.")] = 0,
    json: Json = False,
    out: Out = None,
) -> None:
    """Time the attention implementations beside one dense mask, forward and forward + backward.

    Example: casa bench attention --repeats 9 --json
    """
    from casa.benchmarks.attention import bench_attention, bench_record, bench_table

    names = None if impls is None else tuple(name.strip() for name in impls.split(","))
    where = pick_device(device)
    rows = bench_attention(impls=names, device=where, repeats=repeats, seed=seed)
    _report(bench_record(rows, seed, repeats, where), bench_table(rows), json, out)


def stream(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or casa-tiny.")] = "casa-tiny",
    frames: Annotated[int, typer.Option(help="Frames to watch.")] = 120,
    size: Annotated[int, typer.Option(help="Sides of a frame in px.")] = 336,
    max_text_tokens: Annotated[int | None, typer.Option(help="Bound on CASA's text; none if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws another film.")] = 0,
    device: Device = "auto",
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch frames with CASA and with insertion of the same size: latency and memory per frame, in one run.

    Example: casa bench stream casa-tiny --frames 1000 --max-text-tokens 128
    """
    from casa.benchmarks.stream import bench_stream, stream_table, summary
    from casa.provenance import provenance

    loaded, processor = load(model, device)
    rows = bench_stream(loaded, processor, frames, size, seed, max_text_tokens)
    found = summary(rows)
    settings = {"model": model, "size": size, "seed": seed, "max_text_tokens": max_text_tokens}
    record = {"bench": "stream", **settings, **provenance(str(loaded.device)), **found}
    _report(record, stream_table(found), json, out)


def _report(record: dict[str, Any], table: str, as_json: bool, out: Path | None) -> None:
    from casa.atomic import write_text

    text = json_module.dumps(record, indent=2)
    if out is not None:
        write_text(out, text + "\n")
    print(text if as_json else table)
