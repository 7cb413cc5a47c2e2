"""A picture or video from the public internet, for servers that allow it: nothing of their own network is ever asked.

The address that was checked is the one that is connected to (a name may lead elsewhere at every look-up), where it
redirects to is judged anew, no proxy is used, and all of it together has a limit of time and of bytes.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
from contextlib import closing, suppress
from time import monotonic
from typing import Any
from urllib.parse import urljoin, urlsplit

from casa.errors import UserError
from casa.serving.limits import Limits

CHUNK = 2**16
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 3
ACCEPTED = {"picture": "image/*", "video": "video/*"}


def fetch(address: str, limits: Limits, kind: str = "picture") -> bytes:
    """What lies at an http(s) address: at most `limits.body_bytes`, within `limits.fetch_seconds`.

    kind: "picture" or "video", which is asked for. Raises UserError otherwise, and for anything that is not on the
    public internet.
    """
    until = monotonic() + limits.fetch_seconds
    for _ in range(1 + MOST_REDIRECTS):
        found = _visit(address, limits, kind, until - monotonic())
        if isinstance(found, bytes):
            return found
        address = found
    raise UserError(f"the {kind}'s address leads on and on; send the {kind} as a data: address.")


def _visit(address: str, limits: Limits, kind: str, seconds: float) -> bytes | str:
    """What lies at an address, or the address that it leads to, which is judged as this one is."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise UserError(f"the {kind}'s address cannot be read; send the {kind} as a data: address.") from error
    checked = public_address(host) if parts.scheme in ("http", "https") else None
    if checked is None:
        raise UserError(f"{host or 'this address'} is not on the public internet; send the {kind} as a data: address.")
    late = UserError(f"{host} did not send the {kind} in time; send it as a data: address.")
    if seconds <= 0:
        raise late
    line = _Line(host, port, checked, parts.scheme == "https", seconds)
    alarm = threading.Timer(seconds, line.cut)
    alarm.start()
    try:
        with closing(line):
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            line.request("GET", target, headers={"Accept": ACCEPTED[kind], "User-Agent": "casa"})
            with line.getresponse() as answer:
                if answer.status in REDIRECTS and (onward := answer.headers.get("Location")):
                    return urljoin(address, onward)
                if answer.status != 200:
                    raise OSError(answer.status)
                data = _read(answer, limits.body_bytes)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"the {kind} cannot be fetched from {host}; send it as a data: address.") from error
    finally:
        alarm.cancel()
    if line.is_cut:
        raise late
    if len(data) > limits.body_bytes:
        raise UserError(f"the {kind} has more than {limits.body_bytes} bytes; send a smaller one.")
    return data


def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
    data = bytearray()
    while len(data) <= most and (part := answer.read1(CHUNK)):
        data += part
    return bytes(data)


class _Line(http.client.HTTPConnection):
    """A connection for `host`, made to the address given and no other; `cut` ends it from another thread."""

    def __init__(self, host: str, port: int, address: str, secure: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        if secure:
            self.default_port = http.client.HTTPS_PORT
        self._address, self._secure = address, secure
        self._socket: Any = None  # kept, since an answer takes over what http.client has
        self.is_cut = False

    def connect(self) -> None:
        self.sock = self._socket = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            context = ssl.create_default_context()
            self.sock = self._socket = context.wrap_socket(
                self._socket, server_hostname=self.host, do_handshake_on_connect=False
            )
            self._socket.do_handshake()

    def cut(self) -> None:
        self.is_cut = True
        with suppress(OSError, AttributeError):
            self._socket.shutdown(socket.SHUT_RDWR)


def public_address(host: str) -> str | None:
    """An address of a host of which every address is on the public internet, rather than on this machine or its
    network; None otherwise.
    """
    try:
        found = [str(info[4][0]).split("%")[0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return None
    return found[0] if found and all(_is_public(ipaddress.ip_address(address)) for address in found) else None


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Version 6 can carry an address of version 4 in several ways, and that one then counts as well."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and address not in RELAYS
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None or address in NAT64:
        return _is_public(last)
    if address not in GIVEN_OUT or address in EXAMPLES or not address.is_global:
        return False
    if address.sixtofour is not None and not _is_public(address.sixtofour):
        return False
    return (int(address) >> 32) & 0xFFFFFFFF not in ISATAP or _is_public(last)


# All of version 6 that is the public internet's. What lies outside is local, reserved, or version 4 in one more form
# (::127.0.0.1, ::ffff:0:127.0.0.1), and the standard library calls much of it global.
GIVEN_OUT = ipaddress.ip_network("2000::/3")
EXAMPLES = ipaddress.ip_network("3fff::/20")  # for documents; newer than Python 3.11's own list
NAT64 = ipaddress.ip_network("64:ff9b::/96")
RELAYS = ipaddress.ip_network("192.88.99.0/24")  # of 6to4: whoever is nearest, this network's own included
ISATAP = (0x00005EFE, 0x02005EFE)  # before the address of version 4 that stands at the end
