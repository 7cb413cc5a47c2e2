"""Addresses, against a server on this machine that breaks off in the middle and comes back."""

import http.server
import socket
import subprocess
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media.sources import open_source
from casa.media.streams import Backoff, is_address, open_stream, without_secrets
from casa.testing import PATIENCE

QUICK = Backoff(first=0.001, longest=0.002, attempts=3)


class Server:
    """Answers each request with the next of `answers`: (data, whether to tell its true length, content type), and an
    event for which the connection is held open, if it is to stall."""

    def __init__(self):
        self.answers, self.asked = [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(dict(self.headers))
                if not outer.answers:
                    self.send_error(503)
                    return
                data, length, kind, *stall = outer.answers.pop(0)
                self.send_response(200)
                self.send_header("Content-Type", kind)
                if length:
                    self.send_header("Content-Length", str(length))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)
                for event in stall:
                    event.wait(PATIENCE)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/a"

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory, clips):
    """Bytes of 20 frames, one every 0.1 s, in a container. Large enough to be cut, so of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("clips")

    def make(suffix):
        path = folder / f"a.{suffix}"
        format = {"ts": "mpegts"}.get(suffix)
        clips.write(path, range(0, 2000, 100), size=(128, 96), picture=noise, format=format)
        return path.read_bytes()

    return make


def read(source):
    """Seconds of all frames, and the sentence at the end if there is one."""
    seconds, sentence = [], ""
    try:
        with source:
            for frame in source:
                assert frame.picture.shape == (96, 128, 3)
                seconds.append(round(frame.time, 3))
    except UserError as error:
        sentence = str(error)
    return seconds, sentence


def test_a_live_stream_that_breaks_off_comes_back(server, clip):
    data = clip("ts")
    server.answers = [(data[: len(data) // 2], 0, "video/mp2t"), (data, 0, "video/mp2t")]
    source = open_source(server.url, fps=10, backoff=QUICK)
    assert source.is_live
    seconds, sentence = read(source)
    assert seconds == sorted(set(seconds))
    # about 10 of the first connection; the second begins at the beginning again, and adds the rest
    assert 18 <= len(seconds) <= 20
    assert seconds[-1] == 1.9
    assert "broke off and did not come back in 3 attempts" in sentence
    assert source.counts.reconnects == 1
    assert len(server.asked) == 5


@pytest.mark.slow
def test_a_live_stream_that_stalls_comes_back(server, clip):
    """Connected, and not a byte more: the camera's power is gone, and nobody says so."""
    data = clip("ts")
    over = threading.Event()
    # more than a second of it, since that much is looked into before the first frame is given
    server.answers = [(data[: -9 * 188], 0, "video/mp2t", over), (data, 0, "video/mp2t")]
    try:
        source = open_source(server.url, fps=10, timeout=2.0, backoff=QUICK)
        seconds, sentence = read(source)
    finally:
        over.set()
    assert seconds == sorted(set(seconds))
    # most of the first, and what the second adds; frames that others were stored before may be missing where it stalled
    assert 17 <= len(seconds) <= 20
    assert seconds[-1] == 1.9
    assert "broke off" in sentence
    assert source.counts.reconnects == 1


