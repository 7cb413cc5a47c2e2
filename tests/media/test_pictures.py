"""Pictures: every kind becomes upright RGB, every bad file becomes one plain sentence."""

import base64
import http.server
import io
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from casa.errors import UserError
from casa.media import open_source, probe
from casa.media.pictures import (
    MAX_PIXELS,
    as_picture,
    check_picture,
    data_bytes,
    open_picture,
    picture_from,
    picture_size,
)
from casa.testing import PATIENCE, claimed_png

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noisy(width=64, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "gif", "webp", "jpg", "jp2", "avif"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (40, 30), (200, 60, 30)).save(path)
    image = open_picture(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image).astype(int) - (200, 60, 30)).max() <= 6


def test_content_counts_not_the_name(tmp_path):
    path = tmp_path / "photo.png"
    noisy().save(path, format="JPEG")
    assert open_picture(path).size == (64, 48)


def test_open_files_and_strings(tmp_path):
    path = tmp_path / "a.png"
    noisy().save(path)
    with path.open("rb") as file:
        from_file = open_picture(file)
    assert from_file.tobytes() == open_picture(str(path)).tobytes() == noisy().tobytes()
    assert open_picture(io.BytesIO(path.read_bytes())).tobytes() == noisy().tobytes()


UPRIGHT = np.zeros((40, 64, 3), np.uint8)
UPRIGHT[:20, :32] = RED  # the mark of the upper left corner
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation):
    """`UPRIGHT` as a camera held that way stores it, and the tag that says so."""
    stored, exif = Image.fromarray(UPRIGHT), Image.Exif()
    exif[0x0112] = orientation
    return (stored.transpose(UNDO[orientation]) if orientation in UNDO else stored), exif


def close(image, wanted, most=60):
    """Whether it is the same picture, lossy codecs allowed for."""
    found = np.asarray(image).astype(int)
    return found.shape == wanted.shape and np.abs(found - wanted).mean() < most / 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "avif", "heic"])
def test_exif_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    stored, exif = turned(orientation)
    if suffix == "heic":
        heif = pytest.importorskip("pillow_heif").from_pillow(stored)
        heif.save(path, exif=exif.tobytes())
    else:
        stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    wanted = UPRIGHT.astype(int)
    assert picture_size(path) == (64, 40)
    with path.open("rb") as file:
        assert picture_size(file) == (64, 40)
    assert close(open_picture(path), wanted)
    assert close(as_picture(path.read_bytes()), wanted)
    if suffix != "heic":
        with Image.open(path) as opened:
            assert close(as_picture(opened), wanted)
        # neither a copy nor what came out of the door is turned again
        with Image.open(path) as opened:
            assert close(as_picture(as_picture(opened.copy())), wanted)


def test_orientation_in_xmp_and_behind_broken_exif():
    """Both are kept by programs that edit pictures."""
    stored, _ = turned(6)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    held = io.BytesIO()
    stored.save(held, "JPEG", xmp=xmp)
    assert close(as_picture(held.getvalue()), UPRIGHT.astype(int))
    assert picture_size(io.BytesIO(held.getvalue())) == (64, 40)
    stored.info["exif"] = b"Exif\0\0broken"
    assert as_picture(stored).size == stored.size


def test_of_a_phones_several_pictures_the_first(tmp_path):
    stored, exif = turned(6)
    stored.save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", stored.size, BLUE)], exif=exif)
    with Image.open(tmp_path / "a.mpo") as opened:
        assert opened.format == "MPO"
        assert close(as_picture(opened), UPRIGHT.astype(int))
    assert close(open_picture(tmp_path / "a.mpo"), UPRIGHT.astype(int))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    seen = [as_picture(image)]
    if mode in ("RGBA", "LA"):
        image.save(tmp_path / "a.png")
        seen.append(open_picture(tmp_path / "a.png"))
    for picture in seen:
        assert picture.getpixel((0, 0)) == WHITE
        assert picture.getpixel((1, 0)) == (127, 127, 127)


