"""`casa bench`: measurements, side by side in one run."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from casa.errors import UserError

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
    from casa.models.at_hand import pick_device

    names = None if impls is None else tuple(name.strip() for name in impls.split(","))
    where = pick_device(device)
    rows = bench_attention(impls=names, device=where, repeats=repeats, seed=seed)
    _report(bench_record(rows, seed, repeats, where), bench_table(rows), json, out)


def stream(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or casa-tiny.")] = "casa-tiny",
    frames: Annotated[int, typer.Option(help="Frames to watch.")] = 120,
    size: Annotated[int, typer.Option(help="Sides of a frame in px.")] = 336,
    tokens: Annotated[
        int | None, typer.Option(help="Say so many tokens of every frame, as the official table.")
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(help="How many live streams this machine keeps, up to so many.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of each of the sessions.")] = 2.0,
    max_text_tokens: Annotated[int | None, typer.Option(help="Bound on CASA's text; none if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws another film.")] = 0,
    device: Device = "auto",
    plot: Annotated[Path | None, typer.Option(help="With --tokens: latency and memory as a PNG.")] = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch frames with CASA and with insertion of the same size: latency and memory per frame, in one run.

    Example: casa bench stream casa-tiny --frames 256 --tokens 16
    """
    from casa.models.at_hand import load_at_hand
    from casa.provenance import provenance

    if tokens is not None and sessions is not None:
        raise UserError("--tokens and --sessions are two measurements; give one of them.")
    loaded, processor = load_at_hand(model, device)
    settings: dict[str, Any] = {"model": model, "size": size, "seed": seed}
    if sessions is not None:
        from casa.benchmarks.sessions import bench_sessions, sessions_summary, sessions_table

        bound = max_text_tokens if max_text_tokens is not None else 128
        settings["max_text_tokens"] = bound
        loads = bench_sessions(loaded, processor, sessions, fps, size, max_text_tokens=bound, seed=seed)
        found, table = sessions_summary(loads, fps), sessions_table(loads, fps)
    elif tokens is not None:
        from casa.benchmarks.stream import handwriting
        from casa.benchmarks.turns import PeakMemory, bench_turns, plot_turns, turns_summary, turns_table

        settings["tokens"] = tokens
        with PeakMemory() as memory:
            turns = bench_turns(loaded, processor, handwriting(seed, size), frames, tokens)
        found, table = turns_summary(turns) | {"peak_host_bytes_above_start": memory.bytes}, ""
        table = turns_table({name: row for name, row in found.items() if name in turns})
        if plot is not None:
            plot_turns(turns, plot)
    else:
        from casa.benchmarks.stream import bench_stream, stream_table, summary

        settings["max_text_tokens"] = max_text_tokens
        rows = bench_stream(loaded, processor, frames, size, seed, max_text_tokens)
        found = summary(rows)
        table = stream_table(found)
    record = {"bench": "stream", **settings, **provenance(str(loaded.device)), **found}
    _report(record, table, json, out)


def _report(record: dict[str, Any], table: str, as_json: bool, out: Path | None) -> None:
    from casa.atomic import write_text

    text = json_module.dumps(record, indent=2)
    if out is not None:
        write_text(out, text + "\n")
    print(text if as_json else table)
