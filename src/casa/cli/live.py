"""What runs until it is stopped: `casa caption` says what is new in a film or a camera, `casa serve` serves a model."""

import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casa.cli.options import (
    Decay,
    Device,
    ImageCache,
    MaxNewTokens,
    MaxTextTokens,
    Model,
    NoRepeatNgramSize,
    Repetition,
    Seed,
    StopBias,
    Temperature,
    TopK,
    TopP,
    Weights,
    pairs,
    progress_line,
)
from casa.errors import UserError

if TYPE_CHECKING:
    from casa.captioning.batch import BatchRequest
    from casa.serving.server import Server

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def caption(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL] SOURCE", help="casa-tiny if left out.", show_default=False)
    ] = None,
    out: Annotated[list[Path] | None, typer.Option(help="Captions as .srt, .vtt or .jsonl; may be repeated.")] = None,
    batch: Annotated[
        Path | None, typer.Option(help="A manifest in place of the source: films and pictures, as JSON lines.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --batch: films watched side by side.")] = 8,
    cluster: Annotated[
        str | None, typer.Option(help="With --batch: a Ray cluster's address, auto, or local; without it, no Ray.")
    ] = None,
    burn: Annotated[Path | None, typer.Option(help="The video with captions drawn in (.mp4, .mkv).")] = None,
    track: Annotated[Path | None, typer.Option(help="The video file with captions as a text track.")] = None,
    fps: Annotated[float, typer.Option(help="Frames looked at per second.")] = 2.0,
    start: Annotated[float, typer.Option(help="Second to start at.")] = 0.0,
    end: Annotated[float | None, typer.Option(help="Second to stop at.")] = None,
    live: Annotated[
        bool | None, typer.Option("--live/--every-frame", help="Keep pace, or watch every frame; by the source.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask for; the model's own prompt if left out.")] = None,
    ask: Annotated[list[str] | None, typer.Option(help='SECOND="question", asked then; may be repeated.')] = None,
    hold: Annotated[float, typer.Option(help="Seconds a caption stays on screen, unless another comes.")] = 3.0,
    cue: Annotated[
        str | None, typer.Option(help="frame or said: when captions begin; if left out, said in live pace.")
    ] = None,
    source_options: Annotated[
        list[str] | None,
        typer.Option("--source-option", help="NAME=VALUE for FFmpeg, such as rtsp_transport=udp; may be repeated."),
    ] = None,
    reconnect_for: Annotated[
        float | None, typer.Option(help="Seconds to try a lost stream again; a live one for ever if left out.")
    ] = None,
    max_text_tokens: MaxTextTokens = 0,
    max_new_tokens: MaxNewTokens = 32,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition: Repetition = 0.0,
    decay: Decay = 0.9,
    no_repeat_ngram_size: NoRepeatNgramSize = 0,
    stop_bias: StopBias = 0.0,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run with the same --out was stopped.")
    ] = False,
    save_every: Annotated[float, typer.Option(help="Seconds between saved states; 0: after every frame.")] = 5.0,
    device: Device = "auto",
    weights: Weights = "own",
) -> None:
    """Caption a video file, a folder of pictures, camera:0, screen, an rtsp:// or http:// address, or - (a pipe).

    Prints each caption when it is said; files are valid at every moment. A file is watched frame by frame; a live
    source, or any with --live, at its own pace: the newest frame wins, and what was dropped is told at the end.

    Example: casa caption casa-tiny talk.mp4 --out talk.srt --burn talk-captioned.mp4

    Example: casa caption casa-tiny --batch manifest.jsonl --out captions.jsonl --resume
    """
    words = words or []
    if batch is not None:
        of_one = {"burn": burn, "track": track, "end": end, "live": live, "ask": ask, "cue": cue}
        of_one |= {"source_option": source_options, "reconnect_for": reconnect_for, "start": start or None}
        if given := [f"--{name.replace('_', '-')}" for name, value in of_one.items() if value is not None]:
            raise UserError(f"{', '.join(given)}: for one source; leave out with --batch.")
        if len(words) > 1 or len(out or ()) != 1:
            raise UserError("a batch takes one output: casa caption casa-tiny --batch manifest.jsonl --out all.jsonl")
    elif cluster is not None:
        raise UserError("--cluster is for --batch; add it, or leave --cluster out.")
    elif len(words) not in (1, 2):
        raise UserError("caption takes one video: casa caption casa-tiny talk.mp4 --out talk.srt")
    from casa.streaming import Sampling

    sampling = Sampling(temperature, top_k, top_p, stop_bias, repetition, decay, no_repeat_ngram_size)
    asked: dict[str, Any] = {"fps": fps, "prompt": prompt, "max_text_tokens": max_text_tokens or None, "seed": seed}
    asked |= {"max_new_tokens": max_new_tokens, "sampling": sampling, "resume": resume}
    if batch is not None:
        from casa.captioning.batch import BatchRequest

        many = BatchRequest(manifest=batch, out=(out or [])[0], batch_size=batch_size, **asked)
        _caption_batch(many, words[0] if words else "casa-tiny", device, weights, cluster)
        return
    name, source = words if len(words) == 2 else ("casa-tiny", words[0])
    from casa.captioning import CaptionReport, CaptionRequest, GracefulStop, TimedQuestion
    from casa.captioning import caption as run
    from casa.models.auto import load_pretrained

    request = CaptionRequest(
        source=source,
        out=tuple(out or ()),
        burn=burn,
        track=track,
        start=start,
        end=end,
        live=live,
        hold=hold,
        cue=cue,
        questions=tuple(TimedQuestion(*parse_question(written)) for written in ask or ()),
        save_every=save_every,
        source_options=pairs(source_options, "--source-option", "rtsp_transport=udp"),
        reconnect_for=reconnect_for,
        **asked,
    )
    report, whole = CaptionReport(), False
    with GracefulStop() as stop:
        try:
            report = run(
                request,
                name,
                lambda known: load_pretrained(known, device, weights),
                lambda at, text: print(f"{at:8.2f} s  {text}", flush=True),
                report=report,
                stop=stop,
            )
            whole = not report.stopped
        except KeyboardInterrupt:
            report.stopped = True
        finally:
            if report.began and (report.live or not (whole and report.is_clean)):
                print(report.sentence(), file=sys.stderr)
    if report.recording not in (None, burn):
        print(f"{burn} was there already; this video is {report.recording}.", file=sys.stderr)
    if report.stopped:
        raise typer.Exit(stop.exit_status)