def test_transparent_palette_and_transparent_colour(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    colour = Image.new("RGB", (2, 1), BLUE)
    colour.putpixel((0, 0), GREEN)
    colour.save(tmp_path / "c.png", transparency=GREEN)
    for name in ("p.png", "c.png"):
        seen = open_picture(tmp_path / name)
        assert [seen.getpixel((x, 0)) for x in (0, 1)] == [WHITE, BLUE]


def grey(values):
    """A row of grey as its 8 bits, channels being the same."""
    found = np.asarray(values)
    assert (found == found[..., :1]).all()
    return found[0, :, 0].tolist()


def test_16_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 10, 257 * 200, 65535]], np.uint16)
    for suffix in ("png", "tiff"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        assert grey(open_picture(tmp_path / f"a.{suffix}")) == [0, 10, 200, 255]
        with Image.open(tmp_path / f"a.{suffix}") as opened:
            assert grey(as_picture(opened)) == [0, 10, 200, 255]
    big = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert grey(as_picture(big)) == [0, 10, 200, 255]
    assert grey(as_picture(Image.fromarray(values.astype(np.int32)))) == [0, 10, 200, 255]  # mode I


def test_grey_of_32_bits_that_holds_8_or_16():
    eight = Image.fromarray(np.array([[0, 10, 200, 255]], np.uint8))
    assert grey(as_picture(eight.convert("I"))) == grey(as_picture(eight.convert("F"))) == [0, 10, 200, 255]
    for mode, values in (("I", [[0, 70_000]]), ("I", [[-1, 200]]), ("F", [[0.0, 1.5]]), ("F", [[0.0, 70_000.0]])):
        image = Image.fromarray(np.array(values, np.int32 if mode == "I" else np.float32))
        with pytest.raises(UserError, match=r"values from .* to .*, which may mean anything: give"):
            as_picture(image)


def test_other_modes(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "f.tiff")
    assert np.asarray(open_picture(tmp_path / "f.tiff"))[0, :, 0].tolist() == [0, 128, 255]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.tiff")
    assert open_picture(tmp_path / "c.tiff").getpixel((0, 0)) == RED
    Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
    assert open_picture(tmp_path / "b.png").getpixel((0, 0)) == WHITE
    Image.new("L", (8, 8), 7).save(tmp_path / "l.png")
    assert open_picture(tmp_path / "l.png").getpixel((0, 0)) == (7, 7, 7)


def test_of_an_animation_the_first_frame(tmp_path):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert open_picture(tmp_path / "a.gif").getpixel((0, 0)) == RED


@pytest.mark.parametrize("size", [(60_000, 60_000), (8193, 8192), (11_000, 11_000), (20_000, 20_000)])
def test_huge_pictures_are_refused_from_the_header(tmp_path, size):
    """Beyond our limit, beyond where Pillow warns, and beyond where Pillow raises; never decoded."""
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    path = tmp_path / "huge.png"
    path.write_bytes(claimed_png(*size))
    with pytest.raises(UserError, match=r"more than 64 megapixels.*make it smaller"):
        open_picture(path)
    assert limit == Image.MAX_IMAGE_PIXELS
    assert warnings.filters == filters


def test_the_largest_size_passes_the_header_check(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(claimed_png(8192, MAX_PIXELS // 8192))
    with pytest.raises(UserError, match="damaged or cut off"):  # and so gets as far as its missing pixels
        open_picture(path)


@pytest.mark.parametrize("size", [(201, 1), (1, 201)])
def test_aspect_ratio(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="longer than 200 times its width: crop it"):
        open_picture(tmp_path / "a.png")
    Image.new("RGB", (200, 1)).save(tmp_path / "b.png")
    assert open_picture(tmp_path / "b.png").size == (200, 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_cut_off_files(tmp_path, suffix, part):
    path = tmp_path / f"a.{suffix}"
    noisy(160, 120).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match="damaged"):
        open_picture(path)


def test_a_picture_that_was_closed_is_not_called_damaged(tmp_path):
    noisy().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as left:
        pass
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    for given in (left, closed):
        with pytest.raises(UserError, match="was closed before it was read: use it while it is open"):
            as_picture(given)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with Image.open(tmp_path / "a.png") as cut, pytest.raises(UserError, match="damaged or cut off"):
        as_picture(cut)


def test_files_that_are_no_pictures(tmp_path):
    text, empty, junk = tmp_path / "text.png", tmp_path / "empty.png", tmp_path / "junk.png"
    text.write_text("This is not a picture, as everyone can read.\n")
    empty.touch()
    junk.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(UserError, match=r"text\.png is a text file, not a picture: name a picture file\."):
        open_picture(text)
    with pytest.raises(UserError, match="is empty: copy or download the picture again"):
        open_picture(empty)
    with pytest.raises(UserError, match="is empty"):
        open_picture(io.BytesIO())
    with pytest.raises(UserError, match=r"cannot be read as a picture.*save it as PNG or JPEG"):
        open_picture(junk)
    with pytest.raises(UserError, match=r"There is no file .*check the name of the picture"):
        open_picture(tmp_path / "missing.png")
    with pytest.raises(UserError, match="is a directory: name one picture file"):
        open_picture(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        open_picture("/dev/zero")
    with pytest.raises(UserError, match="There is no file"):
        open_picture("a\0b.png")
    with pytest.raises(TypeError):
        open_picture(3)  # pyright: ignore[reportArgumentType]


def test_no_format_that_runs_programs(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="is a text file"):
        open_picture(path)


def test_check_picture_accepts():
    array = np.asarray(noisy())
    assert check_picture(array).tobytes() == array.tobytes()
    flipped = array[:, ::-1]  # not contiguous
    assert np.array_equal(np.asarray(check_picture(flipped)), flipped)
    image = noisy()
    seen = check_picture(image)
    assert seen is not image  # the caller's picture is never drawn on
    assert seen.tobytes() == image.tobytes()
    assert check_picture(Image.new("RGBA", (2, 2))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 4, 3), np.float32), "array of float32: give uint8"),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\): give \(height, width, 3\)"),
        (np.zeros((3, 4, 4), np.uint8), "give .height, width, 3"),
        (np.zeros((1, 4, 4, 3), np.uint8), "give .height, width, 3"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros((1, 201, 3), np.uint8), "crop it"),
        (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "megapixels"),
    ],
)
def test_check_picture_refuses_arrays(array, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_picture(array)


@pytest.mark.parametrize("wrong", [None, "a.png", [[0]], b"\x89PNG", 3])
def test_check_picture_refuses_types(wrong):
    with pytest.raises(TypeError, match="give a PIL image or a uint8 array"):
        check_picture(wrong)


SHADES = np.random.default_rng(5).integers(0, 256, (12, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a,
        lambda a: a.transpose(2, 0, 1),
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.uint16) * 257,
        lambda a: a.astype(np.int32) * 257,
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.float64) / 255,
        lambda a: (a / 255 + 2e-4 * (a == 255)).astype(np.float32),  # arithmetic leads a little beyond white
        lambda a: np.concatenate([a, np.full((12, 16, 1), 255, np.uint8)], axis=2),
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
        lambda a: (torch.from_numpy(a).double() / 255).requires_grad_(),
        lambda a: torch.from_numpy(a).bfloat16(),  # whole numbers up to 256 are exact
        lambda a: (torch.from_numpy(a) / 255).half(),
        lambda a: torch.from_numpy(a.astype(np.uint16) * 257),
    ],
)
def test_arrays_and_tensors(make):
    assert np.array_equal(np.asarray(as_picture(make(SHADES))), SHADES)


