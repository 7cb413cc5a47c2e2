"""The processor: chats with pictures to tokens without placeholders, and the places of the pictures."""

import base64
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.image_utils import PILImageResampling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from casa import CasaProcessor, StreamingSession
from casa.data.pictures import open_one
from casa.data.record import Picture
from casa.errors import UserError
from casa.models.image_processing_casa import CasaFlexibleImageProcessor, CasaSquareImageProcessor, image_processor_for
from casa.testing import claimed_png, tiny_casa, tiny_processor
from casa.vision.page_encoder import PageEncoderConfig

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "model:", "what", "is", "this", "and", "that", "nothing"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}model: {% endif %}"
)


def picture(width=56, height=28, shade=90):
    return Image.new("RGB", (width, height), (shade, 10, 200))


@pytest.fixture
def processor():
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    images = Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=1, merge_size=2, min_pixels=28 * 28)
    return CasaProcessor(images, tokenizer, chat_template=TEMPLATE)


def chat(*parts):
    content = [
        {"type": "image", "image": p} if isinstance(p, Image.Image) else {"type": "text", "text": p} for p in parts
    ]
    return [{"role": "user", "content": content}]


HOW = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def test_a_picture_leaves_a_place_and_no_placeholder(processor):
    inputs = processor.apply_chat_template(chat(picture(), "what is this", picture(28, 56), "and"), **HOW)
    words = [WORDS[token] for token in inputs["input_ids"][0].tolist()]
    assert words == ["user:", "what", "is", "this", "and", "model:"]
    assert inputs["image_positions"].tolist() == [[0, 1], [0, 4]]
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 4], [1, 4, 2]]
    assert inputs["pixel_values"].shape == (16, 3 * 14 * 14)
    assert set(inputs) == set(processor.model_input_names)
    assert processor.image_token_id not in inputs["input_ids"]


def test_rows_are_padded_on_the_left_and_places_move_along(processor):
    chats = [chat("what is", picture()), chat("nothing"), chat(picture(), picture(28, 28), "what is this and that")]
    inputs = processor.apply_chat_template(chats, padding=True, **HOW)
    lengths = [4, 3, 7]
    assert inputs["attention_mask"].tolist() == [[0] * (7 - n) + [1] * n for n in lengths]
    assert inputs["input_ids"][:2, 0].tolist() == [0, 0]
    assert inputs["image_positions"].tolist() == [[0, 6], [2, 1], [2, 1]]


@torch.no_grad()
def test_a_padded_batch_says_what_each_chat_says_alone(processor):
    model = tiny_casa()
    chats = [chat("what is", picture()), chat("nothing"), chat(picture(shade=5), "what", picture(28, 28, 77))]
    together = model(**processor.apply_chat_template(chats, padding=True, **HOW)).logits
    for row, one in zip(together, chats, strict=True):
        alone = model(**processor.apply_chat_template(one, **HOW)).logits[0]
        torch.testing.assert_close(row[-len(alone) :], alone, rtol=1e-10, atol=1e-10)


def test_text_alone_has_no_image_inputs(processor):
    inputs = processor.apply_chat_template(chat("what is this"), **HOW)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert tiny_casa()(**inputs).logits.shape == (1, 5, 61)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": "<image> what", "images": []}, "places for 1 pictures, but 0"),
        ({"text": "what", "images": [picture()]}, "places for 0 pictures, but 1"),
        ({"text": ["<image>", "what <image>"], "images": [[picture()], []]}, "places for 2 pictures, but 1"),
        (
            {"text": ["<image>", "<image> <image>"], "images": [[picture(), picture()], [picture()]]},
            r"places for \[1, 2\] pictures, but were given \[2, 1\]",
        ),
        ({"text": "what", "videos": [picture()]}, "frame by frame"),
        ({"images": [picture()]}, "give text"),
        ({"text": "what", "return_tensors": "tf"}, "return_tensors is 'tf'; give 'pt', 'np' or None"),
        ({"text": "what", "audio": [0.0]}, "leave audio out"),
        ({"text": ["what", "what is"], "padding": False}, "need padding=True"),
    ],
)
def test_what_does_not_fit_is_refused(processor, given, words):
    with pytest.raises(UserError, match=words):
        processor(**given)


