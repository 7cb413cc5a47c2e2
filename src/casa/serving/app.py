"""create_app: one model behind HTTP and WebSocket, with a page that shows it live; and its own routes."""

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor, ImageCache
from casa.serving.admission import POLL_SECONDS, ServerState, error_response
from casa.serving.baseline import InsertionCosts
from casa.serving.chat import ChatRequest, RequestError, parse_body, read_chat
from casa.serving.completion import ChatDelta, Completion
from casa.serving.handover import Handover
from casa.serving.limits import Limits
from casa.serving.metrics import REMEDY, probe
from casa.serving.pictures import keep_pillow_quiet
from casa.serving.routes import METRICS_TYPE, application, read_body, state_of
from casa.serving.streams import StreamHandler
from casa.serving.worker import STOPPING, Worker
from casa.streaming import StreamingEngine, supports_text_bound

CHUNK = "chat.completion.chunk"
OBFUSCATED = 64  # characters: the sizes of obfuscated events are multiples of it, the head apart

log = logging.getLogger("casa.serving")
router = APIRouter()


def create_app(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    *,
    name: str = "casa-tiny",
    max_sessions: int | None = None,
    fps: float = 2.0,
    token: str | None = None,
    allow_fetch: bool = False,
    hosts: Iterable[str] = (),
    measure_seconds: float = 0.0,
    limits: Limits | None = None,
    image_cache: ImageCache | str | os.PathLike[str] | None = "memory",
    handover: Handover | None = None,
) -> FastAPI:
    """The server as an ASGI application; `server.Server` runs it, with limits of the transport too.

    Args:
        model: belongs to the app as long as it runs: nothing else may call it.
        processor: the model's own.
        name: how clients call the model.
        max_sessions: live streams at once, in place of `limits.sessions`; more are refused.
        fps: of a stream that does not say.
        token: asked of everyone if given.
        allow_fetch: pictures of chats may be addresses on the public internet.
        hosts: names that the server goes by, besides addresses and localhost; with a token, any name will do.
        measure_seconds: spent at start on how insertion's time grows (see `baseline`), and twice as many on what the
            machine sustains (see `metrics`); 0: the page shows insertion's memory alone, and everybody is let in until
            streams have been watched.
        limits: everything else.
        image_cache: where keys and values of chats' pictures are kept for another question: "memory", a folder, which
            other servers share, an `ImageCache`, or "off".
        handover: of a replica behind an ingress, where its streams' states lie.

    Raises:
        UserError: fps is out of bounds, or the token is empty.
    """
    allowed = limits if limits is not None else Limits()
    if max_sessions is not None:
        allowed = replace(allowed, sessions=max_sessions)
    if not 0 < fps <= allowed.frames_per_second:
        raise UserError(f"fps is {fps}; give a number above 0, up to {allowed.frames_per_second:g}.")
    if token is not None and not token.strip():
        raise UserError("the token is empty; give one of some length, or none.")
    engine = StreamingEngine(model, processor, max_sessions=allowed.sessions, max_questions=allowed.questions)
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
        costs=InsertionCosts(model, processor) if model.fusion.method != "insertion" else None,
        images=ImageCache.named(image_cache),
        handover=handover,
    )

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        keep_pillow_quiet()
        state.loop = asyncio.get_running_loop()
        state.worker.start()
        if measure_seconds > 0:
            # among the first jobs: nobody's stream waits for it later
            state.worker.call(lambda: _measure(state, measure_seconds))
        try:
            yield
        finally:
            state.close()

    return application(state, router, running)


def _measure(state: ServerState, seconds: float) -> None:
    """What the machine sustains, and what insertion would cost here."""
    try:
        probe(state.worker.load, state.model, state.processor, 2 * seconds)
        if state.costs is not None and not state.costs.is_measured:
            state.costs.measure(seconds)
    except Exception:  # what streams cost is measured while they are watched, too; the page does without a curve
        log.exception("what the machine sustains could not be measured")
    state.measured.set()


