"""A picture or video from the public internet, for servers that allow it: nothing of their own network is ever asked.

The address that was checked is the one that is connected to (a name may lead elsewhere at every look-up), where it
redirects to is judged anew, no proxy is used, and all of it together has a limit of time and of bytes.
"""

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

import httpx

from casa.errors import UserError
from casa.serving.limits import Limits

MAX_REDIRECTS = 3
ACCEPTED = {"picture": "image/*", "video": "video/*"}


def fetch(address: str, limits: Limits, kind: str = "picture") -> bytes:
    """Fetches what lies at an http(s) address. Not to be called where an event loop runs.

    Args:
        address: On the public internet.
        limits: `body_bytes` at most, within `fetch_seconds`.
        kind: What sentences call it, "picture" or "video".

    Raises:
        UserError: It is too large or slow, not there, or not on the public internet.
    """
    try:
        _ = urlsplit(address).port  # httpx takes more for an address
        url = httpx.URL(address)
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"the {kind}'s address cannot be read; send the {kind} as a data: address.") from error
    return asyncio.run(_fetch(url, limits, kind))


async def _fetch(url: httpx.URL, limits: Limits, kind: str) -> bytes:
    instead = f"send the {kind} as a data: address."
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=None) as client, asyncio.timeout(limits.fetch_seconds):
            for _ in range(1 + MAX_REDIRECTS):
                host = url.raw_host.decode()
                checked = public_address(host) if url.scheme in ("http", "https") else None
                if checked is None:
                    raise UserError(f"{url.host or 'this address'} is not on the public internet; {instead}")
                found = await _visit(client, url, checked, limits.body_bytes, ACCEPTED[kind])
                if isinstance(found, bytes):
                    break
                url = found
            else:
                raise UserError(f"the {kind}'s address leads on and on; {instead}")
    except TimeoutError as error:
        raise UserError(f"{url.host} did not send the {kind} in time; {instead}") from error
    except (OSError, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise UserError(f"the {kind} cannot be fetched from {url.host}; {instead}") from error
    if len(found) > limits.body_bytes:
        raise UserError(f"the {kind} has more than {limits.body_bytes} bytes; send a smaller one.")
    return found


async def _visit(
    client: httpx.AsyncClient, url: httpx.URL, checked: str, max_bytes: int, accept: str
) -> bytes | httpx.URL:
    """What lies at a URL, a little more than `max_bytes` of it at most, or where it leads. Asks `checked` alone."""
    headers = {"Host": url.netloc.decode(), "Accept": accept, "Accept-Encoding": "identity", "User-Agent": "casa"}
    secure = {"sni_hostname": url.raw_host.decode()}  # whose certificate it must be
    async with client.stream("GET", url.copy_with(host=checked), headers=headers, extensions=secure) as answer:
        if answer.has_redirect_location and (onward := answer.headers["Location"]):
            return url.join(onward)
        if answer.status_code != 200:
            raise OSError(answer.status_code)
        data = bytearray()
        async for part in answer.aiter_raw():
            data += part
            if len(data) > max_bytes:
                break
        return bytes(data)


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