def test_where_channels_may_be_first_or_last_each_library_has_its_custom():
    values = SHADES[:3, :5]
    turned = values.transpose(2, 0, 1)  # (3, 3, 5) has them first for sure, (3, 5, 3) may have either
    assert as_picture(turned).size == as_picture(values).size == as_picture(torch.from_numpy(turned)).size == (5, 3)
    assert as_picture(torch.from_numpy(values)).size == (3, 5)
    assert np.array_equal(np.asarray(as_picture(torch.from_numpy(values), channels="last")), values)
    assert as_picture(values, channels="first").size == (3, 5)


def test_grey_arrays():
    values = np.array([[0, 10, 200]], np.uint8)
    for shaped in (values, values[..., None], torch.from_numpy(values)):
        assert grey(as_picture(shaped)) == [0, 10, 200]
    assert grey(as_picture(values[None], channels="first")) == [0, 10, 200]
    assert grey(as_picture(values > 5)) == [0, 255, 255]
    assert grey(as_picture(np.stack([values, values * 0], axis=2))) == [255, 255, 255]  # with transparency


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.full((4, 4, 3), np.nan, np.float32), "not finite: give floats from 0 to 1"),
        (np.full((4, 4, 3), np.inf), "not finite"),
        (np.array([[0.0, 1.2]]), "from 0 to 1.2, which may mean anything: give floats from 0 to 1 or from 0 to 255"),
        (torch.tensor([[-2.1, 2.6]]), "from -2.1 to 2.6, which may"),
        (np.array([[0.0, 300.0]]), "to 300, which may"),
        (np.array([[-1, 5]]), "from -1 to 5, which may mean anything: give uint8"),
        (np.array([[0, 65536]]), "give uint8 from 0 to 255 or uint16"),
        (np.array([[1j]]), "array of complex128: give numbers"),
        (np.array([["a"]]), "give numbers"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"shape \(2, 3, 8, 8\): give \(height, width, 3\) or \(3, height, width\)"),
        (np.zeros((8, 8, 5), np.uint8), "give .height, width, 3"),
        (np.zeros(8, np.uint8), "give .height, width, 3"),
        (np.zeros((3, 0, 8), np.uint8), "at least one pixel"),
        (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "megapixels"),
    ],
)
def test_what_an_array_may_mean_is_not_guessed(array, sentence):
    with pytest.raises(UserError, match=sentence):
        as_picture(array)