class Playlist:
    """HLS: segments of half a second, five frames each, that are all told apart by their grey. Every time that the list
    is asked for, `steps` says what happens: how many segments there are, "end" for all with an end mark, "gone" for an
    error; the last step stays."""

    def __init__(self, folder, clips, segments=8):
        self.segments = [self.segment(folder, clips, k) for k in range(segments)]
        self.steps, self.asked = [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                body = outer.answer(self.path)
                if body is None:
                    self.send_error(503)
                    return
                self.send_response(200)
                kind = "application/vnd.apple.mpegurl" if self.path.endswith("m3u8") else "video/mp2t"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/live.m3u8"

    @staticmethod
    def segment(folder, clips, k):
        path = folder / f"{k}.ts"
        with av.open(str(path), "w", format="mpegts", options={"mpegts_copyts": "1"}) as made:
            stream = made.add_stream("libx264", rate=10, options={"g": "5", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(5 * k, 5 * k + 5):
                grey = np.full((48, 64, 3), 10 + 5 * number, np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                made.mux(stream.encode(frame))
            made.mux(stream.encode())
        return path.read_bytes()

    def answer(self, path):
        if not path.endswith("m3u8"):
            return self.segments[int(path.strip("/s.t"))]
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if step == "gone":
            return None
        first, many = step if isinstance(step, tuple) else (0, step)
        many = len(self.segments) if many == "end" else many
        lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:1", f"#EXT-X-MEDIA-SEQUENCE:{first}"]
        lines += [f"#EXTINF:0.1,\ns{k}.ts" for k in range(first, many)]
        return "\n".join([*lines, "#EXT-X-ENDLIST" * (step == "end"), ""]).encode()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def playlist(tmp_path, clips, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Playlist(tmp_path, clips)
    yield running
    running.close()


def watched(source, clips):
    """(which frame it is, its second) of all, and the sentence at the end if there is one."""
    frames, sentence = [], ""
    try:
        with source:
            for frame in source:
                frames.append((clips.number(frame.picture), round(frame.time, 2)))
    except UserError as error:
        sentence = str(error)
    return frames, sentence


ALL = [(k, pytest.approx(k / 10, abs=0.011)) for k in range(40)]


class TestPlaylists:
    """HLS, on a clock that nobody waits for: a live list grows each time it is asked for."""

    @pytest.mark.parametrize("live", [None, True, False])
    def test_one_with_an_end_mark_is_over_once(self, playlist, clips, live):
        playlist.steps = ["end"]
        source = open_source(playlist.url, fps=100, live=live, backoff=QUICK)
        assert source.is_live is bool(live)
        assert watched(source, clips) == (ALL, "")
        assert playlist.asked.count("/live.m3u8") == 1
        assert source.counts.reconnects == 0

    @pytest.mark.slow
    def test_one_that_grows_and_ends(self, playlist, clips, caplog):
        playlist.steps = [3, 4, 5, 5, 7, "end"]
        source = open_source(playlist.url, fps=100, backoff=QUICK)
        assert source.is_live
        assert watched(source, clips) == (ALL, "")
        assert source.counts.reconnects == 0
        assert not caplog.records, "nothing broke off"

    @pytest.mark.slow
    @pytest.mark.parametrize("back", [[(2, 6), (4, 7), "end"], ["end"]], ids=["a window of it", "the whole of it"])
    def test_one_that_is_cut_and_comes_back(self, playlist, clips, back):
        playlist.steps = [3, 4, *["gone"] * 6, *back]
        source = open_source(playlist.url, fps=100, backoff=Backoff(first=0.001, longest=0.002, attempts=20))
        frames, sentence = watched(source, clips)
        assert sentence == ""
        assert frames == ALL, "and it goes on where it was"
        assert source.counts.reconnects >= 1

    def test_one_that_never_comes_back(self, playlist, clips):
        playlist.steps = [3, 4, "gone"]
        source = open_source(playlist.url, fps=100, backoff=QUICK)
        frames, sentence = watched(source, clips)
        assert frames == ALL[:20]
        assert "broke off and did not come back in 3 attempts" in sentence


@pytest.mark.parametrize("live", [None, True])
def test_a_server_that_plays_its_film_again_for_everybody(server, clip, live):
    """Connections that end without a word, as live ones do; and a film of known length, watched as a live one."""
    data = clip("ts")
    server.answers = [(data, len(data) if live else 0, "video/mp2t")] * 9
    source = open_source(server.url, fps=10, live=live, backoff=QUICK)
    assert source.is_live
    assert read(source) == ([round(k * 0.1, 3) for k in range(20)], "")
    assert len(server.asked) == (1 if live else 2)


def test_a_camera_whose_clock_begins_again_is_not_what_was_there(server, clip, clips, tmp_path):
    """It is on again after a cut, with the times of before and other pictures."""
    other = clips.write(tmp_path / "b.ts", range(0, 2000, 100), size=(128, 96), format="mpegts").read_bytes()
    server.answers = [(clip("ts"), 0, "video/mp2t"), (other, 0, "video/mp2t")]
    seconds, _ = read(open_source(server.url, fps=1000, backoff=QUICK))
    assert len(seconds) == 40
    assert seconds == sorted(set(seconds))


SENDER_TCP = """
import socket, sys, time
for name in sys.argv[2:]:
    while True:
        try:
            with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as line:
                line.sendall(open(name, "rb").read())
                line.shutdown(socket.SHUT_WR)
                line.recv(1)  # until the other side has done with it
            break
        except OSError:
            time.sleep(0.02)
"""


def test_a_sender_that_begins_again(clip, tmp_path):
    """Raw TCP: half a film, then the whole of it, twice."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data = clip("ts")
    (tmp_path / "half.ts").write_bytes(data[: len(data) // 2])
    (tmp_path / "whole.ts").write_bytes(data)
    names = [str(tmp_path / name) for name in ("half.ts", "whole.ts", "whole.ts")]
    with subprocess.Popen([sys.executable, "-c", SENDER_TCP, str(port), *names]) as sender:
        backoff = Backoff(first=0.01, longest=0.02, attempts=20)
        source = open_source(f"tcp://127.0.0.1:{port}?listen=1&listen_timeout=60000", fps=10, backoff=backoff)
        seconds, sentence = read(source)
        sender.terminate()
    assert sentence == ""
    assert 17 <= len(seconds) <= 20
    assert seconds == sorted(set(seconds))
    assert seconds[-1] == 1.9
    assert source.counts.reconnects == 1


def test_damage_in_a_live_stream_is_passed_over_and_counted(server, clip):
    """Flipped bytes in the middle, the transport stream's own among them: the frames behind them still come."""
    data = bytearray(clip("ts"))
    begin = len(data) // 2
    noise = np.random.default_rng(1).integers(1, 256, len(data) // 10, dtype=np.uint8)
    spot = slice(begin, begin + len(noise))
    data[spot] = (np.frombuffer(bytes(data[spot]), np.uint8) ^ noise).tobytes()
    server.answers = [(bytes(data), 0, "video/mp2t")]
    source = open_source(server.url, fps=10, backoff=QUICK)
    assert source.is_live
    seconds, _ = read(source)
    assert source.counts.skipped >= 1
    assert seconds == sorted(set(seconds))
    assert 8 <= len(seconds) < 20
    assert seconds[-1] > 1.7, "the end is reached"


def test_a_file_that_breaks_off_goes_on_without_a_gap(server, clip):
    data = clip("mkv")
    whole = (data, len(data), "video/x-matroska")
    # asked for a part, this server gives the whole: so it is asked again
    server.answers = [(data[: len(data) // 2], len(data), "video/x-matroska"), whole, whole, whole]
    source = open_source(server.url, fps=10, backoff=QUICK)
    assert not source.is_live
    seconds, sentence = read(source)
    assert sentence == ""
    assert seconds == [round(k * 0.1, 3) for k in range(20)]
    assert source.counts.reconnects == 1


def test_a_file_is_over_once(server, clip):
    data = clip("mkv")
    server.answers = [(data, length, "video/x-matroska") for length in (len(data), 0)]
    for _ in range(2):
        assert read(open_source(server.url, fps=2, backoff=QUICK)) == ([0, 0.5, 1, 1.5], "")
    assert len(server.asked) == 2


def test_a_camera_of_bare_jpegs_is_timed_by_the_clock(server):
    """multipart/x-mixed-replace, as network cameras send it."""
    body = b""
    for k in range(6):
        jpeg = av.VideoFrame.from_image(Image.new("RGB", (128, 96), (40 * k,) * 3))
        body += b"--frame\r\nContent-Type: image/jpeg\r\n\r\n" + encoded(jpeg) + b"\r\n"
    server.answers = [(body, 0, "multipart/x-mixed-replace; boundary=frame")]
    ticks = iter(range(1000))
    source = open_stream(server.url, fps=2, backoff=QUICK, clock=lambda: next(ticks) * 0.25)
    assert source.is_live
    seconds, _ = read(source)
    assert seconds[:3] == [0, 0.5, 1.0]


def encoded(frame):
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt = frame.width, frame.height, "yuvj420p"
    codec.time_base = Fraction(1, 25)
    return b"".join(bytes(packet) for packet in [*codec.encode(frame.reformat(format="yuvj420p")), *codec.encode(None)])


def test_what_is_no_video_is_one_sentence(server):
    server.answers = [(b"<html>not here</html>", 21, "text/html")]
    for _ in range(2):  # a page, then an error
        with pytest.raises(UserError, match="gives no video: check the address") as caught:
            open_source(server.url, backoff=QUICK)
        assert "\n" not in str(caught.value)


def test_a_playlist_from_outside_reads_no_file_of_this_machine(server, tmp_path, clip):
    (tmp_path / "secret.ts").write_bytes(clip("ts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n".encode()
    server.answers = [(playlist, len(playlist), "application/vnd.apple.mpegurl")]
    with pytest.raises(UserError, match=r"gives no video|holds no video|no picture size"):
        list(open_source(server.url, backoff=QUICK))


def test_a_server_that_hangs_is_given_up(monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="gives no video"):
        open_source(f"http://127.0.0.1:{silent.getsockname()[1]}/a", timeout=0.2)


SENDER = """
import sys, time
import av
import numpy as np
while True:
    try:
        with av.open(sys.argv[1], "w", format="rtsp", options={"rtsp_transport": "tcp"}) as out:
            stream = out.add_stream("libx264", rate=10, options={"g": "5", "tune": "zerolatency"})
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for k in range(30):
                frame = av.VideoFrame.from_ndarray(np.full((96, 128, 3), 8 * k, np.uint8), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        break
    except (av.error.FFmpegError, OSError):
        time.sleep(0.02)
"""


def test_rtsp():
    """FFmpeg's own RTSP on both sides: it listens here, and another process sends to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", SENDER, f"rtsp://127.0.0.1:{port}/live"]) as sender:
        source = open_source(
            f"rtsp://ann:secret@127.0.0.1:{port}/live",
            fps=10,
            options={"rtsp_flags": "listen", "listen_timeout": "1800"},
            timeout=PATIENCE,
            backoff=Backoff(attempts=0),
        )
        assert source.is_live
        seconds, sentence = read(source)
        sender.terminate()
    assert "secret" not in source.describe + sentence
    assert "ann" not in source.describe + sentence
    assert len(seconds) > 10
    assert seconds == sorted(set(seconds))
    assert "broke off" in sentence


def test_addresses():
    assert is_address("rtsp://a/b")
    assert is_address("gopher://a")
    assert not is_address("a.mp4")
    assert not is_address("C:\\a.mp4")
    for bad in ("gopher://a", "concat://a", "subfile://x"):
        with pytest.raises(UserError, match=r"There is no reading from .* give a file, or an address of http, https"):
            open_stream(bad)
    assert without_secrets("https://ann:pw@host:8/x?token=1#y") == "https://host:8/x"
    assert without_secrets("rtsp://[bad/x") == "rtsp://..."