State = Annotated[ServerState, Depends(state_of)]


@router.websocket("/v1/streams")
async def streams(socket: WebSocket, state: State) -> None:
    await StreamHandler(socket, state).run()


@router.get("/health")
async def health(state: State) -> Response:
    """200 while the model's thread lives, 503 afterwards. Waits for nothing that the model does, and for no place."""
    worker = state.worker
    alive, over = worker.is_alive, worker.load.recent.is_too_much
    about = {
        "status": "failed" if not alive else "overloaded" if over else "ok",
        "model": state.name,
        "sessions": worker.streams,
        "max_sessions": worker.engine.max_sessions,
        "chats": {"running": state.chats.served, "waiting": state.chats.waiting},
        "load": worker.load.report(worker.asked()),
    }
    if over:
        about["message"] = f"this machine is too slow for what its streams ask for: {REMEDY}."
    return JSONResponse(about, 200 if alive else 503)


@router.get("/metrics")
async def metrics(state: State) -> Response:
    """All figures, for Prometheus."""
    worker = state.worker
    load = worker.load.report(worker.asked())
    gauges = {
        "sessions": worker.streams,
        "connections": state.connections,
        "running_chats": state.chats.served,
        "waiting_chats": state.chats.waiting,
        "cache_bytes": worker.cache_bytes(),
        "sustained_fps": load["sustained_fps"] or 0,
        "asked_fps": load["asked_fps"] or 0,
    }
    return Response(state.metrics.text(gauges), media_type=METRICS_TYPE)


@router.get("/v1/models")
async def models(state: State) -> dict[str, Any]:
    return {"object": "list", "data": [_model(state)]}


@router.get("/v1/models/{name:path}")
async def model(state: State, name: str) -> Response:
    if name != state.name:
        return error_response(404, f"there is no such model here, only {state.name!r}.", "model", "model_not_found")
    return JSONResponse(_model(state))


def _model(state: ServerState) -> dict[str, Any]:
    return {"id": state.name, "object": "model", "created": 0, "owned_by": "casa"}


@router.post("/v1/chat/completions")
async def chat(request: Request, state: State) -> Response:
    """A chat completion as the OpenAI interface has them, whole or as server-sent events."""
    queue = state.chats
    if (place := queue.join()) is None:
        waits = f"{queue.served} chats are under way and {queue.here - queue.served} wait; try again later."
        return error_response(429, waits, code="busy", close=True, retry_seconds=queue.expected_seconds())
    begun = False
    try:
        body = await read_body(request, state.limits.body_bytes, state.limits.body_seconds)
        if not await queue.turn(place, request.is_disconnected):
            raise ClientDisconnect

        def read() -> ChatRequest:
            return read_chat(parse_body(body, state.limits), state.name, state.limits, state.allow_fetch)

        wanted = await asyncio.get_running_loop().run_in_executor(state.chat_threads, read)
        answer = _ChatAnswer(state, wanted)
        state.metrics.count("chats")
        # errors of the prompt come before the first piece, and then as an error of their own
        first = await answer.next(request)
        if not wanted.stream:
            return JSONResponse(await answer.whole(first, request))
        begun = True
        return _Events(answer.events(first), lambda: (answer.cancel(), queue.leave(place)))
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    except Exception as error:
        state.metrics.count("errors")
        if isinstance(error, RequestError):
            close = error.status in (408, 413)
            return error_response(error.status, str(error), error.param, error.code, close=close)
        if isinstance(error, UserError):
            return error_response(503 if error is STOPPING else 400, str(error))
        return error_response(500, f"the model failed at this ({type(error).__name__}).")
    finally:
        if not begun:
            queue.leave(place)