def test_video_content_is_refused_not_dropped(processor):
    messages = [{"role": "user", "content": [{"type": "video", "video": "film.mp4"}, {"type": "text", "text": "what"}]}]
    for conversation in (messages, [messages]):
        with pytest.raises(UserError, match="frame by frame"):
            processor.apply_chat_template(conversation, **HOW)


def test_a_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(UserError, match="no token '<picture>'"):
        CasaProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")


def test_a_processor_brings_the_image_token_or_takes_the_tokenizers(processor):
    """Two arguments are enough, whatever the tokenizer has."""
    images, words = processor.image_processor, {"a": 0, "b": 1, "<|image_pad|>": 2}

    def tokenizer(*special, vocabulary=words):
        held = Tokenizer(WordLevel(dict(vocabulary), unk_token="a"))
        held.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
        fast = PreTrainedTokenizerFast(tokenizer_object=held, unk_token="a", pad_token="a")
        fast.add_special_tokens({"additional_special_tokens": list(special)})
        return fast

    bare = tokenizer("<tool>", vocabulary={"a": 0, "b": 1})
    made = CasaProcessor(images, bare)
    assert made.image_token == "<image>"
    assert {"<tool>", "<image>"} <= set(bare.all_special_tokens)
    assert made(images=picture(), text="b <image>b")["image_positions"].tolist() == [[0, 1]]
    assert CasaProcessor(images, tokenizer("<|image_pad|>")).image_token == "<|image_pad|>"
    in_words = CasaProcessor(images, tokenizer())
    assert in_words(images=picture(), text="b<|image_pad|>b")["image_positions"].tolist() == [[0, 1]]
    both = tokenizer("<image>", "<|image_pad|>")
    assert CasaProcessor(images, both).image_token == "<image>"
    # a template tells by what it writes
    writes = "{# no <image> #}" + TEMPLATE.replace("<image>", "<|image_pad|>")
    assert CasaProcessor(images, both, chat_template=writes).image_token == "<|image_pad|>"
    both.image_token = "b"
    assert CasaProcessor(images, both).image_token == "b"


def test_an_image_processor_that_counts_no_patches_is_refused(processor):
    with pytest.raises(UserError, match="SiglipImageProcessorPil does not say how many patches"):
        CasaProcessor(SiglipImageProcessorPil(), processor.tokenizer)


def test_saved_is_loaded_also_by_the_auto_class(processor, tmp_path):
    processor.frame_suffix = "that"
    processor.save_pretrained(tmp_path)
    tiny_casa().config.save_pretrained(tmp_path)
    wanted = processor.apply_chat_template(chat(picture(), "what is this"), **HOW)
    for loaded in (CasaProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, CasaProcessor)
        assert loaded.frame_suffix == "that"
        found = loaded.apply_chat_template(chat(picture(), "what is this"), **HOW)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no model at"):
        CasaProcessor.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="give the folder"):
        CasaProcessor.from_pretrained(tmp_path)


def test_a_frame_comes_with_its_delimiters(processor):
    assert processor.frame(picture())[:2] == ([], [])
    processor.frame_prefix, processor.frame_suffix = "this", "and that"
    before, after, pixels = processor.frame(picture())
    assert ([WORDS[t] for t in before], [WORDS[t] for t in after]) == (["this"], ["and", "that"])
    assert pixels["image_grid_thw"].tolist() == [[1, 2, 4]]


def scene():
    """A picture whose every corner is known, as (H, W, 3)."""
    shades = np.zeros((40, 72, 3), np.uint8)
    shades[:, 36:] = 200
    shades[:20, :36, 0] = shades[20:, 36:, 2] = 255
    return shades


def stored(how, folder):
    """A file that holds the scene in some way, and the scene as the file has it (grey, where it knows no colour)."""
    shades, exif, path = scene(), Image.Exif(), folder / f"{how}.png"
    upright = Image.fromarray(shades)
    grey = np.asarray(upright.convert("L"))
    if how == "phone":
        exif[0x0112] = 6
        upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        return path, shades
    if how == "ink":  # black on nothing
        ink = np.zeros((*grey.shape, 4), np.uint8)
        ink[..., 3] = 255 - grey
        Image.fromarray(ink).save(path)
        return path, np.repeat(grey[..., None], 3, axis=2)
    if how == "scan":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        return path, np.repeat(grey[..., None], 3, axis=2)
    upright.save(path)
    return path, shades


