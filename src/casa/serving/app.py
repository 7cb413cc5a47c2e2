"""create_app: one model behind HTTP and WebSocket, with a page that shows it live."""

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.serving import routes_chat, routes_health, routes_page, routes_streams
from casa.serving.baseline import InsertionCosts
from casa.serving.errors import error_response
from casa.serving.guard import Guard
from casa.serving.limits import Limits
from casa.serving.load import probe
from casa.serving.pictures import keep_pillow_quiet
from casa.serving.state import ServerState
from casa.serving.transcript import Shelf
from casa.serving.worker import Worker
from casa.streaming import StreamingEngine

log = logging.getLogger("casa.serving")


def create_app(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    *,
    name: str = "casa-tiny",
    most_sessions: int | None = None,
    fps: float = 2.0,
    token: str | None = None,
    allow_fetch: bool = False,
    hosts: Iterable[str] = (),
    measure_seconds: float = 0.0,
    limits: Limits | None = None,
) -> FastAPI:
    """The server as an ASGI application; `server.Server` runs it, with limits of the transport too.

    name: how clients call the model. most_sessions: live streams at once, in place of `limits.sessions`; more are
    refused. fps: of a stream that does not say. token: asked of everyone if given. allow_fetch: pictures of chats may
    be addresses on the public internet. hosts: names that the server goes by, besides addresses and localhost; with a
    token, any name will do.
    measure_seconds: spent at start on how insertion's time grows (see `baseline`), and twice as many on what the
    machine sustains (see `load`); 0: the page shows insertion's memory alone, and everybody is let in until streams
    have been watched.
    limits: everything else. The model belongs to the app as long as it runs: nothing else may call it.
    Raises UserError for an fps out of bounds or an empty token.
    """
    allowed = limits if limits is not None else Limits()
    if most_sessions is not None:
        allowed = replace(allowed, sessions=most_sessions)
    if not 0 < fps <= allowed.frames_per_second:
        raise UserError(f"fps is {fps}; give a number above 0, up to {allowed.frames_per_second:g}.")
    if token is not None and not token.strip():
        raise UserError("the token is empty; give one of some length, or none.")
    engine = StreamingEngine(model, processor, most_sessions=allowed.sessions)
    compares = model.fusion.method != "insertion"
    state = ServerState(
        name=name,
        model=model,
        processor=processor,
        limits=allowed,
        fps=fps,
        token=token,
        allow_fetch=allow_fetch,
        hosts=frozenset(host.lower() for host in hosts),
        worker=Worker(engine, allowed),
        shelf=Shelf(allowed.ended_streams, allowed.ended_seconds),
        costs=InsertionCosts(model, processor) if compares else None,
    )

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        keep_pillow_quiet()
        state.worker.start()
        if measure_seconds > 0:
            state.worker.call(lambda: _probe(state, measure_seconds))
        if state.costs is not None and measure_seconds > 0 and not state.costs.is_measured:
            costs = state.costs
            # among the first jobs: nobody's stream waits for it later
            state.worker.call(lambda: _measure(costs, measure_seconds))
        try:
            yield
        finally:
            state.close()

    app = FastAPI(
        title="casa", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.casa = state
    for part in (routes_streams, routes_chat, routes_health, routes_page):
        for route in part.router.routes:
            # whatever can be had can be asked about; the transport leaves the body out
            if isinstance(route, Route) and route.methods is not None and "GET" in route.methods:
                route.methods.add("HEAD")
        app.include_router(part.router)
    app.add_middleware(Guard, state=state)  # type: ignore[arg-type]

    @app.exception_handler(HTTPException)
    async def wrong_path(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, f"{error.detail}.")

    return app


def _probe(state: ServerState, seconds: float) -> None:
    try:
        probe(state.worker.load, state.model, state.processor, 2 * seconds)
    except Exception:  # what streams cost is measured while they are watched, too
        log.exception("what the machine sustains could not be tried")


def _measure(costs: InsertionCosts, seconds: float) -> None:
    try:
        costs.measure(seconds)
    except Exception:  # the page does without this curve
        log.exception("insertion's time could not be measured")