def _caption_batch(request: "BatchRequest", model: str, device: str, weights: Weights, cluster: str | None) -> None:
    from casa.captioning.batch import caption_batch
    from casa.pipeline import load

    with progress_line("{}") as show:
        # a picture that two records ask about is looked at once
        loading = partial(load, device=device, weights=weights)
        report = caption_batch(request, model, loading, lambda told: show(told.sentence()), cluster)
    print(f"{report.sentence()}: {request.out}", file=sys.stderr)


def parse_question(written: str) -> tuple[float, str]:
    """ "12.5=What is on the left?" -> (12.5, "What is on the left?"). Raises UserError for anything else."""
    time, mark, text = written.partition("=")
    try:
        seconds = float(time)
    except ValueError:
        seconds = math.nan
    if not mark or not text.strip() or not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f'"{written}" is no question with its second; write it as 12.5="What is on the left?"')
    return seconds, text.strip()


def serve(
    model: Model = "casa-tiny",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    fps: Annotated[float, typer.Option(help="Frames looked at per second, unless a client asks otherwise.")] = 2.0,
    sessions: Annotated[
        int | None, typer.Option(min=1, help="Live streams at once; short for --limit sessions=...")
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="CASA_TOKEN", help="Asked of every client, if given.")] = None,
    allow_fetch: Annotated[
        bool, typer.Option("--allow-fetch", help="Chats may name pictures on the public internet.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name that the server goes by; may be given again.")
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of the limits; may be given again.")
    ] = None,
    image_cache: ImageCache = "memory",
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Processes that each hold the model, on Ray; one without Ray if left out.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --replicas: up to so many, as streams ask for.")
    ] = None,
    device: Device = "auto",
    weights: Weights = "own",
) -> None:
    """Serve live captions, an OpenAI-compatible chat, and a page to try both in.

    Example: casa serve casa-tiny --port 8000

    Example: casa serve ./my-casa --replicas 4
    """
    if max_replicas is not None and max_replicas < (replicas or max_replicas + 1):
        raise UserError("--max-replicas is --replicas or more; give both.")
    from casa.serving.limits import check_installed

    check_installed()
    from casa.models.auto import load_pretrained
    from casa.serving import Limits
    from casa.serving.app import create_app
    from casa.serving.server import Server

    limits = Limits.parse(limit or [])
    name = Path(model).resolve().name  # clients need not know where on this machine it lies
    is_open = host not in LOOPBACK and token is None
    if replicas is not None:
        check_installed("cluster")
        from casa.serving.deployment import ClusterSettings, on_this_machine, share_of_gpus

        most = max_replicas or replicas
        settings = ClusterSettings(
            model=model,
            replicas=replicas,
            max_replicas=max_replicas,
            token=token,
            hosts=tuple(allow_host or ()),
            fps=fps,
            allow_fetch=allow_fetch,
            image_cache=image_cache,
            limits=(*(limit or ()), *([] if sessions is None else [f"sessions={sessions}"])),
            device=device,
            weights=weights,
            gpus=share_of_gpus(device, most),
            threads=max(1, (os.cpu_count() or 1) // most),
        )
        with on_this_machine(settings) as app:
            _run(Server(app, host, port), name, is_open)
        return
    loaded, processor = load_pretrained(model, device, weights)
    app = create_app(
        loaded,
        processor,
        name=name,
        max_sessions=sessions,
        fps=fps,
        token=token,
        allow_fetch=allow_fetch,
        hosts=allow_host or [],
        limits=limits,
        measure_seconds=2.0,
        image_cache=image_cache,
    )
    _run(Server(app, host, port), name, is_open)


def _run(server: "Server", name: str, is_open: bool) -> None:
    if is_open:
        print("casa: whoever reaches this machine can use the server; --token asks for a token.", file=sys.stderr)
    print(f"{name} is at {server.url}  (Ctrl-C stops it)", flush=True)
    server.run()
