"""The processor of a text-only model and a tower, from their folders; what is damaged there is told in a sentence."""

from dataclasses import replace

import pytest

from casa import CasaProcessor, FusionConfig
from casa.errors import UserError
from casa.models.auto import auto_processor
from casa.testing import tiny_encoder, tiny_processor, tiny_text_model
from casa.training.config import ModelSettings
from casa.training.models import load_processor


@pytest.fixture
def folders(tmp_path):
    """Of a text model and of a tower, without weights."""
    text, tower = tmp_path / "text", tmp_path / "tower"
    tiny_text_model().config.save_pretrained(text)
    tiny_processor().tokenizer.save_pretrained(text)
    tiny_encoder().config.save_pretrained(tower)
    return text, tower


def test_a_tokenizer_and_a_tower_make_a_processor(folders):
    assert auto_processor(*folders).image_token == "<image>"
    with pytest.raises(UserError, match="needs an image encoder; give vision"):
        auto_processor(folders[0])


def test_the_shipped_towers_settings_come_with_its_name(folders):
    """For `casa adapt`, for recipes and for whoever calls this: what the tower was trained with."""
    wanted = CasaProcessor.from_pretrained("casa-tiny").image_processor.to_dict()
    assert auto_processor(folders[0], "casa-tiny").image_processor.to_dict() == wanted
    settings = ModelSettings(backbone=str(folders[0]), vision="casa-tiny", fusion=FusionConfig())
    assert load_processor(settings).image_processor.to_dict() == wanted
    smaller = load_processor(replace(settings, max_pixels=56 * 56)).image_processor
    assert dict(smaller.size) == {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    assert tuple(smaller.image_mean) == wanted["image_mean"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("tokenizer_config.json", "[]"), ("chat_template.jinja", "{% if %}")],
)
def test_a_damaged_tokenizer(folders, name, content):
    (folders[0] / name).write_text(content)
    with pytest.raises(
        UserError, match=rf"{folders[0]} has no tokenizer that can be read \(.+\): fetch its files again"
    ):
        auto_processor(*folders)
