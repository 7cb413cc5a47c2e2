"""The live page and the film that comes with it: these files and no others can be had."""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from casa.serving.state import ServerState
from casa.streaming import forgets

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

router = APIRouter()


@router.get("/about.json")
async def about(request: Request) -> Response:
    """What the page needs to know before it has a stream."""
    state: ServerState = request.app.state.casa
    facts = {
        "model": state.name,
        "fps": state.fps,
        "prompt": state.processor.stream_prompt,
        "most_fps": state.limits.frames_per_second,
        "frame_bytes": state.limits.frame_bytes,
        "text_tokens": state.limits.text_tokens if forgets(state.model) else None,
        "most_text_tokens": state.limits.most_text_tokens,
        "needs_token": state.token is not None,
    }
    return JSONResponse(facts, headers={"Cache-Control": "no-store"})


@router.get("/{name}")
async def file(request: Request, name: str) -> Response:
    if name not in FILES:
        return Response("There is no such page.", 404, media_type="text/plain")
    path, kind = FILES[name]
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})


@router.get("/")
async def page(request: Request) -> Response:
    return await file(request, "")
