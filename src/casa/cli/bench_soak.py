"""`casa bench soak`: does a session stay the same size, and as fast, for ever?"""

from pathlib import Path
from typing import Annotated

import typer

from casa.cli.bench_options import Device, Json, Model, Out, Seed, report, writable
from casa.cli.sampling_options import MaxTextTokens


def soak(
    model: Model = "casa-tiny",
    frames: Annotated[int, typer.Option(help="Frames to watch.")] = 100_000,
    max_text_tokens: MaxTextTokens = 128,
    size: Annotated[int, typer.Option(help="Sides of a frame in px.")] = 112,
    block: Annotated[int, typer.Option(help="Frames in a row of the result.")] = 1000,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the soak that was writing --out.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Memory and latency over frames, a PNG.", callback=writable)] = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch a hundred thousand frames in one session; memory and latency, block by block, written as it goes.

    Example: casa bench soak --frames 100000 --max-text-tokens 128 --size 112 --out soak.json
    """
    from casa.benchmarks.soak import allowed_bytes, film, plot_soak, soak_summary, soak_table, write_soak
    from casa.benchmarks.soak import soak as run
    from casa.errors import UserError
    from casa.models.auto import load_pretrained
    from casa.provenance import provenance
    from casa.streaming import StreamingSession

    if resume and out is None:
        raise UserError("--resume goes on with a soak that was writing --out; name that file.")
    loaded, processor = load_pretrained(model, device)
    state = out.with_name(out.name + ".session") if out is not None else None
    settings = {
        "bench": "soak",
        "model": model,
        "size": size,
        "seed": seed,
        "max_text_tokens": max_text_tokens or None,
        "max_new_tokens": 16,
        "block": block,
    }
    if resume and state is not None and state.exists():
        session = StreamingSession.load(state, loaded, processor)
        if session.notes.get("settings") != settings:
            raise UserError(f"{state} is of a soak with other settings; give those, or leave out --resume.")
    else:
        session = StreamingSession(loaded, processor, max_text_tokens=max_text_tokens or None, max_new_tokens=16)
        session.notes["settings"] = settings
    record = settings | provenance(str(loaded.device), model)
    blocks, allowed = [], None
    for blocks in run(session, film(size, seed), frames, block=block, state=state):
        allowed = allowed_bytes(session, asked=False)
        if out is not None:
            write_soak(out, record, blocks, allowed)
        if plot is not None:
            plot_soak(blocks, plot)
    if not blocks:
        raise UserError(f"that soak has seen {session.frames} frames already; raise --frames.")
    if state is not None:
        state.unlink(missing_ok=True)
    found = soak_summary(blocks, allowed)
    report(record | found, soak_table(found), json, None)
