"""What the server of one machine and an ingress both have: the page, captions as files, and how their apps are made."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Route

from casa.serving.admission import AppState, Guard, error_response
from casa.serving.chat import RequestError
from casa.serving.live import TYPES

PAGE = Path(__file__).resolve().parent / "page"
FILM = Path(__file__).resolve().parent.parent / "assets" / "demo" / "clip.mp4"
SCRIPTS = ("app", "dom", "plot", "source", "theme", "view")
FILES = {
    "": (PAGE / "index.html", "text/html"),
    **{f"{part}.js": (PAGE / f"{part}.js", "text/javascript") for part in SCRIPTS},
    "style.css": (PAGE / "style.css", "text/css"),
    "icon.svg": (PAGE / "icon.svg", "image/svg+xml"),
    "film.mp4": (FILM, "video/mp4"),
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter()


async def state_of(connection: HTTPConnection) -> Any:
    """What all routes of the app share."""
    return connection.app.state.casa


def application(
    state: AppState, routes: APIRouter, running: Callable[[FastAPI], AbstractAsyncContextManager[None]]
) -> FastAPI:
    """An app with routes of its own and those of all, behind the guard. running: what is there as long as it runs."""
    app = FastAPI(
        title="casa", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.casa = state
    for part in (routes, router):
        for route in part.routes:
            # whatever can be had can be asked about; the transport leaves the body out
            if isinstance(route, Route) and route.methods is not None and "GET" in route.methods:
                route.methods.add("HEAD")
        app.include_router(part)
    app.add_middleware(Guard, state=state)

    @app.exception_handler(HTTPException)
    async def wrong_path(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, f"{error.detail}.")

    return app


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The body, refused as soon as it is known to be too large. Raises RequestError."""
    too_large = RequestError(f"the body has more than {max_bytes} bytes; send smaller pictures.", status=413)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time.", status=408) from error
    return bytes(body)


@router.get("/v1/streams/{stream}/captions.{kind}")
async def captions(state: Annotated[AppState, Depends(state_of)], stream: str, kind: str) -> Response:
    """What a stream has said until now, as a file; a stream's name is known only to who opened it."""
    transcript = state.transcripts.find(stream)
    if transcript is None:
        return error_response(404, "there is no such stream, or it ended too long ago.")
    if kind not in TYPES:
        return error_response(404, f"captions come as {', '.join(TYPES)}.")
    text = await asyncio.to_thread(transcript.file, kind)
    headers = {"Content-Disposition": f'attachment; filename="captions.{kind}"', "Cache-Control": "no-store"}
    return Response(text.encode(), media_type=f"{TYPES[kind]}; charset=utf-8", headers=headers)


@router.get("/")
@router.get("/{name}")
async def file(name: str = "") -> Response:
    """The live page, and the film that comes with it: these files and no others can be had."""
    if name not in FILES:
        return Response("There is no such page.", 404, media_type="text/plain")
    path, kind = FILES[name]
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})
