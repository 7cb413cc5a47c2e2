"""What a picture will cost, told from its header: what the image processors make of it."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from casa.data.record import BadRecord, Picture
from casa.errors import UserError
from casa.models.image_processing_casa import CasaFlexibleImageProcessor, CasaSquareImageProcessor, image_processor_for
from casa.testing import tiny_casa_over, tiny_processor
from casa.training.samples import PictureGrids, fold_of, picture_size
from casa.vision.page_encoder import PageEncoderConfig

KINDS = {
    "qwen": tiny_processor().image_processor,
    "flexible": CasaFlexibleImageProcessor(patch_size=16, max_num_patches=64),
    "page": image_processor_for(PageEncoderConfig(min_pixels=32 * 32, max_pixels=128 * 128)),
    "square": CasaSquareImageProcessor(patch_size=14, size={"height": 56, "width": 56}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), most=st.none() | st.integers(1, 40))
def test_the_grid_is_the_processors(kind, width, height, most):
    grids = PictureGrids(KINDS[kind])
    if max(width, height) > 200 * min(width, height):
        return
    image = Image.new("RGB", (width, height))
    made = KINDS[kind](images=[image], return_tensors="pt", **grids.arguments(most))
    assert (1, *grids.grid(width, height, most)) == tuple(made["image_grid_thw"][0].tolist())


def test_a_bound_is_kept_where_the_size_can_change():
    grids = PictureGrids(KINDS["qwen"])
    assert grids.tokens(grids.grid(280, 280)) == 64
    assert grids.tokens(grids.grid(280, 280, 20)) == 16
    page = PictureGrids(KINDS["page"])
    assert page.shrinks
    assert page.tokens(page.grid(280, 280)) == 8 * 4
    assert page.tokens(page.grid(280, 280, 20)) == 6 * 3
    square = PictureGrids(KINDS["square"])
    assert not square.shrinks
    assert square.tokens(square.grid(280, 280, 1)) == 16


def test_too_elongated_a_picture_is_refused():
    with pytest.raises(BadRecord, match="too elongated"):
        PictureGrids(KINDS["qwen"]).grid(3000, 10)


def test_an_unknown_processor_is_refused():
    with pytest.raises(UserError, match="cannot tell the size"):
        PictureGrids(object())


def test_the_header_is_enough_and_says_which_way_is_up():
    held = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((640, 48), 90).save(held, "JPEG", exif=exif)
    data = held.getvalue()
    assert picture_size(Picture(data)) == (48, 640)
    assert picture_size(Picture(data[: len(data) // 2])) == (48, 640)


@pytest.mark.parametrize("source", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_has_no_header_is_refused(source, tmp_path):
    with pytest.raises(BadRecord) as refused:
        picture_size(Picture(source))
    assert refused.value.reason == "unreadable-picture"
    with pytest.raises(BadRecord) as refused:
        picture_size(Picture(tmp_path / "gone.png"))
    assert refused.value.reason == "missing-picture"


@pytest.mark.parametrize(("kind", "fold"), [("llama", 2), ("qwen2_5_vl", 2), ("smolvlm", 2)])
def test_the_fold_is_that_of_the_models_image_tokens(kind, fold):
    assert fold_of(tiny_casa_over(kind).config) == fold