KNOWS_TEXT_ONLY = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}model: {% endif %}"
)


@pytest.mark.parametrize("how", ["plain", "phone", "ink", "scan"])
def test_a_picture_is_the_same_by_every_way_in(processor, how, tmp_path):
    path, shades = stored(how, tmp_path)
    wanted = processor.image_processor(images=[Image.fromarray(shades)], return_tensors="pt")
    data = path.read_bytes()
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    text_only = CasaProcessor(processor.image_processor, processor.tokenizer, chat_template=KNOWS_TEXT_ONLY)

    def asked(of, **part):
        messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": " what"}]}]
        return of.apply_chat_template(messages, **HOW)

    ways = {}
    for name, given in {"path": str(path), "Path": path, "bytes": data, "data:": address}.items():
        ways[f"call {name}"] = processor(images=given, text="<image> what")
        ways[f"frame {name}"] = processor.frame(given)[2]
    with Image.open(path) as opened:
        ways["call PIL"] = processor(images=[[opened.copy()]], text=["<image> what"])
        ways["frame PIL"] = processor.frame(opened.copy())[2]
        ways["session"] = processor.frame(StreamingSession.check(opened.copy()))[2]
        for kind, of in (("chat", processor), ("text-only chat", text_only)):
            ways[f"{kind} PIL"] = asked(of, image=opened.copy())
            ways[f"{kind} path"] = asked(of, path=str(path))
            ways[f"{kind} url"] = asked(of, url=address)
            ways[f"{kind} array"] = asked(of, image=shades / 255)
    ways["data"] = processor.frame(open_one(Picture(path)))[2]
    for way, found in ways.items():
        assert found["image_grid_thw"].equal(wanted["image_grid_thw"]), way
        assert found["pixel_values"].equal(wanted["pixel_values"]), way


def test_arrays_of_every_scale_are_the_same_picture(processor):
    shades = scene()
    wanted = processor.image_processor(images=[Image.fromarray(shades)], return_tensors="pt")["pixel_values"]
    for given in (shades, shades / 255, shades.astype(np.float32), torch.from_numpy(shades).permute(2, 0, 1) / 255):
        assert processor(images=[given], text="<image>")["pixel_values"].equal(wanted)
        assert processor.frame(given)[2]["pixel_values"].equal(wanted)
    batch = torch.from_numpy(np.stack([shades, shades])).permute(0, 3, 1, 2)
    assert processor(images=batch, text="<image> <image>")["pixel_values"].equal(torch.cat([wanted, wanted]))


def test_a_picture_that_cannot_be_read_is_told_by_its_number(processor):
    with pytest.raises(UserError, match=r"Picture 2 has values from 0 to 1\.5, which may mean anything"):
        processor(images=[picture(), np.linspace(0, 1.5, 60).reshape(6, 10)], text="<image> <image>")
    with pytest.raises(UserError, match=r"There is no file gone\.png"):
        processor(images="gone.png", text="<image>")
    with pytest.raises(UserError, match="megapixels"):
        processor(images=claimed_png(60_000, 60_000), text="<image>")


def rows_of(given, name="input_ids"):
    return [list(map(int, row)) for row in given[name]]


