"""Questions in batches are answered as each is alone, with every picture looked at once."""

import numpy as np
import pytest
import torch
from PIL import Image

from casa.data.record import BadRecord, Message, Picture, Text
from casa.errors import UserError
from casa.evaluation.answering import Answerer, shared_prefix
from casa.evaluation.questions import AnswerSettings, Question
from casa.models import ImageCache
from casa.pipeline import CasaPipeline
from casa.testing import tiny_casa, tiny_processor
from tests.few import few_first

VARIANTS = {
    "parallel": {},
    "before": {"placement": "before"},
    "replace": {"placement": "replace", "every": 2},
    "cross-attention": {"method": "cross_attention", "gate": "tanh"},
    "history": {"history": -1},
    "update": {"update_images": True},
    "insertion": {"method": "insertion"},
}
NEW = 4  # tokens of an answer
FEW = ("parallel", "insertion")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of five pictures of noise, of three sizes."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    found = []
    for number, size in enumerate(((56, 84), (84, 56), (56, 56), (56, 84), (28, 28))):
        found.append(folder / f"{number}.png")
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(found[-1])
    return found


def question(index, shown, text, before=()):
    messages = (*before, Message("user", (*map(Picture, shown), Text(text))))
    return Question(index, f"qa.jsonl:{index + 1}", 1, messages, ("x",))


@pytest.fixture(scope="module")
def asked(pictures):
    """One to three questions a picture, about several, and about none."""
    one, two, three, four, five = pictures
    about = [[one]] * 3 + [[two]] * 2 + [[three], [one, two], [two, one], [], [four], [five]]
    words = ["what is it?", "say it", "and this?", "what?", "is it so?"]
    return [question(number, shown, words[number % 5]) for number, shown in enumerate(about)]


def eyes_of(**fusion):
    model = tiny_casa(**fusion)
    return CasaPipeline(model, tiny_processor())


def alone(eyes, one, **settings):
    shown = [picture.source for picture in one.pictures]
    return eyes.ask(shown, one.text, max_new_tokens=NEW, **settings)


def answers(eyes, questions, **settings):
    answerer = Answerer(eyes.model, eyes.processor, AnswerSettings(max_new_tokens=NEW, **settings))
    found = {}
    for batch in answerer.batches(questions):
        assert len(batch) <= answerer.settings.batch_size
        found |= {one.index: answer for one, answer in zip(batch, answerer.answer(batch), strict=True)}
    return [found[one.index] for one in questions], answerer


@pytest.mark.parametrize("name", few_first(VARIANTS, FEW))
def test_batches_answer_as_each_question_alone(asked, name, monkeypatch):
    eyes = eyes_of(**VARIANTS[name])
    wanted = [alone(eyes, one) for one in asked]
    assert len(set(wanted)) > 3
    encoded = []
    encode = type(eyes.model).encode_images
    monkeypatch.setattr(
        type(eyes.model),
        "encode_images",
        lambda model, pixels, grid: encoded.append(len(grid)) or encode(model, pixels, grid),
    )
    for size, least in ((1, 64), (4, 0), (16, 64)):
        encoded.clear()
        monkeypatch.setattr("casa.evaluation.answering.MIN_SHARED", least)
        given, answerer = answers(eyes, asked, batch_size=size)
        assert given == wanted
        assert sum(encoded) == answerer.encoded == 5, "each picture once, for all of its questions"


@pytest.mark.parametrize("name", few_first(["parallel", "replace", "history", "insertion"], FEW[:1]))
def test_batches_have_the_logits_of_each_question_alone(asked, name, monkeypatch):
    eyes = eyes_of(**VARIANTS[name])
    heard = []
    monkeypatch.setattr("casa.evaluation.answering.MIN_SHARED", 0)
    generate = type(eyes.model).generate

    def listened(model, *given, **named):
        found = generate(model, *given, **named, output_logits=True, return_dict_in_generate=True)
        heard.extend(found.logits[0])
        return found.sequences

    monkeypatch.setattr(type(eyes.model), "generate", listened)
    answerer = Answerer(eyes.model, eyes.processor, AnswerSettings(max_new_tokens=1))
    batches = answerer.batches(asked)
    for batch in batches:
        answerer.answer(batch)
    together = heard[:]
    heard.clear()
    for one in (one for batch in batches for one in batch):
        alone(eyes, one)
    alike = [torch.allclose(a, b, atol=1e-10) for a, b in zip(together, heard, strict=True)]
    assert alike == [True] * len(asked)


