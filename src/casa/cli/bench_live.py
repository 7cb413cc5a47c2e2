"""`casa bench live`: does a session keep pace with a stream, by the real clock?"""

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
    from casa.models.at_hand import load_at_hand
    from casa.provenance import provenance

    loaded, processor = load_at_hand(model, device)
    bound = max_text_tokens or None
    found = bench_live(loaded, processor, minutes, size, fps, bound, seed)
    settings = {"bench": "live", "model": model, "size": size, "seed": seed, "max_text_tokens": bound}
    record = settings | provenance(str(loaded.device), model) | live_summary(found, fps)
    report(record, f"{live_table(found)}\nkeeps pace: {record['keeps_pace']}", json, out)
