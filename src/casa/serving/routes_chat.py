"""Chat completions as the OpenAI interface has them, whole or as server-sent events, and the list of models."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from casa.errors import UserError
from casa.serving.chat_request import ChatRequest, RequestError, parse_body, read_chat
from casa.serving.completion import Completion, Piece
from casa.serving.errors import error_response
from casa.serving.rate import LOOK_AFTER, Guest
from casa.serving.state import ServerState
from casa.serving.worker import STOPPING

OBFUSCATED = 64  # characters: the sizes of obfuscated events are multiples of it, the head apart

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(request.app.state.casa)]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    state: ServerState = request.app.state.casa
    if name != state.name:
        return error_response(404, f"there is no such model here, only {state.name!r}.", "model", "model_not_found")
    return JSONResponse(_model(state))


@router.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    state: ServerState = request.app.state.casa
    line = state.line
    if (guest := line.join()) is None:
        waits = f"{line.served} chats are under way and {line.here - line.served} wait; try again later."
        return error_response(429, waits, code="busy", close=True, retry_seconds=line.expected_seconds())
    begun = False
    try:
        body = await _body(request, state.limits.body_bytes, state.limits.body_seconds)
        if not await guest.turn(request.is_disconnected):
            raise ClientDisconnect
        wanted = await asyncio.get_running_loop().run_in_executor(state.chat_threads, _read, body, state)
        answer = _Answer(state, wanted, guest)
        state.metrics.count("chats")
        # errors of the prompt come before the first piece, and then as an error of their own
        first = await answer.next(request)
        if not wanted.stream:
            return JSONResponse(await answer.whole(first, request))
        begun = True
        return _Events(answer.events(first), answer.end)
    except RequestError as error:
        state.metrics.count("errors")
        return error_response(error.status, str(error), error.param, error.code, close=error.status in (408, 413))
    except UserError as error:
        state.metrics.count("errors")
        return error_response(503 if error is STOPPING else 400, str(error))
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    except Exception as error:
        state.metrics.count("errors")
        return error_response(500, f"the model failed at this ({type(error).__name__}).")
    finally:
        if not begun:
            guest.leave()


def _model(state: ServerState) -> dict[str, Any]:
    return {"id": state.name, "object": "model", "created": 0, "owned_by": "casa"}


def _read(body: bytes, state: ServerState) -> ChatRequest:
    return read_chat(parse_body(body, state.limits), state.name, state.limits, state.allow_fetch)


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """The body, refused as soon as it is known to be too large. Raises RequestError."""
    too_large = RequestError(f"the body has more than {most} bytes; send smaller pictures.", status=413)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time.", status=408) from error
    return b"".join(parts)


class _Events(StreamingResponse):
    """Server-sent events; `end` is called whatever happens, also if the client goes before the first one."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        unbuffered = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=unbuffered)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # a reader that does not read is cut off by its connection (see `transport`), which ends `send`
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


class _Answer:
    """A completion under way, as its route sees it."""

    def __init__(self, state: ServerState, wanted: ChatRequest, guest: Guest) -> None:
        self._state, self._wanted, self._guest = state, wanted, guest
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self._work = Completion(state.model, state.processor, wanted, state.limits.prompt_tokens, tell)
        state.worker.chat(self._work)

    async def next(self, request: Request | None = None) -> Piece:
        """The next piece. Raises its error, and ClientDisconnect if a request is given whose client has gone."""
        try:
            while True:
                try:
                    async with asyncio.timeout(LOOK_AFTER):
                        piece = await self._pieces.get()
                except TimeoutError:
                    if request is not None and await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if piece.error is not None:
                    raise piece.error
                return piece
        except BaseException:
            self._work.cancelled = True
            raise

    async def whole(self, piece: Piece, request: Request) -> dict[str, Any]:
        said: list[list[Piece]] = [[] for _ in range(self._wanted.choices)]
        while True:
            said[piece.index].append(piece)
            if all(pieces and pieces[-1].finish is not None for pieces in said):
                break
            piece = await self.next(request)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(one.text for one in pieces), "refusal": None},
                "finish_reason": pieces[-1].finish,
                "logprobs": self._logprobs([entry for one in pieces for entry in one.logprobs or ()]),
            }
            for index, pieces in enumerate(said)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    async def events(self, piece: Piece) -> AsyncIterator[str]:
        """The answers as server-sent events."""
        try:
            for index in range(self._wanted.choices):
                yield self._event(index, {"role": "assistant", "content": ""})
            left = self._wanted.choices
            while True:
                if piece.text or piece.logprobs:
                    yield self._event(piece.index, {"content": piece.text}, logprobs=piece.logprobs)
                if piece.finish is not None:
                    yield self._event(piece.index, {}, piece.finish)
                    left -= 1
                if not left:
                    break
                piece = await self.next()
            if self._wanted.include_usage:
                yield _data({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:
            message = f"the model failed at this ({type(error).__name__})."
            yield _data({"error": {"message": message, "type": "server_error", "param": None, "code": None}})

    def end(self) -> None:
        """Nobody listens any more; its place among the chats is free again."""
        self._work.cancelled = True
        self._guest.leave()

    def _event(
        self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: list[dict[str, Any]] | None = None
    ) -> str:
        told = self._logprobs(logprobs) if logprobs else None
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": told}
        event = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._wanted.include_usage:
            event["usage"] = None  # it comes in an event of its own
        if self._wanted.obfuscate:
            event["obfuscation"] = secrets.token_hex(OBFUSCATED)[: -len(_data(choice).encode()) % OBFUSCATED]
        return _data(event)

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self._wanted.top_logprobs is None else {"content": entries, "refusal": None}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._state.name}

    def _usage(self) -> dict[str, int]:
        read, said = self._work.prompt_tokens, self._work.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
