"""Errors as the OpenAI interface writes them; every route answers so."""

from fastapi.responses import JSONResponse

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

RETRY_SECONDS = 1  # a place among the chats is free again within an answer


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    *,
    close: bool = False,
    retry_seconds: int = RETRY_SECONDS,
) -> JSONResponse:
    """close: ends the connection, since a body that was not read is still on its way.

    Where another try later may do, the answer says after how many seconds (Retry-After), which clients obey.
    """
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"Connection": "close"} if close else {}
    if status in (429, 503):
        headers["Retry-After"] = str(retry_seconds)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)