def test_pictures_are_projected_once(asked, monkeypatch):
    eyes = eyes_of()
    calls = []
    project = type(eyes.model).image_keys_values
    monkeypatch.setattr(
        type(eyes.model),
        "image_keys_values",
        lambda model, *given: calls.append(len(given[1])) or project(model, *given),
    )
    monkeypatch.setattr(type(eyes.model), "image_tokens", counted := Counted(type(eyes.model).image_tokens))
    answers(eyes, asked, batch_size=4)
    assert sum(calls) == 5
    assert counted.calls == len(calls), "no other call has image tokens to project"


class Counted:
    """A method that counts its calls."""

    def __init__(self, method):
        self.method, self.calls = method, 0

    def __get__(self, owner, kind):
        def call(*given):
            self.calls += 1
            return self.method(owner, *given)

        return call


def test_what_all_begin_with_is_fed_once(asked, pictures):
    eyes = eyes_of(method="insertion")
    fed = []
    eyes.model.register_forward_pre_hook(
        lambda model, given, named: fed.append((named["input_ids"].shape[0], "image_features" in named)),
        with_kwargs=True,
    )
    same = [one for one in asked if one.keys == (str(pictures[0]),)]
    answers(eyes, same)
    # one row with the picture in it, and then a row for each question without
    assert fed[:2] == [(1, True), (3, False)]


def test_the_shared_prefix_ends_where_texts_or_pictures_differ():
    def row(ids, *pictures):
        return type("Row", (), {"ids": ids, "pictures": list(pictures)})

    assert shared_prefix([row([1, 2, 3])]) == 0
    assert shared_prefix([row([1, 2, 3]), row([1, 2, 4])]) == 2
    assert shared_prefix([row([1, 2, 3]), row([1, 2, 3])]) == 2, "one token is left"
    assert shared_prefix([row([1, 2, 3], (1, "a")), row([1, 2, 4], (1, "a"))]) == 2
    assert shared_prefix([row([1, 2, 3], (1, "a")), row([1, 2, 4], (1, "b"))]) == 1
    assert shared_prefix([row([1, 2, 3], (1, "a")), row([1, 2, 4])]) == 1
    assert shared_prefix([row([1, 2, 3]), row([1, 2, 4], (0, "a"))]) == 0
    assert shared_prefix([row([1, 2, 3, 4], (1, "a"), (2, "b")), row([1, 2, 3, 5], (1, "a"), (2, "c"))]) == 2


def test_earlier_turns_are_read(pictures):
    eyes = eyes_of()
    before = (Message("user", (Picture(pictures[0]), Text("what?"))), Message("assistant", (Text("a cat"),)))
    later = question(0, [], "and this?", before)
    (given,), _ = answers(eyes, [later])
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.open(pictures[0])}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "and this?"}]},
    ]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = eyes.processor.apply_chat_template(chat, **how)
    tokens = eyes.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert given == eyes.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_a_picture_that_cannot_be_read_costs_its_questions(asked, pictures, tmp_path):
    eyes = eyes_of()
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(pictures[0].read_bytes()[:200])
    more = [question(90, [damaged], "what?"), *asked[:6], question(91, [pictures[1], damaged], "say it")]
    given, _ = answers(eyes, more)
    assert isinstance(given[0], BadRecord)
    assert isinstance(given[-1], BadRecord)
    assert given[1:-1] == [alone(eyes, one) for one in asked[:6]]


def test_words_are_drawn_by_seed(asked):
    eyes = eyes_of()
    state = torch.get_rng_state()
    first, again, other = (answers(eyes, asked, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_variable_that_the_template_has_not_is_refused():
    eyes = eyes_of()
    with pytest.raises(UserError, match="the chat template knows no 'thinking'"):
        Answerer(eyes.model, eyes.processor, AnswerSettings(template={"thinking": False}))


def test_only_so_much_is_kept(asked, monkeypatch):
    monkeypatch.setattr("casa.evaluation.answering.KEPT_BYTES", 1)
    eyes = eyes_of()
    some = asked[4:9]
    given, answerer = answers(eyes, some, batch_size=2)
    assert len(answerer._kept) == 1
    assert given == [alone(eyes, one) for one in some]


def test_pictures_are_found_in_a_folder_that_another_run_has_filled(asked, tmp_path, monkeypatch):
    eyes = eyes_of()
    wanted = [alone(eyes, one) for one in asked]
    for looks in (5, 0):
        cache, settings = ImageCache(0, tmp_path / "kept"), AnswerSettings(max_new_tokens=NEW)
        answerer = Answerer(eyes.model, eyes.processor, settings, cache)
        found = {}
        for batch in answerer.batches(asked):
            found |= dict(zip([one.index for one in batch], answerer.answer(batch), strict=True))
        assert [found[one.index] for one in asked] == wanted
        assert cache.misses == looks
