"""The page encoder: pictures of any size to tokens that stand where they stood; the trained and the folded one."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from casa import CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt
from casa.analysis.flops import frame_of, tower_flops
from casa.errors import UserError
from casa.models.auto import processor_for
from casa.models.image_processing_casa import image_processor_for
from casa.testing import tiny_processor, tiny_text_model
from casa.testing.tiny import spread
from casa.vision import encode, output_width
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig

SMALL = {"characters": "abc", "stem_sizes": (4, 6), "hidden_size": 8, "dilations": (1, 2)}


def small(**settings):
    torch.manual_seed(1)
    return spread(PageEncoder(PageEncoderConfig(**SMALL | settings))).eval()


def pixels_of(encoder, *images):
    return image_processor_for(encoder.config)(list(images), return_tensors="pt")


def noise(width, height, seed=1):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_keeps_its_pixels_and_is_padded_to_whole_tokens():
    encoder, image = small(), noise(70, 70)
    made = pixels_of(encoder, image)
    assert made["image_grid_thw"].tolist() == [[1, 5, 3]]
    blocks = made["pixel_values"].view(5, 3, 3, 16, 32).permute(2, 0, 3, 1, 4).reshape(3, 80, 96)
    wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(blocks[:, :70, :70], wanted, rtol=0, atol=1e-6)
    assert torch.equal(blocks[:, 70:, :70], blocks[:, 69:70, :70].expand(-1, 10, -1))
    assert torch.equal(blocks[:, :, 70:], blocks[:, :, 69:70].expand(-1, -1, 26))


@pytest.mark.parametrize(
    ("size", "grid"), [((20, 20), (4, 2)), ((2000, 500), (8, 16)), ((1, 900), (120, 1)), ((129, 127), (8, 5))]
)
def test_bounds_hold_with_the_padding_and_proportions_are_kept(size, grid):
    settings = {"min_pixels": 64 * 64, "max_pixels": 256 * 256}
    processor = image_processor_for(PageEncoderConfig(**SMALL, **settings))
    made = processor([noise(*size)], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, *grid]]
    assert processor.patch_grid(size[1], size[0]) == grid
    assert grid[0] * 16 * grid[1] * 32 <= 256 * 256


@torch.no_grad()
@pytest.mark.parametrize("parts", [("features",), ("classes",), ("places",), ("features", "classes", "places")])
def test_tokens_are_the_cells_of_their_place(parts):
    encoder = small(token_parts=parts)
    made = pixels_of(encoder, noise(96, 64), noise(64, 96, 2), noise(96, 64, 3))
    tokens = encode(encoder, made["pixel_values"], made["image_grid_thw"])
    assert tokens.shape == (4 * 3 + 6 * 2 + 4 * 3, output_width(encoder.config))
    if parts == ("features",):
        # row 1, column 2 of the third picture: rows 2 and 3, columns 16 to 23 of its cells
        picture = torch.from_numpy(np.array(noise(96, 64, 3))).permute(2, 0, 1)[None] / 127.5 - 1
        wanted = encoder(picture)[0, :, 2:4, 16:24].permute(1, 2, 0).flatten()
        torch.testing.assert_close(tokens[12 + 12 + 1 * 3 + 2], wanted, rtol=1e-5, atol=1e-5)
    if parts == ("classes",):
        torch.testing.assert_close(tokens.view(len(tokens), 16, 4).sum(-1), torch.ones(len(tokens), 16))
    if parts == ("places",):
        assert torch.equal(tokens[:12], tokens[24:])
        assert len(tokens[:12].unique(dim=0)) == 12
        torch.testing.assert_close(tokens[0], tokens[12])  # pixels, not shares of the picture


@torch.no_grad()
def test_folded_gives_what_the_trained_one_gives():
    encoder = small(batch_norm=True)
    for _ in range(3):
        encoder.train()(torch.randn(2, 3, 32, 32))
    folded, picture = encoder.eval().folded(), torch.randn(1, 3, 32, 64)
    assert not any("running" in name for name in folded.state_dict())
    torch.testing.assert_close(folded(picture), encoder(picture), rtol=1e-4, atol=1e-4)
    assert torch.equal(folded.train()(picture), folded.eval()(picture))
    torch.testing.assert_close(folded.tokens(picture), encoder.tokens(picture), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_gives_eyes_to_a_text_model_and_is_saved_with_it(tmp_path):
    encoder = small(token_parts=("features", "classes", "places"))
    model = adapt(tiny_text_model(dtype=torch.float32), FusionConfig(), vision=encoder).eval()
    spread(model.projector)
    processor = processor_for(tiny_processor().tokenizer, encoder.config)
    inputs = processor(images=[noise(70, 40)], text="ab<image>cd")
    logits = model(**inputs).logits
    assert not torch.allclose(logits, model(**processor(images=[noise(70, 40, 2)], text="ab<image>cd")).logits)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = CasaForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = CasaProcessor.from_pretrained(tmp_path)(images=[noise(70, 40)], text="ab<image>cd")
    torch.testing.assert_close(again(**inputs).logits, logits)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is type(processor.image_processor)
    frame = frame_of(model, 40, 70)
    assert (frame.rows, frame.columns) == (3, 3)
    weights = sum(p.numel() for name, p in model.vision.named_parameters() if p.dim() == 4 and "classifier" not in name)
    assert 0 < tower_flops(model.vision, frame) < 2 * weights * 48 * 96


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"token_size": (16, 30)}, "token_size"),
        ({"token_size": (0, 32)}, "token_size"),
        ({"token_parts": ()}, "empty"),
        ({"token_parts": ("features", "colours")}, "'colours'"),
    ],
)
def test_what_cannot_be_is_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        PageEncoderConfig(**SMALL, **settings)