@pytest.fixture
def english():
    """The words of `processor` with a tokenizer that puts <s> and </s> around a text."""
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    words.post_processor = TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"add_special_tokens": True},
        {"text_kwargs": {"add_special_tokens": True, "padding_side": "right"}},
        {"padding": "max_length", "max_length": 8},
        {"padding": "max_length", "max_length": 3},
        {"padding": "max_length"},
        {"padding": "longest", "pad_to_multiple_of": 4},
        {"padding": "max_length", "max_length": 5, "pad_to_multiple_of": 4},
        {"truncation": True, "max_length": 3},
        {"truncation": "longest_first", "max_length": 3, "padding": False},
        {"max_length": 3, "padding": False},
        {"truncation": "only_first", "max_length": 4, "add_special_tokens": True},
        {"truncation": True, "max_length": 4, "padding": "max_length", "pad_to_multiple_of": 2},
        {"truncation": True, "max_length": 2, "add_special_tokens": True},
        {"truncation": True},
        {"return_attention_mask": False},
        {"return_token_type_ids": True, "return_length": True},
        {"common_kwargs": {"return_tensors": None, "padding": False}},
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_text_is_told_means_what_it_means_to_the_tokenizer(processor, english, told, side):
    """Of texts without pictures, the tokenizer itself gives the same."""
    english.truncation_side, english.model_max_length = side, 6
    processor.tokenizer = english
    english.padding_side = "left"
    texts = ["what is this and that", "nothing", "what is"]
    flat = told.get("common_kwargs", told.get("text_kwargs", told))
    rows = {"return_tensors": None, "padding": True, "add_special_tokens": False} | flat
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tokenizer's, about a length that cuts nothing
        wanted = english(texts, **{**rows, "return_tensors": None})
    wanted.pop("token_type_ids", None) if not rows.get("return_token_type_ids") else None
    even = len({len(row) for row in wanted["input_ids"]}) == 1
    found = processor(text=texts, **(told if even else told | {"return_tensors": None}))
    assert set(found) == set(wanted)
    assert all(rows_of(found, name) == wanted[name] for name in set(wanted) - {"length"})
    if "length" in wanted:
        assert list(found["length"]) == list(wanted["length"])


def test_every_form_of_the_result(processor):
    given = {"images": [picture(), picture(28, 56)], "text": ["what <image> is", "<image>"]}
    tensors = processor(**given, return_mm_token_type_ids=True)
    arrays = processor(**given, common_kwargs={"return_tensors": "np"}, return_mm_token_type_ids=True)
    lists = processor(**given, return_tensors=None, text_kwargs={"return_mm_token_type_ids": True})
    assert set(tensors) == set(arrays) == set(lists) == {*processor.model_input_names, "mm_token_type_ids"}
    for name, tensor in tensors.items():
        assert isinstance(arrays[name], np.ndarray)
        assert arrays[name].dtype == tensor.numpy().dtype
        assert np.array_equal(arrays[name], tensor.numpy())
        assert np.array_equal(np.asarray(lists[name]), tensor.numpy())
    assert isinstance(lists["input_ids"][0][0], int)
    assert lists["image_positions"] == [[0, 1], [1, 2]]
    assert not tensors["mm_token_type_ids"].any()
    assert processor(text="").input_ids.dtype == torch.int64


@pytest.mark.parametrize("template", [TEMPLATE, KNOWS_TEXT_ONLY])
def test_a_chat_tells_the_processor_the_same(processor, template):
    asked = {"chat_template": template, "tokenize": True, "return_dict": True}
    chats = [chat(picture(), "what is this"), chat("what")]
    plain = processor.apply_chat_template(chats, **asked)
    assert isinstance(plain["input_ids"], torch.Tensor)
    for kinds in ({"return_tensors": "np"}, {"processor_kwargs": {"common_kwargs": {"return_tensors": "np"}}}):
        assert isinstance(processor.apply_chat_template(chats, **kinds, **asked)["pixel_values"], np.ndarray)
    length = plain["input_ids"].shape[1]
    told = {"padding": "max_length", "max_length": length + 2, "return_attention_mask": False}
    for kinds in ({"processor_kwargs": told}, {"processor_kwargs": {"text_kwargs": told}}, told):
        found = processor.apply_chat_template(chats, **kinds, **asked)
        assert found["input_ids"].shape[1] == length + 2
        assert "attention_mask" not in found
        assert found["image_positions"].tolist() == (plain["image_positions"] + torch.tensor([0, 2])).tolist()
    cut = {"truncation": True, "max_length": 3}
    assert processor.apply_chat_template(chats, processor_kwargs=cut, **asked)["input_ids"].shape == (2, 3)
    with pytest.raises(UserError, match="would lose the places of 1 pictures"):
        processor.apply_chat_template(chats, processor_kwargs=cut | {"max_length": 1}, **asked)
    with pytest.raises(UserError, match="does not know max_lenght; did you mean 'max_length'"):
        processor.apply_chat_template(chats, processor_kwargs={"max_lenght": 3}, **asked)
    with pytest.raises(UserError, match="does not know max_lenght; did you mean 'max_length'"):
        processor.apply_chat_template(chats, max_lenght=3, **asked)


