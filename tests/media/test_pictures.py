"""Pictures: every kind becomes upright RGB, every bad file becomes one plain sentence."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media.pictures import MAX_PIXELS, check_picture, open_picture, picture_from
from casa.testing import claimed_png

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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15] = RED  # the mark of the upper left corner
    stored = Image.fromarray(upright)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png")), upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.convert(mode).save(tmp_path / "a.png")
    seen = open_picture(tmp_path / "a.png")
    assert seen.getpixel((0, 0)) == WHITE
    assert seen.getpixel((1, 0)) == (127, 127, 127)


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


def test_16_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 10, 257 * 200, 65535]], np.uint16)
    for suffix in ("png", "tiff"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        assert np.asarray(open_picture(tmp_path / f"a.{suffix}"))[0, :, 0].tolist() == [0, 10, 200, 255]


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
    with pytest.raises(UserError, match=r"no picture that can be read.*save it as PNG or JPEG"):
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


def test_warnings_of_the_process_are_left_alone_where_threads_share_them(tmp_path, monkeypatch):
    """Several threads that each turn warnings off and on do not get them back as they were."""
    noisy().save(tmp_path / "a.png")

    def touched(**_):
        raise AssertionError("warnings are of the whole process")

    monkeypatch.setattr(warnings, "catch_warnings", touched)
    assert picture_from(tmp_path / "a.png").tobytes() == noisy().tobytes()
    with pytest.raises(AssertionError, match="whole process"):
        open_picture(tmp_path / "a.png")
