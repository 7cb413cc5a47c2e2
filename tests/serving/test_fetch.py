"""Pictures from elsewhere: of the public internet only, from the address that was checked, within bounds."""

import io
import ipaddress
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media import VideoWriter
from casa.serving import Limits, fetch
from casa.serving.pictures import read_address, read_video
from casa.testing import PATIENCE

LIMITS = Limits()


LOCAL = {
    "version 4": ["127.0.0.1", "127.8.9.10", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1"],
    "version 4, of no host": ["0.0.0.0", "0.1.2.3", "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1"],
    "version 4, for documents and relays": ["192.0.2.1", "203.0.113.9", "192.88.99.1"],
    "version 4 as programs of old wrote it": [
        "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1", "10.1", "0xa9.254.0xa9fe",
    ],
    "version 4 in other letters": ["\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "\u2460\u2461\u2466.0.0.1"],
    "names": ["localhost", "LOCALHOST", "localhost.", "", "a" * 300, "-.-"],
    "version 6": ["::", "::1", "0:0:0:0:0:0:0:1", "fe80::1", "fe80::1%1", "::1%1", "fc00::1", "fd00::1", "fec0::1"],
    "version 6, of no host": ["ff02::1", "ff0e::1", "100::1", "2001:db8::1", "3fff::1", "5f00::1", "4000::1", "::2"],
    "mapped": ["::ffff:127.0.0.1", "::ffff:7f00:1", "0:0:0:0:0:ffff:10.0.0.1", "::ffff:169.254.169.254"],
    "compatible": ["::127.0.0.1", "::7f00:1", "::10.0.0.1", "::8.8.8.8"],
    "translated": ["::ffff:0:127.0.0.1", "::ffff:0:7f00:1", "::ffff:0:10.0.0.1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::1"],
    "NAT64": ["64:ff9b::10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "64:ff9b:1::8.8.8.8"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:0:7f00:1::1"],
    "ISATAP": ["2001:4860::5efe:7f00:1", "2001:4860::200:5efe:10.0.0.1", "fe80::5efe:8.8.8.8"],
}  # fmt: skip
PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "2001:4860:4860::8888",
    "2a00:1450:4001::1",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "2002:808:808::1",
    "2001:4860::5efe:8.8.8.8",
]


@pytest.mark.parametrize("host", [host for hosts in LOCAL.values() for host in hosts])
def test_addresses_of_this_network_are_never_fetched(host, monkeypatch):
    """Whatever the resolver makes of them: those that it does not know are judged as they are written."""
    monkeypatch.setattr(fetch, "_visit", lambda *_: pytest.fail("connected"))
    assert fetch.public_address(host) is None
    with pytest.raises(UserError, match=r"public internet|cannot be read"):
        read_address(f"http://[{host}]/a.png" if ":" in host else f"http://{host}/a.png", LIMITS, True)
    if ":" in host:
        # a name may lead there too, on machines without version 6 as well
        found = [(10, 1, 6, "", (host, 0, 0, 0))]
        monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: found)
        assert fetch.public_address("name.example") is None


@pytest.mark.parametrize("host", PUBLIC)
def test_addresses_of_the_public_internet(host):
    found = fetch.public_address(host)
    assert found is not None
    assert ipaddress.ip_address(found) == ipaddress.ip_address(host)


def test_the_name_is_looked_up_once_and_the_address_judged_is_connected_to(monkeypatch):
    """A name that leads somewhere else at its second look-up gets nowhere."""
    answers = iter([[(2, 1, 6, "", ("8.8.8.8", 0))], [(2, 1, 6, "", ("127.0.0.1", 0))]])
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: next(answers))
    asked = []

    async def connect(self, request):
        asked.append((request.url.host, request.url.port, request.headers["Host"], request.extensions["sni_hostname"]))
        raise httpx.ConnectError("nobody")

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", connect)
    with pytest.raises(UserError, match="cannot be fetched"):
        read_address("http://turns.example:81/a.png", LIMITS, True)
    assert asked == [("8.8.8.8", 81, "turns.example:81", "turns.example")]