@pytest.mark.parametrize(
    "told",
    [
        {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}},
        {"images_kwargs": {"size": {"shortest_edge": 112 * 112, "longest_edge": 112 * 112 * 2}}},
        {"do_normalize": False},
        {"common_kwargs": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0]}},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False},
        {"resample": PILImageResampling.NEAREST},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
        {"patch_size": 7},
    ],
)
def test_what_pictures_are_told_means_what_it_means_to_the_image_processor(processor, told):
    flat = told.get("images_kwargs", told.get("common_kwargs", told))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 140, 3), dtype=np.uint8))
    wanted = processor.image_processor(images=[image], return_tensors="pt", **flat)
    found = processor(images=image, text="<image>", **told)
    assert found["image_grid_thw"].equal(wanted["image_grid_thw"])
    assert found["pixel_values"].equal(wanted["pixel_values"])
    messages = chat(image, "what")
    for asked in (
        processor.apply_chat_template(messages, processor_kwargs=dict(told), **HOW),
        processor.apply_chat_template(messages, chat_template=KNOWS_TEXT_ONLY, processor_kwargs=dict(told), **HOW),
        processor.apply_chat_template(messages, **told, **HOW),
    ):
        assert asked["pixel_values"].equal(wanted["pixel_values"])


def test_bounds_on_pixels_and_floats_that_are_scaled_already(processor):
    image = Image.fromarray(scene()).resize((720, 400))
    size = {"shortest_edge": 28 * 28, "longest_edge": 100 * 100}
    wanted = processor(images=image, text="<image>", size=size)
    found = processor(images=image, text="<image>", max_pixels=100 * 100, images_kwargs={"min_pixels": 28 * 28})
    assert found["pixel_values"].equal(wanted["pixel_values"])
    assert found["image_grid_thw"].prod() <= 100 * 100 / 14**2
    least = processor(images=picture(28, 28), text="<image>", min_pixels=112 * 112)
    assert least["image_grid_thw"].tolist() == [[1, 8, 8]]
    floats = scene().astype(np.float32) / 255
    own = processor.image_processor(images=[floats], do_rescale=False, return_tensors="pt")
    ours = processor(images=[floats], text="<image>", do_rescale=False)
    torch.testing.assert_close(ours["pixel_values"], own["pixel_values"], rtol=0, atol=0.02)
    turned = processor(images=scene().transpose(2, 0, 1)[:, :3], text="<image>", input_data_format="channels_first")
    assert turned["image_grid_thw"].equal(processor(images=scene()[:3], text="<image>")["image_grid_thw"])


