"""The processor that comes with an insertion VLM: its template and delimiters stay, its placeholders go."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from casa import CasaProcessor
from casa.errors import UserError
from casa.models import processor_of
from casa.models.auto import auto_processor
from casa.testing import tiny_backbone

QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for part in m.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)
SMOL = ("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>")
SMOL_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}"
    " {{ part.text }}{% endif %}{% endfor %}<end_of_utterance>{% endfor %}"
)
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]


def folder_of(kind, path, special, template, pictures=None):
    """What a VLM's folder holds besides weights: config, tokenizer, template and picture settings."""
    words = {word: number for number, word in enumerate(["<pad>", *special, "user", "what", "is", "it", "?"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="?")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.save_pretrained(path)
    tiny_backbone(kind).config.save_pretrained(path)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    if pictures is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(pictures))
    return path


def chat_with(picture):
    chat = json.loads(json.dumps(CHAT))
    chat[0]["content"][0]["image"] = picture
    return chat


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwens_placeholders_go_and_its_delimiters_stay(kind, tmp_path):
    settings = {"min_pixels": 28 * 28, "max_pixels": 56 * 56, "image_mean": [0.1, 0.2, 0.3]}
    processor = processor_of(folder_of(kind, tmp_path, QWEN, QWEN_TEMPLATE, settings))
    inputs = processor.apply_chat_template(chat_with(PICTURE), tokenize=True, return_dict=True, return_tensors="pt")
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert words[:4] == ["<|im_start|>", "user", "<|vision_start|>", "<|vision_end|>"]
    assert inputs["image_positions"].tolist() == [[0, 3]]
    rows, columns = inputs["image_grid_thw"][0, 1:].tolist()
    assert rows * columns * 14 * 14 <= 56 * 56, "the VLM's own bound on pixels"
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert (processor.frame_prefix, processor.frame_suffix) == ("<|vision_start|>", "<|vision_end|>")


@pytest.mark.parametrize("template", ["chat_template.json", "chat_template.jinja"])
def test_a_hubs_name_gives_what_the_same_folder_gives(template, tmp_path, hub):
    settings = {"min_pixels": 28 * 28, "max_pixels": 56 * 56, "image_mean": [0.1, 0.2, 0.3]}
    folder = folder_of("qwen2_5_vl", tmp_path / "vlm", QWEN, QWEN_TEMPLATE, settings)
    if template.endswith(".jinja"):
        (folder / "chat_template.json").unlink()
        (folder / template).write_text(QWEN_TEMPLATE)
    shutil.copytree(folder, tmp_path / "whole" / "inside")
    wanted = processor_of(folder)
    for found in (processor_of(hub(folder)), processor_of(tmp_path / "whole", subfolder="inside")):
        assert found.chat_template == wanted.chat_template
        assert found.image_processor.to_dict() == wanted.image_processor.to_dict()
    assert auto_processor("someone/model").image_processor.to_dict() == wanted.image_processor.to_dict()


def test_smolvlms_delimiters_are_written_where_its_processor_would(tmp_path):
    processor = processor_of(folder_of("smolvlm", tmp_path, SMOL, SMOL_TEMPLATE, {"size": {"longest_edge": 2048}}))
    inputs = processor.apply_chat_template(chat_with(PICTURE), tokenize=True, return_dict=True, return_tensors="pt")
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert words[1:4] == ["<fake_token_around_image>", "<global-img>", "<fake_token_around_image>"]
    assert inputs["image_positions"].tolist() == [[0, 3]]
    assert inputs["pixel_values"].shape == (1, 3, 56, 56), "one tile"


def test_it_is_saved_and_loaded(tmp_path):
    processor = processor_of(folder_of("qwen2_5_vl", tmp_path / "vlm", QWEN, QWEN_TEMPLATE), gist_ids=[61, 62])
    processor.save_pretrained(tmp_path / "casa")
    again = CasaProcessor.from_pretrained(tmp_path / "casa")
    one, two = (
        p.apply_chat_template(chat_with(PICTURE), tokenize=True, return_dict=True, return_tensors="pt")
        for p in (processor, again)
    )
    assert one["input_ids"].tolist() == two["input_ids"].tolist()
    assert 61 in one["input_ids"][0].tolist()
    assert one["pixel_values"].equal(two["pixel_values"])


def test_a_text_only_model_has_no_such_processor(tmp_path):
    with pytest.raises(UserError, match="text-only model"):
        processor_of(folder_of("llama", tmp_path, QWEN, QWEN_TEMPLATE))


def test_a_folder_without_template_is_refused(tmp_path):
    folder = folder_of("qwen2_5_vl", tmp_path, QWEN, QWEN_TEMPLATE)
    (folder / "chat_template.json").unlink()
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        processor_of(folder)


@contextmanager
def damaged(file, content):
    kept = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink() if kept is None else file.write_bytes(kept)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """One folder for all damage; each puts back what was there."""
    return folder_of("qwen2_5_vl", tmp_path_factory.mktemp("vlm"), QWEN, QWEN_TEMPLATE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", b'{"image_mean": [0.1'),
        ("preprocessor_config.json", b"[]"),
        ("preprocessor_config.json", b'{"image_mean": "\xff"}'),
        ("chat_template.json", b"{}"),
        ("chat_template.json", b'{"chat_template": 3}'),
        ("chat_template.json", b""),
    ],
)
def test_damaged_files_are_named_with_their_remedy(vlm, name, content):
    with damaged(vlm / name, content), pytest.raises(UserError, match=rf"{name} cannot be read; fetch it again"):
        processor_of(vlm)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("tokenizer.json", b"{", "tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer"),
        ("chat_template.json", b'{"chat_template": "{% if %}"}', "chat template"),
    ],
)
def test_what_libraries_find_damaged_is_told_in_a_sentence(vlm, name, content, part):
    words = rf"{vlm} has no {part} that can be read \(.+\): fetch its files again"
    with damaged(vlm / name, content), pytest.raises(UserError, match=words):
        processor_of(vlm)
