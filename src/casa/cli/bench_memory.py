"""`casa bench memory`: does captioning a long film take more host memory than a short one?"""

from typing import Annotated

import typer

from casa.cli.bench_options import Json, Model, Out, Seed, report
from casa.cli.sampling_options import MaxTextTokens


def memory(
    model: Model = "casa-tiny",
    minutes: Annotated[float, typer.Option(help="Length of the long film.")] = 60.0,
    short: Annotated[float, typer.Option(help="Length of the short film, in minutes.")] = 1.0,
    size: Annotated[int, typer.Option(help="Sides of a frame in px.")] = 112,
    fps: Annotated[float, typer.Option(help="Frames per second that are watched.")] = 2.0,
    film_fps: Annotated[float, typer.Option(help="Frames per second of both films, all of them decoded.")] = 25.0,
    max_text_tokens: MaxTextTokens = 0,
    seed: Seed = 0,
    json: Json = False,
    out: Out = None,
) -> None:
    """Caption a film of an hour and one of a minute, each in a process of its own; compare what these held at most.

    Without a bound on the text, its growth is in the difference; with one, it is not.

    Example: casa bench memory --minutes 60 --out memory.json
    """
    from casa.benchmarks.memory import bench_memory, memory_table
    from casa.provenance import provenance

    bound = max_text_tokens or None
    found = bench_memory(model, minutes, short, size, fps, film_fps, bound, seed=seed)
    settings = {"bench": "memory", "model": model, "size": size, "fps": fps, "film_fps": film_fps}
    settings |= {"max_text_tokens": bound, "seed": seed}
    report(settings | provenance(model=model) | found, memory_table(found), json, out)
