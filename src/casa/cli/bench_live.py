"""`casa bench live` and `casa bench neighbour`: a session by the real clock, and beside a process that computes."""

from typing import Annotated

import typer

from casa.cli.bench_options import Device, Json, Model, Out, Seed, report
from casa.cli.sampling_options import MaxTextTokens


def live(
    model: Model = "casa-tiny",
    minutes: Annotated[float, typer.Option(help="How long to watch; it takes that long.")] = 10.0,
    size: Annotated[int, typer.Option(help="Sides of a frame in px, a multiple of 28 from 224 to 448.")] = 448,
    fps: Annotated[float, typer.Option(help="Frames per second that are looked at.")] = 2.0,
    max_text_tokens: MaxTextTokens = 256,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch a film as it would come from a camera: lag, dropped frames and memory, minute by minute.

    Example: casa bench live --minutes 10 --size 448 --fps 2 --out live.json
    """
    from casa.benchmarks.live import bench_live, live_summary, live_table
    from casa.models.auto import load_pretrained
    from casa.provenance import provenance

    loaded, processor = load_pretrained(model, device)
    bound = max_text_tokens or None
    found = bench_live(loaded, processor, minutes, size, fps, bound, seed)
    settings = {"bench": "live", "model": model, "size": size, "seed": seed, "max_text_tokens": bound}
    record = settings | provenance(str(loaded.device), model) | live_summary(found, fps)
    report(record, f"{live_table(found)}\nkeeps pace: {record['keeps_pace']}", json, out)


def neighbour(
    model: Model = "casa-tiny",
    size: Annotated[int, typer.Option(help="Sides of a frame in px, a multiple of 28 from 224 to 448.")] = 336,
    rounds: Annotated[int, typer.Option(help="Turns of every way of choosing threads, quiet and busy.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of each turn.")] = 3.0,
    seed: Seed = 0,
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch frames on a quiet machine and beside a process that computes, by how threads are chosen.

    Takes about four minutes. Example: casa bench neighbour --out neighbour.json
    """
    from casa.benchmarks.neighbour import bench_neighbour, neighbour_summary, neighbour_table
    from casa.provenance import provenance

    found = neighbour_summary(bench_neighbour(model, size, rounds, seconds, seed))
    settings = {"bench": "neighbour", "model": model, "size": size, "rounds": rounds, "seconds": seconds, "seed": seed}
    report(settings | provenance("cpu", model) | found, neighbour_table(found), json, out)
