"""`casa bench`: measurements, side by side in one run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from casa.cli.bench_live import live, neighbour
from casa.cli.bench_memory import memory
from casa.cli.bench_options import Device, Json, Model, Out, Seed, report, writable
from casa.cli.bench_soak import soak
from casa.cli.bench_train import train
from casa.cli.sampling_options import MaxTextTokens
from casa.errors import UserError

bench_app = typer.Typer(
    help="Time things, side by side in one run.\n\nExample: casa bench attention",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench_app.command()
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
    from casa.models.auto import pick_device

    names = None if impls is None else tuple(name.strip() for name in impls.split(","))
    where = pick_device(device)
    rows = bench_attention(impls=names, device=where, repeats=repeats, seed=seed)
    report(bench_record(rows, seed, repeats, where), bench_table(rows), json, out)


@bench_app.command()
def stream(
    model: Model = "casa-tiny",
    frames: Annotated[int, typer.Option(help="Frames to watch.")] = 120,
    size: Annotated[int, typer.Option(help="Sides of a frame in px.")] = 336,
    tokens: Annotated[
        int | None, typer.Option(help="Say so many tokens of every frame, as the official table.")
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(help="How many live streams this machine keeps, up to so many.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of each of the sessions.")] = 2.0,
    max_text_tokens: MaxTextTokens = 0,
    seed: Seed = 0,
    device: Device = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="With --tokens: latency and memory, a PNG.", callback=writable)
    ] = None,
    peak: Annotated[
        bool, typer.Option(help="With --tokens: peak memory of each method, run once more in a process of its own.")
    ] = True,
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch frames with CASA and with insertion of the same size: latency and memory per frame, in one run.

    Example: casa bench stream casa-tiny --frames 256 --tokens 16
    """
    from casa.models.auto import load_pretrained
    from casa.provenance import provenance

    if tokens is not None and sessions is not None:
        raise UserError("--tokens and --sessions are two measurements; give one of them.")
    loaded, processor = load_pretrained(model, device)
    bound = max_text_tokens or None
    settings: dict[str, Any] = {"model": model, "size": size, "seed": seed}
    if tokens is None:
        settings["max_text_tokens"] = bound
    if sessions is not None:
        from casa.benchmarks.sessions import bench_sessions, sessions_summary, sessions_table, sustained, try_sessions

        loads = bench_sessions(loaded, processor, sessions, fps, size, max_text_tokens=bound, seed=seed)
        most, tried = sustained(loads), None
        if most:
            tried = try_sessions(loaded, processor, most, fps, size, max_text_tokens=bound, seed=seed)
        found, table = sessions_summary(loads, fps, tried), sessions_table(loads, fps, tried)
    elif tokens is not None:
        from casa.benchmarks.stream import handwriting
        from casa.benchmarks.turns import bench_turns, plot_turns, turns_summary, turns_table
        from casa.benchmarks.turns_memory import turns_peaks, with_peaks

        settings["tokens"] = tokens
        turns = bench_turns(loaded, processor, handwriting(seed, size), frames, tokens)
        found = turns_summary(turns)
        if peak:
            found = with_peaks(found, turns_peaks(model, device, frames, tokens, size, seed))
        table = turns_table(found)
        if plot is not None:
            plot_turns(turns, plot)
    else:
        from casa.benchmarks.stream import bench_stream, stream_table, summary

        rows = bench_stream(loaded, processor, frames, size, seed, bound)
        found = summary(rows)
        table = stream_table(found)
    record = {"bench": "stream", **settings, **provenance(str(loaded.device), model), **found}
    report(record, table, json, out)


for verb in (live, memory, neighbour, soak, train):
    bench_app.command()(verb)
