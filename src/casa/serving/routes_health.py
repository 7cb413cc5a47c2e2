"""Whether the server lives, and its figures for Prometheus."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from casa.serving.load import REMEDY
from casa.serving.state import ServerState

TEXT = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the model's thread lives, 503 afterwards. Waits for nothing that the model does, and for no place."""
    state: ServerState = request.app.state.casa
    worker = state.worker
    alive, over = worker.is_alive, worker.load.is_over
    about = {
        "status": "failed" if not alive else "overloaded" if over else "ok",
        "model": state.name,
        "sessions": worker.streams,
        "most_sessions": worker.engine.most_sessions,
        "chats": {"running": state.line.served, "waiting": state.line.waiting},
        "load": worker.load.report(worker.asked()),
    }
    if over:
        about["message"] = f"this machine is too slow for what its streams ask for: {REMEDY}."
    return JSONResponse(about, 200 if alive else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    state: ServerState = request.app.state.casa
    load = state.worker.load.report(state.worker.asked())
    gauges = {
        "sessions": state.worker.streams,
        "connections": state.connections,
        "running_chats": state.line.served,
        "waiting_chats": state.line.waiting,
        "cache_bytes": state.worker.cache_bytes(),
        "sustained_fps": load["sustained_fps"] or 0,
        "asked_fps": load["asked_fps"] or 0,
    }
    return Response(state.metrics.text(gauges), media_type=TEXT)
