"""The processor: chats with pictures to tokens without placeholders, and the places of the pictures."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa import CasaProcessor, StreamingSession
from casa.data.pictures import open_one
from casa.data.record import Picture
from casa.errors import UserError
from casa.testing import claimed_png, tiny_casa

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
        ({"text": "what", "return_tensors": "np"}, "only 'pt'"),
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
