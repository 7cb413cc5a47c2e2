"""`casa serve`: a model behind HTTP and WebSocket, and a page that shows it live."""

import sys
from pathlib import Path
from typing import Annotated

import typer

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or casa-tiny.")] = "casa-tiny",
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
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Serve live captions, an OpenAI-compatible chat, and a page to try both in.

    Example: casa serve casa-tiny --port 8000
    """
    from casa.serving.extra import check_installed

    check_installed()
    from casa.models.auto import load_pretrained
    from casa.serving import Limits
    from casa.serving.app import create_app
    from casa.serving.server import Server

    limits = Limits.parse(limit or [])
    loaded, processor = load_pretrained(model, device)
    name = Path(model).resolve().name  # clients need not know where on this machine it lies
    app = create_app(
        loaded,
        processor,
        name=name,
        most_sessions=sessions,
        fps=fps,
        token=token,
        allow_fetch=allow_fetch,
        hosts=allow_host or [],
        limits=limits,
        measure_seconds=2.0,
    )
    server = Server(app, host, port)
    if host not in LOOPBACK and token is None:
        print("casa: whoever reaches this machine can use the server; --token asks for a token.", file=sys.stderr)
    print(f"{name} is at {server.url}  (Ctrl-C stops it)", flush=True)
    server.run()
