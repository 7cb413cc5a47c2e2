"""Pictures from outside: three formats, in size, and one sentence for everything else."""

import base64
import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.serving import Limits, pictures
from casa.serving.pictures import keep_pillow_quiet, read_address, read_picture
from casa.testing import claimed_png

LIMITS = Limits()


def encoded(kind, size=(40, 30), **settings):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_three_formats(kind):
    picture = read_picture(encoded(kind), LIMITS)
    assert (picture.mode, picture.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(picture).astype(int) - (200, 30, 40)).max() < 12


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "no JPEG"),
        (b"hello, this is text", "no JPEG"),
        (encoded("GIF"), "no JPEG"),
        (encoded("BMP"), "no JPEG"),
        (claimed_png(60_000, 60_000), "megapixels"),
        (claimed_png(7_000, 7_000), "million pixels"),
        (claimed_png(40, 40), "damaged"),
        (encoded("PNG")[:60], "damaged"),
        (encoded("JPEG")[:300], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no picture"),
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
        (f"data:image/png,{body}", "written"),
        ("data:image/png;base64", "written"),
        ("data:image/png;base64,@@@", "damaged"),
        ("data:image/png;base64,", "no JPEG"),
        ("file:///etc/passwd", "data: address"),
        ("/etc/passwd", "data: address"),
        ("", "data: address"),
        ("https://example.org/a.png", "does not fetch"),
    ]:
        with pytest.raises(UserError, match=word):
            read_address(wrong, LIMITS, False)


def test_pictures_are_decoded_side_by_side(monkeypatch):
    """A frame does not wait for the picture of a chat."""
    both = threading.Barrier(2)
    plain = pictures.picture_from

    def decode(file):
        both.wait(10)
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
