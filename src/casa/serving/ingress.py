"""create_ingress: today's API in front of many replicas, which are reached through it alone.

Streams stay with a replica (`relay`). A chat goes where its first picture's keys and values are, if it has one, else to
the least busy replica; where that has no room, to the next.
"""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse

from casa.serving.admission import AppState, error_response
from casa.serving.chat import RequestError
from casa.serving.limits import Limits
from casa.serving.relay import WAIT_SECONDS, Relay
from casa.serving.replicas import Replicas, Report
from casa.serving.routes import METRICS_TYPE, application, read_body, state_of

FULL = (429, 503)
PASSED = ("content-type", "retry-after", "cache-control", "x-accel-buffering")  # headers of a replica's answer

router = APIRouter()


@dataclass(kw_only=True)
class IngressState(AppState):
    """What all routes of an ingress share. secret: the token of its replicas."""

    replicas: Replicas
    secret: str
    client: httpx.AsyncClient


def create_ingress(
    replicas: Replicas,
    secret: str,
    *,
    token: str | None = None,
    hosts: Iterable[str] = (),
    limits: Limits | None = None,
) -> FastAPI:
    """The ingress as an ASGI application; `server.Server` runs it, as it runs the app of one machine.

    Args:
        replicas: Those that it passes on to; followed as long as the app runs.
        secret: The token that they ask for.
        token: Asked of everyone if given.
        hosts: Names that the server goes by, besides addresses and localhost; with a token, any name will do.
        limits: Those of connections, requests, bodies and ended streams; the others are the replicas'.
    """
    allowed = limits if limits is not None else Limits()
    state = IngressState(
        limits=allowed,
        token=token,
        hosts=frozenset(host.lower() for host in hosts),
        replicas=replicas,
        secret=secret,
        client=httpx.AsyncClient(timeout=httpx.Timeout(10.0, read=None), trust_env=False),
    )

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        replicas.start()
        try:
            yield
        finally:
            replicas.stop()
            await state.client.aclose()

    return application(state, router, running)


State = Annotated[IngressState, Depends(state_of)]


@router.websocket("/v1/streams")
async def streams(socket: WebSocket, state: State) -> None:
    await Relay(socket, state).run()


@router.get("/health")
async def health(state: State) -> Response:
    """200 while there is a replica, or one may come; the sums of what they say."""
    about = state.replicas.totals()
    return JSONResponse({"status": "ok" if about["replicas"] else "waiting", **about})


@router.get("/metrics")
async def metrics(state: State) -> Response:
    gauges = {**state.replicas.totals(), "connections": state.connections}
    return Response(state.metrics.text(gauges), media_type=METRICS_TYPE)


@router.post("/v1/chat/completions")
async def chat(request: Request, state: State) -> Response:
    """Passed on, whole or event by event."""
    state.metrics.count("chats")
    try:
        body = await read_body(request, state.limits.body_bytes, state.limits.body_seconds)
    except RequestError as error:
        return error_response(error.status, str(error), error.param, error.code, close=True)
    await state.replicas.some(WAIT_SECONDS)
    picture = first_picture(body)
    line = state.replicas.least_busy() if picture is None else state.replicas.for_picture(picture)
    return await _passed(state, line, "POST", request, body)


@router.get("/v1/models")
@router.get("/v1/models/{name:path}")
@router.get("/about.json")
async def about(request: Request, state: State, name: str = "") -> Response:
    """What any replica says of the model. Whether a token is asked for, the ingress knows."""
    await state.replicas.some(WAIT_SECONDS)
    answer = await _passed(state, state.replicas.least_busy(), "GET", request, b"")
    if request.url.path != "/about.json" or not isinstance(answer, StreamingResponse):
        return answer
    facts = json.loads(b"".join([part async for part in answer.body_iterator]))  # type: ignore[misc]
    return JSONResponse({**facts, "needs_token": state.token is not None}, headers={"Cache-Control": "no-store"})


def first_picture(body: bytes) -> bytes | None:
    """The address of a chat's first picture, its data most often; None without one. What it is the replica judges."""
    try:
        messages = json.loads(body)["messages"]
        parts = (part for message in messages if isinstance(message["content"], list) for part in message["content"])
        found: Any = next(part["image_url"] for part in parts if part.get("type") == "image_url")
        address = found["url"] if isinstance(found, dict) else found
        return address.encode("utf-8", "replace")
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration, RecursionError):
        return None


async def _passed(state: IngressState, line: list[Report], method: str, request: Request, body: bytes) -> Response:
    """The answer of the first replica in line that can be reached and has room; else that of the last one."""
    headers = {"Authorization": f"Bearer {state.secret}", "Content-Type": "application/json"}
    refused: Response = error_response(503, "there is no replica; try again later.", code="busy", close=True)
    for replica in line:
        asked = state.client.build_request(
            method, f"http://{replica.address}{request.url.path}", content=body, headers=headers
        )
        try:
            answer = await state.client.send(asked, stream=True)
        except httpx.HTTPError:
            state.replicas.lost(replica.name)
            continue
        told = {name: answer.headers[name] for name in PASSED if name in answer.headers}
        if answer.status_code in FULL:
            refused = Response(await answer.aread(), answer.status_code, told)
            continue
        return StreamingResponse(_body(answer), answer.status_code, told)
    return refused


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    """What a replica says, as it comes. Where that dies, the client's connection breaks off as well."""
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()
