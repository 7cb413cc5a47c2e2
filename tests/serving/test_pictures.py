"""Pictures from outside: the formats that casa reads, in size, and one sentence for everything else."""

import base64
import io
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media import VideoWriter
from casa.serving import Limits, pictures
from casa.serving.pictures import keep_pillow_quiet, read_address, read_frame, read_picture, read_video
from casa.testing import PATIENCE, claimed_png

LIMITS = Limits()


def encoded(kind, size=(40, 30), **settings):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_what_casa_reads_the_server_takes(kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(kind, (64, 48))
    for picture in (read_picture(data, LIMITS), read_frame(data, LIMITS), read_address(as_data(data), LIMITS, False)):
        assert (picture.mode, picture.size) == ("RGB", (64, 48))
        assert np.abs(np.asarray(picture).astype(int) - (200, 30, 40)).max() < 12
    with pytest.raises(UserError, match="64 x 48"):
        read_picture(data, Limits(decoded_pixels=3000))


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_of_many_pictures_the_first(kind):
    rest = [Image.new("RGB", (40, 30), shade) for shade in ("white", "black")]
    picture = read_picture(encoded(kind, save_all=True, append_images=rest), LIMITS)
    assert np.abs(np.asarray(picture).astype(int) - (200, 30, 40)).max() < 12


def test_heic_without_its_reader_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"HEIC picture: install casa-vlm\[heic\], or save it as JPEG"):
        read_picture(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), LIMITS)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "is empty"),
        (b"hello, this is text", "as a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "as a picture"),
        (claimed_png(60_000, 60_000), "megapixels"),
        (claimed_png(7_000, 7_000), "million pixels"),
        (claimed_png(40, 40), "damaged"),
        (encoded("PNG")[:60], "damaged"),
        (encoded("JPEG")[:300], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "as a picture"),
        (b"RIFF\x00\x00\x00\x00WEBP" + bytes(40), "picture"),
        (encoded("PNG", (400, 1)), "200"),
    ],
)
def test_everything_else_is_one_sentence(data, word):
    with pytest.raises(UserError, match=word) as caught:
        read_picture(data, LIMITS)
    assert str(caught.value).count("\n") == 0


def test_large_pictures_are_made_smaller():
    picture = read_picture(encoded("PNG", (400, 200)), Limits(picture_pixels=5000))
    assert picture.size == (100, 50)


def test_data_addresses():
    body = base64.b64encode(encoded("PNG")).decode()
    assert read_address(f"data:image/png;base64,{body}", LIMITS, False).size == (40, 30)
    assert read_address(f"DATA:image/png;BASE64,{body}", LIMITS, False).size == (40, 30)
    for wrong, word in [
        (f"data:image/png,{body}", "as a picture"),
        ("data:image/png;base64", "data:image/png;base64,..."),
        ("data:image/png;base64,@@@", "no valid base64"),
        ("data:image/png;base64,", "is empty"),
        ("file:///etc/passwd", "data: address"),
        ("/etc/passwd", "data: address"),
        ("", "data: address"),
        ("https://example.org/a.png", "does not fetch"),
    ]:
        with pytest.raises(UserError, match=word):
            read_address(wrong, LIMITS, False)


@pytest.fixture
def film(tmp_path):
    """The data: address of a film whose k-th frame has the shade 10 k."""

    def make(count, fps=10, kind="mp4", size=(64, 48)):
        path = tmp_path / f"film.{kind}"
        with VideoWriter(path, size, fps=fps, crf=5) as video:
            for k in range(count):
                video.write(Image.new("RGB", size, (10 * k % 250,) * 3))
        return as_data(path.read_bytes())

    return make


def as_data(data):
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


def shades(frames):
    return [round(float(np.asarray(frame).mean()) / 10) for frame in frames]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
def test_a_video_becomes_frames_evenly_spaced(film, kind):
    # two a second
    assert shades(read_video(film(20, kind=kind), LIMITS, False, 16)) == [0, 5, 10, 15]
    # of a longer one, as many as there may be, from beginning to end
    assert shades(read_video(film(24, fps=1, kind=kind), Limits(video_frames=6), False, 16)) == [0, 4, 8, 12, 16, 20]
    assert shades(read_video(film(24, fps=1, kind=kind), LIMITS, False, 3)) == [0, 8, 16]
    assert shades(read_video(film(1, kind=kind), LIMITS, False, 3)) == [0]


def test_the_frames_of_a_video_share_their_pixels(film):
    frames = read_video(film(24, fps=1, size=(640, 480)), Limits(picture_pixels=100_000), False, 16)
    assert len(frames) == 8
    assert 380_000 < sum(frame.width * frame.height for frame in frames) <= 400_000


def test_videos_that_are_none_or_too_much(film, tmp_path):
    whole = base64.b64decode(film(20).partition(",")[2])
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(whole)
    playlist = f"#EXTM3U\n#\0\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    listed = f"ffconcat version 1.0\n#\0\nfile {secret}\n".encode()
    for data, limits, word in [
        (b"", LIMITS, "no MP4"),
        (b"hello", LIMITS, "no MP4"),
        (encoded("PNG"), LIMITS, "no MP4"),
        (playlist, LIMITS, "no MP4"),
        (listed, LIMITS, "no MP4"),
        (b"G" + playlist, LIMITS, "cannot be read"),
        (b"RIFF" + bytes(200), LIMITS, "cannot be read"),
        (whole[:24] + bytes(500), LIMITS, "cannot be read"),
        (whole, Limits(decoded_pixels=3000), "64 x 48"),
        (whole, Limits(video_seconds=1e-9), "longer than|cannot be read"),
    ]:
        with pytest.raises(UserError, match=word) as caught:
            read_video(as_data(data), limits, False, 8)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not fetch videos"):
        read_video("https://example.org/a.mp4", LIMITS, False, 8)
    with pytest.raises(UserError, match="public internet; send the video"):
        read_video("http://[::127.0.0.1]/a.mp4", LIMITS, True, 8)
    with pytest.raises(UserError, match="data:video/mp4"):
        read_video(str(secret), LIMITS, False, 8)


def test_whatever_demuxer_is_behind_the_first_bytes_no_playlist_is_read(film, tmp_path, monkeypatch):
    """What FFmpeg may read is listed; were it not, a list of files would lead to this machine's own."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(base64.b64decode(film(20).partition(",")[2]))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    monkeypatch.setattr(pictures, "is_video", lambda _: True)
    with pytest.raises(UserError, match="cannot be read"):
        read_video(as_data(playlist), LIMITS, False, 8)


def test_pictures_are_decoded_side_by_side(monkeypatch):
    """A frame does not wait for the picture of a chat."""
    both = threading.Barrier(2)
    plain = pictures.picture_from

    def decode(file):
        both.wait(PATIENCE)
        return plain(file)

    monkeypatch.setattr(pictures, "picture_from", decode)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda kind: read_picture(encoded(kind), LIMITS).size, ["PNG", "JPEG"]))
    assert found == [(40, 30), (40, 30)]


def test_no_thread_turns_warnings_off_and_on(monkeypatch):
    def touched(**_):
        raise AssertionError("warnings are of the whole process")

    monkeypatch.setattr(warnings, "catch_warnings", touched)
    assert read_picture(encoded("PNG"), LIMITS).size == (40, 30)


def test_what_pillow_warns_of_is_left_out_once_for_all():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_pillow_quiet()
        warnings.warn_explicit("damage", UserWarning, "a.py", 1, "PIL.TiffImagePlugin")
        with pytest.raises(UserWarning, match="other"):
            warnings.warn_explicit("other", UserWarning, "a.py", 1, "elsewhere")
