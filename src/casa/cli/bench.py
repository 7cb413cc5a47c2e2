"""`casa bench`: measurements, side by side in one run."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casa.cli.options import Device, Json, MaxTextTokens, Model, Out, numbers, writable
from casa.errors import UserError

if TYPE_CHECKING:
    from casa.benchmarks.harness import Benchmark

Seed = Annotated[int, typer.Option(help="Another seed draws other films, samples and weights.")]
Size = Annotated[int, typer.Option(help="Sides of a frame in px.")]
Against = Annotated[Path | None, typer.Option(help="Compare every figure with an earlier record, a .json file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw memory and latency, as a PNG.", callback=writable)]

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
    seed: Seed = 0,
    against: Against = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Time the attention implementations beside one dense mask, forward and forward + backward.

    Example: casa bench attention --repeats 9 --json
    """
    from casa.benchmarks.attention import bench_attention
    from casa.models.auto import pick_device

    names = None if impls is None else [name.strip() for name in impls.split(",")]
    _show(bench_attention(impls=names, device=pick_device(device), repeats=repeats, seed=seed), json, out, against)


@bench_app.command()
def stream(
    model: Model = "casa-tiny",
    frames: Annotated[int, typer.Option(help="Frames to watch.")] = 120,
    size: Size = 336,
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
    plot: Plot = None,
    peak: Annotated[
        bool, typer.Option(help="With --tokens: peak memory of each method, run once more in a process of its own.")
    ] = True,
    against: Against = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch frames with CASA and with insertion of the same size: latency and memory per frame, in one run.

    Example: casa bench stream casa-tiny --frames 256 --tokens 16
    """
    from casa.benchmarks.live import bench_sessions
    from casa.benchmarks.stream import bench_stream, bench_turns

    if tokens is not None and sessions is not None:
        raise UserError("--tokens and --sessions are two measurements; give one of them.")
    if plot is not None and tokens is None:
        raise UserError("--plot is for --tokens; add it, or leave --plot out.")
    bound = max_text_tokens or None
    if sessions is not None:
        found = bench_sessions(model, sessions, fps, size, bound, seed, device)
    elif tokens is not None:
        found = bench_turns(model, frames, tokens, size, seed, device, peak)
    else:
        found = bench_stream(model, frames, size, bound, seed, device)
    _show(found, json, out, against, plot)


@bench_app.command()
def live(
    model: Model = "casa-tiny",
    minutes: Annotated[float, typer.Option(help="How long to watch; it takes that long.")] = 10.0,
    size: Size = 448,
    fps: Annotated[float, typer.Option(help="Frames per second that are looked at.")] = 2.0,
    max_text_tokens: MaxTextTokens = 256,
    seed: Seed = 0,
    device: Device = "auto",
    against: Against = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch a film as it would come from a camera: lag, dropped frames and memory, minute by minute.

    Example: casa bench live --minutes 10 --size 448 --fps 2 --out live.json
    """
    from casa.benchmarks.live import bench_live

    _show(bench_live(model, minutes, size, fps, max_text_tokens or None, seed, device), json, out, against)


@bench_app.command()
def memory(
    model: Model = "casa-tiny",
    minutes: Annotated[float, typer.Option(help="Length of the long film.")] = 60.0,
    short: Annotated[float, typer.Option(help="Length of the short film, in minutes.")] = 1.0,
    size: Size = 112,
    fps: Annotated[float, typer.Option(help="Frames per second that are watched.")] = 2.0,
    film_fps: Annotated[float, typer.Option(help="Frames per second of both films, all of them decoded.")] = 25.0,
    max_text_tokens: MaxTextTokens = 0,
    seed: Seed = 0,
    against: Against = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Caption a film of an hour and one of a minute, each in a process of its own; compare what these held at most.

    Without a bound on the text, its growth is in the difference; with one, it is not.

    Example: casa bench memory --minutes 60 --out memory.json
    """
    from casa.benchmarks.soak import bench_memory

    _show(bench_memory(model, minutes, short, size, fps, film_fps, max_text_tokens or None, seed), json, out, against)


@bench_app.command()
def neighbour(
    model: Model = "casa-tiny",
    size: Size = 336,
    rounds: Annotated[int, typer.Option(help="Turns of every way of choosing threads, quiet and busy.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of each turn.")] = 3.0,
    seed: Seed = 0,
    against: Against = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch frames on a quiet machine and beside a process that computes, by how threads are chosen.

    Takes about six minutes. Example: casa bench neighbour --out neighbour.json
    """
    from casa.benchmarks.neighbour import bench_neighbour

    _show(bench_neighbour(model, size, rounds, seconds, seed), json, out, against)


@bench_app.command()
def soak(
    model: Model = "casa-tiny",
    frames: Annotated[int, typer.Option(help="Frames to watch.")] = 100_000,
    max_text_tokens: MaxTextTokens = 128,
    size: Size = 112,
    block: Annotated[int, typer.Option(help="Frames in a row of the result.")] = 1000,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the soak that was writing --out.")] = False,
    plot: Plot = None,
    against: Against = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Watch a hundred thousand frames in one session; memory and latency, block by block, written as it goes.

    Example: casa bench soak --frames 100000 --max-text-tokens 128 --size 112 --out soak.json
    """
    from casa.benchmarks.soak import bench_soak

    if resume and out is None:
        raise UserError("--resume goes on with a soak that was writing --out; name that file.")
    state = out.with_name(out.name + ".session") if out is not None else None
    found = None
    for found in bench_soak(model, frames, max_text_tokens or None, size, block, seed, device, state, resume):
        if out is not None:
            found.write(out)
        if plot is not None:
            found.plot(plot)
    assert found is not None
    _show(found, json, None, against)


@bench_app.command()
def train(
    parts: Annotated[
        str, typer.Option(help="What to measure, with commas: memory, throughput, packing.")
    ] = "memory,throughput,packing",
    shape: Annotated[str, typer.Option(help="tiny, or a published shape such as helium-2b or qwen2_5-vl-3b.")] = "tiny",
    image_tokens: Annotated[
        str, typer.Option(help="Image tokens of the packed row whose memory is measured, with commas.")
    ] = "256,1024,4096",
    methods: Annotated[
        str,
        typer.Option(
            help="Whose memory, with commas: casa, before, replace, update_images, cross_attention, insertion."
        ),
    ] = "casa,insertion",
    text_tokens: Annotated[int, typer.Option(help="Text tokens of that row.")] = 256,
    samples: Annotated[int, typer.Option(help="Samples of that row, one picture each.")] = 4,
    checkpoint_blocks: Annotated[
        bool, typer.Option("--checkpoint-blocks", help="Run blocks again in the backward pass.")
    ] = False,
    frozen_tower: Annotated[bool, typer.Option("--frozen-tower", help="Train all but the image encoder.")] = False,
    drawn: Annotated[int, typer.Option(help="Samples to go through packed and padded.")] = 64,
    rounds: Annotated[int, typer.Option(help="Passes over them; medians are printed.")] = 3,
    seed: Seed = 0,
    device: Device = "auto",
    against: Against = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Memory of a training step beside insertion, samples a second packed and padded, how full packs are.

    Example: casa bench train --out train.json

    Example: casa bench train --parts memory --shape helium-2b --text-tokens 2048 --image-tokens 5120,20480
    """
    from casa.benchmarks.train import StepCase, bench_train
    from casa.models.auto import pick_device

    where = pick_device(device)
    cases = [
        StepCase(name.strip(), count, text_tokens, samples, shape, where, checkpoint_blocks, frozen_tower, seed)
        for name in methods.split(",")
        for count in numbers(image_tokens, "--image-tokens")
    ]
    wanted = [part.strip() for part in parts.split(",")]
    _show(bench_train(wanted, cases, drawn, rounds, shape, where, seed), json, out, against)


def _show(found: "Benchmark", as_json: bool, out: Path | None, against: Path | None, plot: Path | None = None) -> None:
    if out is not None:
        found.write(out)
    if plot is not None:
        found.plot(plot)
    print(json_module.dumps(found.record(), indent=2) if as_json else found.table)
    if against is not None and not as_json:
        print(f"\n{found.compare(against)}")
