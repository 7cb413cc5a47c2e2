"""Live streams: the WebSocket /v1/streams, and their captions as files."""

import asyncio

from fastapi import APIRouter, Request, Response, WebSocket

from casa.serving.conversation import Conversation
from casa.serving.errors import error_response
from casa.serving.state import ServerState
from casa.serving.transcript import TYPES

router = APIRouter()


@router.websocket("/v1/streams")
async def streams(socket: WebSocket) -> None:
    await Conversation(socket, socket.app.state.casa).run()


@router.get("/v1/streams/{stream}/captions.{kind}")
async def captions(request: Request, stream: str, kind: str) -> Response:
    """What a stream has said until now; a stream's name is known only to who opened it."""
    state: ServerState = request.app.state.casa
    transcript = state.shelf.find(stream)
    if transcript is None:
        return error_response(404, "there is no such stream, or it ended too long ago.")
    if kind not in TYPES:
        return error_response(404, f"captions come as {', '.join(TYPES)}.")
    text = await asyncio.to_thread(transcript.file, kind)
    return Response(
        text.encode(),
        media_type=f"{TYPES[kind]}; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="captions.{kind}"', "Cache-Control": "no-store"},
    )
