"""The app: its settings, and a page whose files and no others can be had."""

import http.client
import json
import re
import threading
import urllib.error
import urllib.request
from contextlib import closing

import pytest
import torch

from casa.errors import UserError
from casa.serving import Limits
from casa.serving.admission import is_foreign, is_own
from casa.serving.app import create_app
from casa.serving.routes import FILES
from casa.serving.server import Server
from casa.testing import PATIENCE, tiny_casa, tiny_processor


def get(server, path):
    """Status, headers and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=PATIENCE) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_settings_out_of_bounds(model):
    for settings, word in [
        ({"fps": 0}, "fps"),
        ({"fps": 99}, "fps"),
        ({"token": " "}, "token"),
        ({"max_sessions": 0}, "sess"),
    ]:
        with pytest.raises(UserError, match=word):
            create_app(model, tiny_processor(), **settings)


def test_a_port_that_is_taken(server, model):
    app = create_app(model, tiny_processor())
    with pytest.raises(UserError, match="taken"):
        Server(app, port=server.port)
    with pytest.raises(UserError, match="listen"):
        Server(app, "203.0.113.7", 0)


def test_the_page_and_its_files(server):
    for name in FILES:
        status, headers, body = get(server, f"/{name}")
        assert status == 200, name
        assert body, name
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
    about = json.loads(get(server, "/about.json")[2])
    assert (about["model"], about["prompt"], about["needs_token"]) == ("tiny", "say it", False)
    assert (about["text_tokens"], about["max_text_tokens"]) == (1024, 8192)


def test_whatever_can_be_had_can_be_asked_about(server, client):
    """HEAD gives the head that GET gives, and no body."""
    with client(server) as socket:
        name = socket.hello()["stream"]
        paths = ["/", "/app.js", "/film.mp4", "/about.json", "/health", "/metrics", "/v1/models", "/v1/models/tiny"]
        for path in [*paths, f"/v1/streams/{name}/captions.srt", "/v1/models/none", "/nothing"]:
            status, headers, _ = get(server, path)
            line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            with closing(line):
                line.request("HEAD", path)
                answer = line.getresponse()
                assert (answer.status, answer.read()) == (status, b""), path
                assert answer.headers["Content-Type"] == headers["Content-Type"], path
                if path != "/metrics":
                    assert answer.headers["Content-Length"] == headers["Content-Length"], path


def test_the_page_needs_nothing_from_elsewhere(server):
    scripts = [name for name in FILES if name.endswith(".js")]
    for name in ("", "style.css", *scripts):
        text = get(server, f"/{name}")[2].decode()
        assert not re.findall(r"(?:src|href|import|url)\s*[=(:]?\s*[\"']?(?:https?:)?//", text), name
    html = get(server, "/")[2].decode()
    for local in re.findall(r"(?:src|href)=\"([^\"]+)\"", html):
        assert local in FILES
    # every part that the script reaches for is on the page
    script = "".join(get(server, f"/{name}")[2].decode() for name in scripts)
    assert set(re.findall(r"\bat\(\"([\w-]+)\"\)", script)) <= set(re.findall(r"\bid=\"([\w-]+)\"", html))
    assert {f"{name}.js" for name in re.findall(r"from \"\./(\w+)\.js\"", script)} | {"app.js"} == set(scripts)


@pytest.mark.parametrize(
    "path",
    ["/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/etc/passwd", "//etc/passwd", "/app.py", "/page/app.js", "/docs"],
)
def test_no_other_file_can_be_read(server, path):
    status, _, body = get(server, path)
    assert status == 404
    assert b"create_app" not in body


def test_who_is_foreign():
    assert not is_foreign(None, "127.0.0.1:8000")
    assert not is_foreign("http://LOCALHOST:8000", "localhost:8000")
    assert is_foreign("http://localhost:9000", "localhost:8000")
    assert is_foreign("null", "localhost:8000")
    assert is_foreign("http://[", "localhost:8000")


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("localhost", True),
        ("casa.localhost:80", True),
        ("192.168.1.2", True),
        ("mine.example:8000", True),
        ("other.example", False),
        ("127.0.0.1.other.example", False),
        ("localhost.other.example", False),
        ("[", False),
        ("@", False),
        ("", True),
    ],
)
def test_names_that_no_other_site_can_have(host, own):
    assert is_own(host, frozenset(["mine.example"])) is own


def test_sessions_are_a_limit_like_any_other(model):
    for settings, most in [
        ({}, 16),
        ({"limits": Limits(sessions=3)}, 3),
        ({"max_sessions": 2}, 2),
        ({"limits": Limits(sessions=3), "max_sessions": 2}, 2),
    ]:
        state = create_app(model, tiny_processor(), **settings).state.casa
        assert (state.worker.engine.max_sessions, state.limits.sessions) == (most, most)


def test_an_insertion_model_remembers_all_and_is_refused_a_bound(client):
    app = create_app(tiny_casa(dtype=torch.float32, method="insertion"), tiny_processor())
    server = Server(app, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    with client(server) as one, client(server) as two:
        assert one.hello()["max_text_tokens"] is None
        error = two.hello(max_text_tokens=100)
        assert error["fatal"] is True
        assert "insertion" in error["message"]
        assert json.loads(get(server, "/about.json")[2])["text_tokens"] is None
    server.stop()
    thread.join()


@pytest.mark.slow
def test_insertion_is_measured_at_start(serving, client, frames):
    with serving(measure_seconds=0.1) as server, client(server) as one:
        assert one.hello()["insertion"] == {"cache_bytes": "computed", "latency": "measured"}
        usage = one.show(frames[0])[1]
        assert usage["insertion"]["latency"] >= usage["latency"] > 0