class _Events(StreamingResponse):
    """Server-sent events; `end` is called whatever happens, also if the client goes before the first one."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], object]) -> None:
        unbuffered = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=unbuffered)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # a reader that does not read is cut off by its connection (see `server`), which ends `send`
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


class _ChatAnswer:
    """A completion under way, as its route sees it."""

    def __init__(self, state: ServerState, wanted: ChatRequest) -> None:
        self._wanted = wanted
        self._about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": state.name}
        self._deltas: asyncio.Queue[ChatDelta] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_delta(delta: ChatDelta) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._deltas.put_nowait, delta)

        self._work = Completion(
            state.model,
            state.processor,
            state.detokenizer,
            wanted,
            state.limits.prompt_tokens,
            on_delta,
            state.read_picture,
        )
        state.worker.chat(self._work)

    async def next(self, request: Request | None = None) -> ChatDelta:
        """What is new. Raises its error, and ClientDisconnect if a request is given whose client has gone."""
        try:
            while True:
                try:
                    async with asyncio.timeout(POLL_SECONDS):
                        delta = await self._deltas.get()
                except TimeoutError:
                    if request is not None and await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if delta.error is not None:
                    raise delta.error
                return delta
        except BaseException:
            self.cancel()
            raise

    async def whole(self, delta: ChatDelta, request: Request) -> dict[str, Any]:
        said: list[list[ChatDelta]] = [[] for _ in range(self._wanted.choices)]
        while True:
            said[delta.index].append(delta)
            if all(deltas and deltas[-1].finish is not None for deltas in said):
                break
            delta = await self.next(request)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(one.text for one in deltas), "refusal": None},
                "finish_reason": deltas[-1].finish,
                "logprobs": self._logprobs([entry for one in deltas for entry in one.logprobs or ()]),
            }
            for index, deltas in enumerate(said)
        ]
        return {**self._about, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def events(self, delta: ChatDelta) -> AsyncIterator[str]:
        """The answers as server-sent events."""
        try:
            for index in range(self._wanted.choices):
                yield self._event(index, {"role": "assistant", "content": ""})
            left = self._wanted.choices
            while True:
                if delta.text or delta.logprobs:
                    yield self._event(delta.index, {"content": delta.text}, logprobs=delta.logprobs)
                if delta.finish is not None:
                    yield self._event(delta.index, {}, delta.finish)
                    left -= 1
                if not left:
                    break
                delta = await self.next()
            if self._wanted.include_usage:
                yield _data({**self._about, "object": CHUNK, "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:
            message = f"the model failed at this ({type(error).__name__})."
            yield _data({"error": {"message": message, "type": "server_error", "param": None, "code": None}})

    def cancel(self) -> None:
        """Nobody listens any more."""
        self._work.cancelled = True

    def _event(
        self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: list[dict[str, Any]] | None = None
    ) -> str:
        told = self._logprobs(logprobs) if logprobs else None
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": told}
        event = {**self._about, "object": CHUNK, "choices": [choice]}
        if self._wanted.include_usage:
            event["usage"] = None  # it comes in an event of its own
        if self._wanted.obfuscate:
            event["obfuscation"] = secrets.token_hex(OBFUSCATED)[: -len(_data(choice).encode()) % OBFUSCATED]
        return _data(event)

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self._wanted.top_logprobs is None else {"content": entries, "refusal": None}

    def _usage(self) -> dict[str, int]:
        read, said = self._work.prompt_tokens, self._work.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@router.get("/about.json")
async def about(state: State) -> Response:
    """What the page needs to know before it has a stream."""
    facts = {
        "model": state.name,
        "fps": state.fps,
        "prompt": state.processor.stream_prompt,
        "max_fps": state.limits.frames_per_second,
        "frame_bytes": state.limits.frame_bytes,
        "text_tokens": state.limits.text_tokens if supports_text_bound(state.model) else None,
        "max_text_tokens": state.limits.max_text_tokens,
        "needs_token": state.token is not None,
    }
    return JSONResponse(facts, headers={"Cache-Control": "no-store"})
