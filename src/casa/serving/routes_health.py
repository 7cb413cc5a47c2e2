"""Whether the server lives, and its figures for Prometheus."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from casa.serving.state import ServerState

TEXT = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the model's thread lives, 503 afterwards."""
    state: ServerState = request.app.state.casa
    alive = state.worker.is_alive
    about = {"model": state.name, "sessions": state.worker.streams, "most_sessions": state.worker.engine.most_sessions}
    return JSONResponse({"status": "ok" if alive else "failed", **about}, 200 if alive else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    state: ServerState = request.app.state.casa
    gauges = {
        "sessions": state.worker.streams,
        "connections": state.connections,
        "running_chats": state.line.served,
        "waiting_chats": state.line.waiting,
        "cache_bytes": state.worker.cache_bytes(),
    }
    return Response(state.metrics.text(gauges), media_type=TEXT)
