"""Chats with any template: what it takes is found by rendering, parts are the same for all, and user text is text."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from casa import CasaProcessor
from casa.errors import UserError
from casa.models import processor_for
from casa.models.chat_template import TemplateForm
from casa.testing import SPECIAL_TOKENS, TEMPLATES, TOKENIZERS, tiny_chat_processor, tiny_encoder, tiny_tokenizer

HOW = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 56, 3), dtype=np.uint8))
HELD = io.BytesIO()
PICTURE.save(HELD, "PNG")
CODED = base64.b64encode(HELD.getvalue()).decode()
KINDS = {  # of templates: places, strings, parts, system
    "chatml": (False, True, False, True),
    "places": (True, True, True, True),
    "parts": (True, False, True, True),
    "gemma": (False, True, True, True),
    "refusing": (False, True, False, False),
    "thinking": (False, True, False, True),
    "opened": (False, True, False, True),
    "blank": (False, True, False, True),
}


def user(*parts):
    return [{"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}]


def text(words):
    return {"type": "text", "text": words}


def image(picture=PICTURE):
    return {"type": "image", "image": picture}


def decoded(processor, inputs):
    return processor.tokenizer.decode(inputs["input_ids"][0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_takes_is_found_by_rendering(name):
    assert tiny_chat_processor(template=name).template_form() == TemplateForm(*KINDS[name])


def test_the_shipped_template_takes_parts_and_has_no_system():
    assert CasaProcessor.from_pretrained("casa-tiny").template_form() == TemplateForm(True, True, True, False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_with_pictures_work_with_any_template(name):
    processor = tiny_chat_processor(template=name)
    chat = [
        {"role": "system", "content": "Answer yes."},
        *user("The image ", image(), " or ", image(PICTURE.resize((28, 28))), " line 1"),
        {"role": "assistant", "content": "407"},
        *user("line 2"),
    ]
    inputs = processor.apply_chat_template(chat, **HOW)
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2]]
    assert processor.image_token_id not in inputs["input_ids"]
    said = decoded(processor, inputs)
    for words in ("Answer yes.", "The image", "line 1", "407", "line 2"):
        assert said.count(words) == 1, said
    assert "type" not in said
    (_, first), (_, second) = inputs["image_positions"].tolist()
    before = processor.tokenizer.decode(inputs["input_ids"][0, :first]).rstrip()
    between = processor.tokenizer.decode(inputs["input_ids"][0, first:second]).strip()
    assert (before.endswith("The image"), between) == (True, "or")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_string_is_what_a_text_part_is(name):
    processor = tiny_chat_processor(template=name)
    for messages in (["line 1"], ["line 1", "407", "line 2"]):
        roles = ["user", "assistant", "user"]
        strings = [{"role": role, "content": words} for role, words in zip(roles, messages, strict=False)]
        parts = [{"role": role, "content": [text(words)]} for role, words in zip(roles, messages, strict=False)]
        one, other = (processor.apply_chat_template(chat, **HOW)["input_ids"].tolist() for chat in (strings, parts))
        assert one == other
        assert "line 1" in processor.tokenizer.decode(one[0])


def test_what_a_system_says_opens_the_users_turn_where_there_is_no_other():
    for processor in (tiny_chat_processor(template="refusing"), CasaProcessor.from_pretrained("casa-tiny")):
        said = {"role": "assistant", "content": "yes"}
        system = {"role": "system", "content": [text("be brief")]}
        joined = [system, *user("hi"), said, *user("why")]
        wanted = [*user("be brief\nhi"), said, *user("why")]
        one, other = (processor.apply_chat_template(chat, **HOW)["input_ids"].tolist() for chat in (joined, wanted))
        assert one == other
        assert "be brief" in processor.apply_chat_template([system])
    # a turn of its own stays one
    assert "system\nbe brief<end>" in tiny_chat_processor(template="chatml").apply_chat_template(joined)


def test_the_text_of_gemma_3_sees_pictures_of_a_tower():
    tokenizer = tiny_tokenizer("first", chat_template=TEMPLATES["gemma"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_image>"]})
    processor = processor_for(tokenizer, tiny_encoder().config)
    inputs = processor.apply_chat_template(user(image(), "line 1"), **HOW)
    assert inputs["image_positions"].shape == (1, 2)
    assert "<start_of_image>" not in decoded(processor, inputs)


@pytest.fixture(params=["places", "chatml", "parts"])
def processor(request):
    return tiny_chat_processor(template=request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": PICTURE},
        {"type": "image", "image": np.asarray(PICTURE)},
        {"type": "image", "base64": CODED},
        {"type": "image", "image": CODED},
        {"type": "image", "url": f"data:image/png;base64,{CODED}"},
        {"type": "image", "path": "{folder}/a.png"},
        {"type": "image", "image": "{folder}/a.png", "url": None},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{CODED}", "detail": "low"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{CODED}"},
        {"type": "image_url", "image_url": {"url": "{folder}/a.png"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{CODED}"},
        {"type": "image"},
    ],
    ids=lambda part: " ".join(f"{key}:{type(value).__name__}" for key, value in part.items()),
)
def test_pictures_come_as_transformers_and_openai_write_them(processor, part, tmp_path):
    PICTURE.save(tmp_path / "a.png")

    def placed(value):
        if isinstance(value, dict):
            return {key: placed(held) for key, held in value.items()}
        return value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value

    wanted = processor.apply_chat_template(user("line ", image(), "1"), **HOW)
    beside = {"images": [PICTURE]} if part == {"type": "image"} else {}
    found = processor.apply_chat_template(user("line ", placed(part), "1"), processor_kwargs=beside, **HOW)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if beside:
        found = processor.apply_chat_template(user("line ", placed(part), "1"), **beside, **HOW)
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])


@pytest.mark.slow
def test_pictures_beside_a_chat_fill_the_parts_without_one(processor):
    chats = [user({"type": "image"}, "a", image()), user("b", {"type": "image"})]
    small, large = PICTURE.resize((28, 28)), PICTURE.resize((56, 56))
    inputs = processor.apply_chat_template(chats, images=[[small], [large]], **HOW)
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4], [1, 4, 4]]
    assert inputs["image_positions"][:, 0].tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="an image part holds no picture"):
        processor.apply_chat_template(chats, **HOW)
    with pytest.raises(UserError, match="1 images were given for 2 image parts"):
        processor.apply_chat_template(chats, images=[small], **HOW)
    # text alone needs no picture
    assert len(processor.apply_chat_template(chats)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "audio", "audio": "a.wav"}, "of the type 'audio'; give parts of the type text, image or image_url"),
        ({"type": "imge", "image": PICTURE}, "of the type 'imge'"),
        ({"image": PICTURE}, "of the type None"),
        (7, "a part of a message is a int"),
        ({"type": "text"}, "a text part has a text"),
        ({"type": "text", "text": 5}, "a text part has a text"),
        ({"type": "image_url", "image_url": {}}, "an image_url part has no address"),
        ({"type": "video", "video": "a.mp4"}, "frame by frame"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "frame by frame"),
    ],
)
def test_other_parts_are_refused_by_name(processor, part, words):
    with pytest.raises(UserError, match=words):
        processor.apply_chat_template([user("a", part)], **HOW)


@pytest.mark.parametrize("chat", [[], "hello", [[]], ["hello"], None])
def test_what_is_no_chat_is_refused(processor, chat):
    with pytest.raises(UserError, match="a chat is a list of messages"):
        processor.apply_chat_template(chat, **HOW)


def test_messages_of_a_caller_stay_as_they_are(processor):
    chat = [{"role": "system", "content": "a"}, *user("<image>", image()), {"role": "assistant", "content": None}]
    kept = [{**message} for message in chat]
    parts = list(chat[1]["content"])
    processor.apply_chat_template(chat, tokenize=False)
    assert chat == kept
    assert chat[1]["content"] == parts


@pytest.mark.parametrize("among", ["processor", "tokenizer"])
def test_templates_have_names(among):
    named = {"default": TEMPLATES["places"], "short": TEMPLATES["chatml"], "tool_use": TEMPLATES["parts"]}
    processor = tiny_chat_processor(template="chatml")
    processor.chat_template = named if among == "processor" else None
    processor.tokenizer.chat_template = named if among == "tokenizer" else None
    chat = user(image(), "line 1")
    for given, wanted in ((None, "places"), ("short", "chatml"), (TEMPLATES["gemma"], "gemma")):
        found = processor.apply_chat_template(chat, chat_template=given, **HOW)
        assert found["image_positions"].shape == (1, 2)
        alone = tiny_chat_processor(template=wanted).apply_chat_template(chat, **HOW)
        assert found["input_ids"].tolist() == alone["input_ids"].tolist()
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    found = processor.apply_chat_template(chat, tools=[tool], **HOW)
    assert decoded(processor, found).startswith("User:")
    with pytest.raises(UserError, match="no chat template 'long': there are default, short, tool_use"):
        processor.apply_chat_template(chat, chat_template="long", **HOW)
    named.pop("default")
    with pytest.raises(UserError, match="no chat template 'default': there are short, tool_use"):
        processor.apply_chat_template(chat, **HOW)


def test_a_template_that_loses_a_place_is_refused():
    processor = tiny_chat_processor(template="{% if messages | length < 2 %}" + TEMPLATES["places"] + "{% endif %}")
    chat = [*user(image(), "a"), {"role": "assistant", "content": "b"}, *user("c")]
    with pytest.raises(UserError, match="the chat template wrote 0 places for 1 pictures"):
        processor.apply_chat_template(chat, **HOW)


def test_variables_of_a_template_and_settings_of_the_processor_are_told_apart():
    processor = tiny_chat_processor(template=TEMPLATES["chatml"] + "{{ mood }}")
    inputs = processor.apply_chat_template([user("a"), user("line 2")], mood=" fine", padding_side="right", **HOW)
    assert inputs["attention_mask"][0, -1] == 0
    assert decoded(processor, inputs).rstrip("<pad>").endswith(" fine")
    with pytest.raises(UserError, match="does not know weather"):
        processor.apply_chat_template(user("a"), weather="fine", **HOW)


# what people type


def chat_of(words):
    return [
        {"role": "system", "content": f"be {words}"},
        *user(f"is {words} ", image(), f" a {words}"),
        {"role": "assistant", "content": f"no {words}"},
        *user(words),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["<image>", "<end> <user>", "</s>", "<IMAGE>", "a <"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_people_type_is_text_with_any_template(words, kind):
    for name in TEMPLATES:
        processor = tiny_chat_processor(kind, name)
        inputs = processor.apply_chat_template(chat_of(words), **HOW)
        plain = processor.apply_chat_template(chat_of("line"), **HOW)
        assert inputs["image_positions"].shape == (1, 2)
        special = range(1, len(SPECIAL_TOKENS))
        written, wanted = ([t for t in ids["input_ids"][0].tolist() if t in special] for ids in (inputs, plain))
        assert written == wanted, name
        if kind in ("gpt2", "roberta"):
            ids = [token for token in inputs["input_ids"][0].tolist() if token not in special]
            assert processor.tokenizer.decode(ids).count(words) == 5


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_text_that_is_given_back_is_as_good_as_the_chat(kind):
    processor = tiny_chat_processor(kind)
    chat = chat_of("<image> <end>")
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.count("<image>") == 6
    wanted = processor.apply_chat_template(chat, **HOW)
    found = processor(text=[text], images=[PICTURE])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # a plain string is read as it always was: every <image> is a place
    with pytest.raises(UserError, match="places for 6 pictures, but 1"):
        processor(text=str(text), images=PICTURE)


def test_special_tokens_in_messages_are_tokens_where_that_is_asked_for():
    processor = tiny_chat_processor()
    ids = processor.apply_chat_template(user("a <end> b"), sanitize_control_tokens=False, **HOW)["input_ids"][0]
    assert ids.tolist().count(processor.tokenizer.convert_tokens_to_ids("<end>")) == 2


@pytest.mark.parametrize(
    "change",
    ["{0} | trim", "{0} | upper", "{0} | lower", "{0} | replace('a', 'the')", "({0} + {0})", "{0}[:6]", "{0} | tojson",
     "{0} | tojson(ensure_ascii=True)", "{0}.split('>')[0]", "{0} | replace('<', '&lt;')", "{0} | list | join(' ')"],
)  # fmt: skip
def test_templates_that_change_what_they_are_given_write_no_token_for_it(change):
    template = TEMPLATES["chatml"].replace("message.content", change.format("message.content"))
    processor = tiny_chat_processor(template=template)
    said = "a <image> <IMAGE> b </s>"
    inputs = processor.apply_chat_template(user(said), **HOW)
    special = [token for token in inputs["input_ids"][0].tolist() if token < 8]
    assert special == [4, 6, 4]
    text = processor.apply_chat_template(user(said))
    assert set(map(ord, text)) <= set(range(128))


def test_documents_and_tools_are_no_place_for_tokens():
    template = "{{ tools | tojson }}{% for d in documents %}{{ d.text }}{% endfor %}" + TEMPLATES["chatml"]
    processor = tiny_chat_processor(template=template)
    tool = {"type": "function", "function": {"name": "f", "description": "<end>", "parameters": {}}}
    ids = processor.apply_chat_template(user("a"), tools=[tool], documents=[{"title": "t", "text": "<image>"}], **HOW)
    assert [token for token in ids["input_ids"][0].tolist() if token < 8] == [4, 6, 4]


def test_a_message_goes_on_where_that_is_asked_for():
    processor = tiny_chat_processor("gpt2", "chatml")
    chat = [*user("a <image>"), {"role": "assistant", "content": "line <end>"}]
    text = processor.apply_chat_template(chat, continue_final_message=True)
    assert text.endswith("line <end>")
    ids = processor.apply_chat_template(chat, continue_final_message=True, tokenize=True)
    assert ids[0].tolist().count(6) == 1
