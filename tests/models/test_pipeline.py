"""transformers' pipeline("image-text-to-text") and Auto classes, over a saved model and processor."""

import pytest
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from casa import CasaConfig, CasaForConditionalGeneration, CasaProcessor
from casa.errors import UserError
from casa.testing import tiny_casa, tiny_processor

RED = Image.new("RGB", (56, 28), (200, 10, 10))
BLUE = Image.new("RGB", (28, 56), (10, 10, 200))
HOW = {"generate_kwargs": {"max_new_tokens": 5, "do_sample": False}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model and processor, saved side by side."""
    where = tmp_path_factory.mktemp("model")
    tiny_casa().save_pretrained(where)
    tiny_processor().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def parts(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-text-to-text", model=folder)


def chat(picture, words="what is it"):
    content = [{"type": "image", "image": picture}] if picture is not None else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": words}]}]


def answered(parts, conversation):
    model, processor = parts
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_auto_classes_make_the_round_trip(folder, parts):
    model, processor = parts
    assert isinstance(AutoConfig.from_pretrained(folder), CasaConfig)
    assert isinstance(model, CasaForConditionalGeneration)
    assert isinstance(processor, CasaProcessor)
    assert processor.tokenizer.padding_side == "left"


def test_a_pipeline_answers_as_model_and_processor_do(pipe, parts):
    assert answered(parts, chat(RED)) != answered(parts, chat(BLUE))
    for picture in (RED, BLUE, None):
        (found,) = pipe(text=chat(picture), return_full_text=False, **HOW)
        assert found["generated_text"] == answered(parts, chat(picture))
        (whole,) = pipe(chat(picture), **HOW)
        assert whole["generated_text"][-1] == {"role": "assistant", "content": found["generated_text"]}


def test_a_pipeline_takes_parts_and_files(parts, tmp_path):
    model, processor = parts
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    RED.save(tmp_path / "red.png")
    (found,) = pipe(chat(str(tmp_path / "red.png")), return_full_text=False, **HOW)
    assert found["generated_text"] == answered(parts, chat(RED))


def test_a_pipeline_takes_many_chats(pipe, parts):
    chats = [chat(RED), chat(BLUE, "and this"), chat(None, "why"), chat(BLUE)]
    found = [one[0]["generated_text"] for one in pipe(chats, return_full_text=False, **HOW)]
    assert found == [answered(parts, one) for one in chats]


def test_a_pipeline_does_not_give_pictures_to_the_wrong_chat(pipe, parts):
    """transformers would join the places of all chats; text alone is padded as generation needs it."""
    with pytest.raises(UserError, match="leave a pipeline's batch_size at 1"):
        pipe([chat(RED), chat(BLUE, "and this one there")], batch_size=2, **HOW)
    chats = [chat(None, "why"), chat(None, "and what is that there")]
    found = [one[0]["generated_text"] for one in pipe(chats, batch_size=2, return_full_text=False, **HOW)]
    assert found == [answered(parts, one) for one in chats]


def test_a_pipeline_goes_on_with_an_unfinished_answer(pipe):
    begun = [*chat(RED), {"role": "assistant", "content": [{"type": "text", "text": "it is"}]}]
    (found,) = pipe(begun, **HOW)
    said = found["generated_text"][-1]["content"][-1]["text"]
    assert said.startswith("it is")
    assert len(said) > len("it is")


def test_a_pipeline_takes_pictures_and_text(pipe, parts):
    model, processor = parts
    (found,) = pipe(images=RED, text="<user><image><frame>what is it<end><assistant>", **HOW)
    inputs = processor(images=RED, text="<user><image><frame>what is it<end><assistant>")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["generated_text"].endswith(said)
    with pytest.raises(UserError, match="write <image> where each picture stands"):
        pipe(images=RED, text="what is it", **HOW)
    (alone,) = pipe(text="what is it", **HOW)
    assert alone["generated_text"].startswith("what is it")


def test_pipelines_find_the_class_by_name(pipe):
    assert type(pipe.model).__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def test_a_template_that_knows_only_text_takes_the_same_settings():
    processor, plain = tiny_processor(), "{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = [chat(RED, "a"), chat(None, "abc")]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = processor.apply_chat_template(chats, chat_template=plain, padding=True, processor_kwargs={}, **how)
    assert found["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert found["image_positions"].tolist() == [[0, 1]]
    with pytest.raises(UserError, match="need padding=True"):
        processor.apply_chat_template(chats, chat_template=plain, processor_kwargs={"padding": False}, **how)


def test_settings_that_would_be_ignored_are_refused():
    with pytest.raises(UserError, match="does not know truncate; did you mean 'truncation'"):
        tiny_processor()(text="abc", truncate=True, max_length=2)
    assert tiny_processor()(text="abc", truncation=False)["input_ids"].shape == (1, 3)
    assert tiny_processor()(text="abc", truncation=True, max_length=2)["input_ids"].shape == (1, 2)