@pytest.mark.parametrize(("side", "kept"), [("right", "what <image> is"), ("left", "<image> is this")])
def test_truncation_keeps_pictures_or_is_refused(processor, english, side, kept):
    processor.tokenizer = english
    english.truncation_side, english.padding_side = side, "left"
    text = {"right": "what <image> is this and", "left": "and what <image> is this"}[side]
    found = processor(images=picture(), text=text, truncation=True, max_length=2)
    wanted = processor(images=picture(), text=kept)
    assert found["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert found["image_positions"].tolist() == wanted["image_positions"].tolist()
    around = processor(images=picture(), text=text, truncation=True, max_length=4, add_special_tokens=True)
    assert around["input_ids"].tolist() == [[1, *wanted["input_ids"][0].tolist(), 2]]
    assert around["image_positions"].tolist() == [[0, 1 + wanted["image_positions"][0, 1]]]
    processor.gist_ids = [11, 12]
    for told in ({"max_length": 1}, {"max_length": 3, "add_special_tokens": True}):
        with pytest.raises(UserError, match="would lose the places of 1 pictures; give a larger max_length"):
            processor(images=picture(), text=text, truncation=True, **told)
    # where the words behind a picture are all cut, none would see it
    behind = {"text": "what is this and <image> that", "images": picture(), "truncation": True, "max_length": 4}
    if side == "right":
        with pytest.raises(UserError, match="cut to 4 would lose the places of 1 pictures"):
            processor(**behind)
    else:
        processor.gist_ids = []
        assert processor(**behind)["image_positions"].tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"max_pixel": 9}, "does not know max_pixel; did you mean 'max_pixels'"),
        ({"images_kwargs": {"do_resise": False}}, "does not know do_resise in images_kwargs; did you mean 'do_resize'"),
        ({"text_kwargs": {"do_resize": False}}, "does not know do_resize in text_kwargs; it knows: add_special_tokens"),
        ({"novel": None}, "does not know novel; it knows"),
        ({"images_kwargs": [1]}, r"images_kwargs is \[1\]; give a dictionary"),
        ({"videos_kwargs": {"fps": 2}}, "videos_kwargs: a video is read frame by frame"),
        ({"do_resize": True, "images_kwargs": {"do_resize": False}}, "do_resize is given twice, in images_kwargs"),
        ({"text_pair": "this"}, "takes no text_pair: texts are chats with pictures"),
        ({"return_offsets_mapping": True}, "takes no return_offsets_mapping"),
        ({"do_center_crop": True}, "Qwen2VLImageProcessorPil makes no use of do_center_crop; leave that out"),
        ({"min_pixels": 100, "max_pixels": 50}, "no picture has from 100 to 50 pixels"),
        ({"size": "large"}, "cannot be prepared with this size: "),
        ({"images_kwargs": {"do_resize": False}}, "cannot be prepared with this do_resize: "),
        ({"padding": "left"}, "left is not a valid PaddingStrategy, please select"),
        ({"truncation": "sometimes"}, "sometimes is not a valid TruncationStrategy"),
        ({"truncation": "only_second"}, "is for pairs of texts"),
        ({"max_length": "5", "truncation": True}, "max_length is '5'; give a whole number from 1 on"),
        ({"max_length": 6, "truncation": True, "pad_to_multiple_of": 4}, "no multiple of pad_to_multiple_of 4"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(processor, told, sentence):
    with pytest.raises(UserError, match=sentence):
        processor(images=picture(50, 30), text="<image> what", **told)


def test_arguments_that_ask_for_nothing_pass(processor):
    plain = processor(images=picture(), text="<image> what")
    nothing = {
        "text_pair": None,
        "stride": 0,
        "videos_kwargs": {},
        "text_kwargs": {"stride": 0},
        "do_center_crop": False,
    }
    assert processor(images=picture(), text="<image> what", **nothing)["pixel_values"].equal(plain["pixel_values"])
    with pytest.warns(UserWarning, match="max_length does nothing without truncation=True"):
        processor(images=picture(), text="<image> what", max_length=1)


def test_other_kinds_of_image_processors_are_told_in_their_own_words():
    tokenizer = tiny_processor().tokenizer
    place = tiny_processor().image_token
    flexible = CasaProcessor(CasaFlexibleImageProcessor(patch_size=8, max_num_patches=36), tokenizer)
    grid = flexible(images=picture(), text=place, max_pixels=64 * 9)["image_grid_thw"]
    assert grid.equal(flexible(images=picture(), text=place, max_num_patches=9)["image_grid_thw"])
    square = CasaProcessor(CasaSquareImageProcessor(patch_size=8, size={"height": 32, "width": 32}), tokenizer)
    assert square(images=picture(), text=place, size={"height": 16, "width": 24})["image_grid_thw"].tolist() == [
        [1, 2, 3]
    ]
    page = CasaProcessor(image_processor_for(PageEncoderConfig()), tokenizer)
    wide = page(images=picture(280, 140), text=place)["image_grid_thw"].prod()
    assert page(images=picture(280, 140), text=place, max_pixels=140 * 140)["image_grid_thw"].prod() < wide
    for of, told, sentence in (
        (page, {"do_normalize": False}, "CasaPageImageProcessor makes no use of do_normalize"),
        (flexible, {"min_pixels": 64}, "leave out min_pixels"),
        (flexible, {"max_pixels": 63}, "less than one patch; give 64 or more"),
        (flexible, {"size": {"height": 8, "width": 8}}, "makes no use of size"),
        (square, {"max_pixels": 64}, "squares of one size; leave out max_pixels"),
        (square, {"max_num_patches": 64}, "does not know max_num_patches"),
    ):
        with pytest.raises(UserError, match=sentence):
            of(images=picture(), text=place, **told)