def test_a_name_with_one_private_address_is_not_public(monkeypatch):
    found = [(0, 0, 0, "", ("8.8.8.8", 0)), (0, 0, 0, "", ("10.0.0.1", 0))]
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: found)
    assert fetch.public_address("two.example") is None


@pytest.mark.parametrize("address", ["http://[/a.png", "http://a.example:99999999/a.png", "http://a.example/\n"])
def test_addresses_that_are_none(address):
    with pytest.raises(UserError, match="cannot be read"):
        read_address(address, LIMITS, True)


@pytest.fixture
def web(tmp_path):
    """The port of a server of this machine, and the paths it was asked for: a picture, redirects to it and elsewhere, a
    film, a large file, one that never ends.
    """
    asked = []
    film = tmp_path / "film.mp4"
    with VideoWriter(film, (40, 30), fps=2) as video:
        for _ in range(3):
            video.write(Image.new("RGB", (40, 30), "red"))
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "PNG")
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            moved = {
                "/moved": "/a.png?x=1",
                "/there": f"http://pictures.example:{server.server_port}/moved",
                "/round": "/round",
                "/nowhere": "",
                "/home": f"http://127.0.0.1:{server.server_port}/a.png?x=1",
                "/mapped": f"//[::ffff:0:127.0.0.1]:{server.server_port}/a.png?x=1",
                "/file": "file:///etc/passwd",
                "/odd": "http://[/",
            }
            asked.append(self.path)
            found = {"/a.png?x=1": 200, "/film": 200, "/large": 200, "/slow": 200}.get(self.path, 404)
            self.send_response(302 if self.path in moved else found)
            if self.path in moved:
                self.send_header("Location", moved[self.path])
            self.end_headers()
            if self.path in moved:
                return
            if self.path == "/film":
                assert self.headers["Accept"] == "video/*"
                self.wfile.write(film.read_bytes())
            elif self.path == "/large":
                self.wfile.write(bytes(5000))
            elif self.path == "/slow":
                self.wfile.write(b"a")
                ending.wait(PATIENCE)
            elif found == 200:
                assert self.headers["Host"].startswith("pictures.example")
                self.wfile.write(picture.getvalue())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port, asked
    ending.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetching_where_it_is_allowed(web, monkeypatch):
    # what was checked is what is asked: nobody knows this name
    judge = fetch.public_address
    monkeypatch.setattr(
        fetch, "public_address", lambda host: "127.0.0.1" if host == "pictures.example" else judge(host)
    )
    port, asked = web
    base = f"http://pictures.example:{port}"
    assert read_address(f"{base}/a.png?x=1", LIMITS, True).size == (40, 30)
    # onward twice, each place judged as the first
    assert read_address(f"{base}/there", LIMITS, True).size == (40, 30)
    assert asked[1:] == ["/there", "/moved", "/a.png?x=1"]
    assert [frame.size for frame in read_video(f"{base}/film", LIMITS, True, 8)] == [(40, 30)] * 3
    for path, limits, word in [
        ("/none", LIMITS, "cannot be fetched"),
        ("/round", LIMITS, "leads on and on"),
        ("/nowhere", LIMITS, "cannot be fetched"),
        ("/home", LIMITS, "127.0.0.1 is not on the public internet"),
        ("/mapped", LIMITS, "::ffff:0:127.0.0.1 is not on the public internet"),
        ("/file", LIMITS, "public internet"),
        ("/odd", LIMITS, "cannot be fetched|public internet"),
        ("/large", LIMITS, "as a picture"),
        ("/large", Limits(body_bytes=4000), "4000 bytes"),
        ("/slow", Limits(fetch_seconds=1.0), "in time|cannot be fetched"),
    ]:
        del asked[:]
        with pytest.raises(UserError, match=word):
            read_address(base + path, limits, True)
        # what lies on this machine was not asked for
        assert len(asked) == (1 + fetch.MAX_REDIRECTS if path == "/round" else 1)
    with pytest.raises(UserError, match="cannot be fetched"):
        # no TLS is spoken there
        read_address(f"https://pictures.example:{port}/a.png", LIMITS, True)
