"""Pictures from elsewhere: of the public internet only, from the address that was checked, within bounds."""

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from casa.errors import UserError
from casa.serving import Limits, fetch
from casa.serving.pictures import read_address

LIMITS = Limits()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "100.64.0.1",
        "2130706433",
        "0x7f.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::10.0.0.1",
        "",
        "a" * 300,
    ],
)
def test_addresses_of_this_network_are_never_fetched(host):
    assert fetch.public_address(host) is None
    with pytest.raises(UserError, match="public internet"):
        read_address(f"http://[{host}]/a.png" if ":" in host else f"http://{host}/a.png", LIMITS, True)


@pytest.mark.parametrize("host", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"])
def test_addresses_of_the_public_internet(host):
    assert fetch.public_address(host) == host


def test_a_name_with_one_private_address_is_not_public(monkeypatch):
    found = [(0, 0, 0, "", ("8.8.8.8", 0)), (0, 0, 0, "", ("10.0.0.1", 0))]
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: found)
    assert fetch.public_address("two.example") is None


@pytest.mark.parametrize("address", ["http://[/a.png", "http://a.example:99999999/a.png"])
def test_addresses_that_are_none(address):
    with pytest.raises(UserError, match="cannot be read"):
        read_address(address, LIMITS, True)


@pytest.fixture
def web():
    """The port of a server of this machine: a picture, a redirect to it, a large file, one that never ends."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "PNG")
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = {"/a.png?x=1": 200, "/large": 200, "/slow": 200, "/moved": 302}.get(self.path, 404)
            self.send_response(found)
            if found == 302:
                self.send_header("Location", "/a.png?x=1")
            self.end_headers()
            if self.path == "/large":
                self.wfile.write(bytes(5000))
            elif self.path == "/slow":
                self.wfile.write(b"a")
                ending.wait(60)
            elif found == 200:
                assert self.headers["Host"].startswith("pictures.example")
                self.wfile.write(picture.getvalue())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    ending.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetching_where_it_is_allowed(web, monkeypatch):
    # what was checked is what is asked: nobody knows this name
    monkeypatch.setattr(fetch, "public_address", lambda host: "127.0.0.1" if host == "pictures.example" else None)
    base = f"http://pictures.example:{web}"
    assert read_address(f"{base}/a.png?x=1", LIMITS, True).size == (40, 30)
    for path, limits, word in [
        ("/none", LIMITS, "cannot be fetched"),
        ("/moved", LIMITS, "cannot be fetched"),
        ("/large", LIMITS, "no JPEG"),
        ("/large", Limits(body_bytes=4000), "4000 bytes"),
        ("/slow", Limits(fetch_seconds=0.3), "in time|cannot be fetched"),
        ("/\n", LIMITS, "cannot be fetched|no JPEG"),
    ]:
        with pytest.raises(UserError, match=word):
            read_address(base + path, limits, True)
    with pytest.raises(UserError, match="cannot be fetched"):
        # no TLS is spoken there
        read_address(f"https://pictures.example:{web}/a.png", LIMITS, True)
