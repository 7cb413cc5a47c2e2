"""Addresses: RTSP cameras, HTTP(S) streams and files on a server, RTMP, raw UDP and TCP."""

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from casa.errors import UserError
from casa.media.backoff import Backoff
from casa.media.decoder import Decoder
from casa.media.stream_source import StreamSource

SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "udp", "rtp", "tcp")
# What a server may send us to; never "file", or a playlist from outside could read this machine.
_WHITELIST = "http,https,httpproxy,tcp,tls,crypto,udp,rtp,srtp,rtmp,rtmps,data"


def is_address(spec: str) -> bool:
    """Whether this is written as an address: some scheme, then "://"."""
    scheme, mark, _ = spec.partition("://")
    return bool(mark) and scheme.replace("+", "").isalnum()


def open_address(
    url: str,
    fps: float = 2.0,
    *,
    live: bool | None = None,
    timeout: float = 10.0,
    options: dict[str, str] | None = None,
    backoff: Backoff | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Any] | None = None,
) -> StreamSource:
    """A stream or a file at an address, sampled at `fps`.

    timeout: seconds without data after which the connection counts as lost. options: FFmpeg's own, such as
    {"rtsp_transport": "udp"} or {"headers": "Authorization: Bearer ..."}. backoff: as for `StreamSource`.
    A name and password in the address are used, and shown nowhere.

    Raises:
        UserError: an address of a kind that is not read, nothing there, or no video; while reading, a stream that
            broke off and did not come back.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise UserError(f"There is no reading from {scheme}:// : give a file, or an address of {', '.join(SCHEMES)}.")
    name = without_secrets(url)
    given = {"protocol_whitelist": _WHITELIST}
    if scheme in ("rtsp", "rtsps"):
        # over UDP a lossy network smears the picture, and a home router lets nothing back in
        given["rtsp_transport"] = "tcp"
        given["protocol_whitelist"] += ",rtsp"
    given |= options or {}

    def open_decoder(counts):
        sentence = f"{name} gives no video: check the address, and that the camera or server is on."
        return Decoder(url, name, sentence, counts, options=given, timeout=timeout, live=True)

    return StreamSource(open_decoder, name, fps, live=live, backoff=backoff, clock=clock, sleep=sleep)


def without_secrets(url: str) -> str:
    """The address without user, password and query, as it may be printed."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("://")[0] + "://..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