def test_an_upright_rgb_picture_passes_as_it_is():
    image = noisy()
    assert as_picture(image) is image
    with pytest.raises(TypeError, match="is of type list: give a PIL image"):
        as_picture([[0]])
    with pytest.raises(UserError, match="mode LAB: save it as RGB"):
        as_picture(Image.new("LAB", (4, 4)))


def test_paths_bytes_and_addresses(tmp_path):
    path, held = tmp_path / "a picture.png", io.BytesIO()
    noisy().save(path)
    noisy().save(held, "PNG")
    plain = base64.b64encode(held.getvalue()).decode()
    wrapped = base64.encodebytes(held.getvalue()).decode()
    address = path.as_uri()
    assert "%20" in address
    for given in (
        path,
        str(path),
        address,
        held.getvalue(),
        bytearray(held.getvalue()),
        memoryview(held.getvalue()),
        held,
        f"data:image/png;base64,{plain}",
        f"DATA:image/png;base64,{wrapped}",
        plain,
        wrapped,
    ):
        assert as_picture(given).tobytes() == noisy().tobytes()
    assert data_bytes("data:,a%20b") == b"a b"
    for wrong, sentence in (
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,%%%", "no valid base64: encode"),
        ("data:image/png;base64,", "The picture is empty"),
        (plain[: len(plain) // 2 // 4 * 4], "The picture is damaged or cut off"),
        ("AAAA/no/such file.png", r"There is no file AAAA/no/such file\.png"),
        (b"no picture", "The picture cannot be read as a picture"),
    ):
        with pytest.raises(UserError, match=sentence):
            as_picture(wrong)


@pytest.mark.slow
def test_a_web_address_is_fetched(tmp_path):
    noisy().save(tmp_path / "a.png")

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            here = tmp_path / self.path[1:]
            self.send_response(200 if here.is_file() else 404)
            self.end_headers()
            self.wfile.write(here.read_bytes() if here.is_file() else b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        try:
            assert as_picture(f"{at}/a.png").tobytes() == noisy().tobytes()
            with pytest.raises(UserError, match=r"b\.png cannot be fetched \(.*404.*\): check it, or download"):
                as_picture(f"{at}/b.png")
        finally:
            server.shutdown()
    with pytest.raises(UserError, match="cannot be fetched"):
        as_picture(f"{at}/a.png")


def test_heic_is_an_extra_that_is_loaded_for_a_heic_picture_only(tmp_path, monkeypatch):
    heic = pytest.importorskip("pillow_heif").from_pillow(Image.new("RGB", (64, 40), RED))
    heic.save(tmp_path / "a.heic")
    noisy().save(tmp_path / "b.avif")
    code = (
        "import sys; from casa.media import open_picture; open_picture(sys.argv[1]); "
        "print('pillow_heif' in sys.modules); open_picture(sys.argv[2]); print('pillow_heif' in sys.modules)"
    )
    files = [str(tmp_path / "b.avif"), str(tmp_path / "a.heic")]
    found = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=PATIENCE)
    assert found.stdout.split() == ["False", "True"], found.stderr
    # FFmpeg reads such a file as a film whose frames have other sizes
    assert (probe(tmp_path / "a.heic").width, probe(tmp_path / "a.heic").height) == (64, 40)
    with open_source(tmp_path / "a.heic", fps=2) as source:
        assert [frame.image.size for frame in source] == [(64, 40)]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for given in (tmp_path / "a.heic", (tmp_path / "a.heic").read_bytes()):
        with pytest.raises(UserError, match=r"is a HEIC picture: install casa-vlm\[heic\], or save it as JPEG\."):
            as_picture(given)


def test_warnings_of_the_process_are_left_alone_where_threads_share_them(tmp_path, monkeypatch):
    """Several threads that each turn warnings off and on do not get them back as they were."""
    noisy().save(tmp_path / "a.png")

    def touched(**_):
        raise AssertionError("warnings are of the whole process")

    monkeypatch.setattr(warnings, "catch_warnings", touched)
    assert picture_from(tmp_path / "a.png").tobytes() == noisy().tobytes()
    with pytest.raises(AssertionError, match="whole process"):
        open_picture(tmp_path / "a.png")
