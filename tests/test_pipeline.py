"""`casa.load` and what it gives: the same answers and captions as the classes below it, from pictures in any form."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import casa
import casa.pipeline
from casa.errors import UserError
from casa.testing import noise_frames, tiny_casa, tiny_checkpoint, tiny_processor, tiny_speaker


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    return casa.load(tiny_checkpoint(tmp_path_factory.mktemp("pipeline") / "model"), device="cpu")


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(5)
    sizes = ((56, 84), (84, 56), (56, 56))
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def answer_of(eyes, pictures, question, count=5):
    """The long way: the processor's chat, the model's generate."""
    content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": question}]
    inputs = eyes.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = eyes.model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return eyes.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_it_is_a_model_and_a_processor_in_evaluation_mode(eyes):
    assert isinstance(eyes.model, casa.CasaForConditionalGeneration)
    assert isinstance(eyes.processor, casa.CasaProcessor)
    assert not eyes.model.training
    assert "cpu" in repr(eyes)


def test_an_answer_is_what_generate_gives(eyes, pictures):
    one, other, _ = pictures
    for shown in ([one], [one, other], [other, one], []):
        assert eyes.ask(shown, "what?", max_new_tokens=5) == answer_of(eyes, shown, "what?")
    assert eyes.ask(None, "what?", max_new_tokens=5) == answer_of(eyes, [], "what?")
    assert eyes.ask(one, "what?", max_new_tokens=5) == eyes.ask([one], "what?", max_new_tokens=5)


def test_a_picture_may_come_in_any_form(eyes, pictures, tmp_path):
    picture = pictures[0]
    picture.save(tmp_path / "page.png")
    file = io.BytesIO()
    picture.save(file, "png")
    # as a phone held upright keeps it: on its side
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    array = np.asarray(picture)
    forms = [
        tmp_path / "page.png",
        str(tmp_path / "page.png"),
        tmp_path / "phone.png",
        file.getvalue(),
        io.BytesIO(file.getvalue()),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    answers = {eyes.ask(form, "what?", max_new_tokens=5) for form in forms}
    assert answers == {eyes.ask(picture, "what?", max_new_tokens=5)}


@pytest.mark.slow
def test_each_of_several_questions_is_answered_as_by_itself(eyes, pictures):
    one, other, third = pictures
    shown = [one, [other, third], None, other, []]
    questions = ["what?", "which one?", "who?", "b", "where is it?"]
    alone = [eyes.ask(p, q, max_new_tokens=5) for p, q in zip(shown, questions, strict=True)]
    for size in (1, 2, 16):
        assert eyes.ask(shown, questions, max_new_tokens=5, batch_size=size) == alone
    # one picture that all are about, and none
    assert eyes.ask(one, questions, max_new_tokens=5) == [eyes.ask(one, q, max_new_tokens=5) for q in questions]
    assert eyes.ask(None, questions[:2], max_new_tokens=5) == [
        eyes.ask(None, q, max_new_tokens=5) for q in questions[:2]
    ]
    assert eyes.ask([], []) == []


@pytest.mark.slow
def test_words_are_drawn_by_seed_and_torchs_own_numbers_stay(eyes, pictures):
    warm = {"temperature": 3.0, "top_p": 0.95, "top_k": 40, "max_new_tokens": 6}
    drawn = [eyes.ask(pictures[0], "which?", seed=seed, **warm) for seed in (0, 1, 2, 3)]
    assert drawn == [eyes.ask(pictures[0], "which?", seed=seed, **warm) for seed in (0, 1, 2, 3)]
    assert len(set(drawn)) > 1
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len({eyes.ask(pictures[0], "which?", **warm) for _ in range(6)}) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_what_generate_takes_is_handed_on(eyes, pictures):
    tokens = eyes.ask(pictures[0], "what?", max_new_tokens=6, min_new_tokens=6, num_beams=2)
    assert isinstance(tokens, str)
    with pytest.raises(ValueError, match="no_such"):
        eyes.ask(pictures[0], "what?", no_such_setting=1)


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda eyes: eyes.ask("missing.png", "what?"), UserError, "missing.png"),
        (lambda eyes: eyes.ask([None], "what?"), TypeError, "NoneType"),
        (lambda eyes: eyes.ask([None, None, None], ["a", "b"]), UserError, "3 entries"),
        (lambda eyes: eyes.ask(None, "what?", max_new_tokens=0), UserError, "max_new_tokens"),
        (lambda eyes: eyes.ask(None, "what?", temperature=-1.0), UserError, "temperature"),
        (lambda eyes: eyes.ask(None, "what?", top_p=0.0), UserError, "top_p"),
        (lambda eyes: list(eyes.watch("missing.mp4")), UserError, "missing.mp4"),
        (lambda eyes: list(eyes.watch([], session=eyes.stream(), prompt="x")), UserError, "prompt"),
        (lambda eyes: casa.load("no/such/folder"), UserError, "no/such/folder"),
        (lambda eyes: casa.load("casa-tiny", device="tpu"), UserError, "tpu"),
        (lambda eyes: casa.evaluate(eyes, tasks=["pages", "novels"]), UserError, "novels"),
        (lambda eyes: casa.evaluate(eyes, data="qa.jsonl"), UserError, "No metric was named"),
        (lambda eyes: casa.evaluate(eyes, ["pages"], data="qa.jsonl", metrics=["anls"]), UserError, "leave out tasks"),
        (lambda eyes: casa.evaluate(eyes, data="gone.jsonl", metrics=["anls"]), UserError, "gone.jsonl"),
        (lambda eyes: casa.evaluate(eyes, suffix="x"), UserError, "suffix is for data of your own"),
        (lambda eyes: casa.evaluate(eyes, metrics=["anls"]), UserError, "metrics"),
        (lambda eyes: casa.train("missing.yaml"), UserError, "missing.yaml"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(eyes, call, error, word):
    with pytest.raises(error, match=word):
        call(eyes)


def test_a_stream_is_a_session_on_the_same_model(eyes):
    frames = noise_frames(0, 3)
    session = eyes.stream(prompt="say it", max_text_tokens=64, max_new_tokens=4)
    plain = casa.StreamingSession(eyes.model, eyes.processor, "say it", 64, max_new_tokens=4)
    assert [session.step(frame) for frame in frames] == [plain.step(frame) for frame in frames]


def test_watching_gives_the_captions_of_a_session_with_their_times():
    eyes = casa.CasaPipeline(tiny_speaker(), tiny_processor())
    frames = noise_frames(0, 6)
    session = eyes.stream(max_new_tokens=4)
    said = [session.step(frame) for frame in frames]
    wanted = [(number / 2, text) for number, text in enumerate(said) if text]
    found = list(eyes.watch(frames, fps=2, max_new_tokens=4))
    assert [(caption.time, caption.text) for caption in found] == wanted
    assert all(caption.lag >= 0 for caption in found)
    # a session of one's own goes on from frame to frame
    mine = eyes.stream(max_new_tokens=4)
    parts = [list(eyes.watch(part, fps=2, session=mine)) for part in (frames[:2], frames[2:])]
    assert [caption.text for part in parts for caption in part] == [text for _, text in wanted]


def test_a_part_of_a_film_is_watched(noise_film):
    eyes = casa.CasaPipeline(tiny_casa(), tiny_processor())
    found = [caption.time for caption in eyes.watch(noise_film(2), fps=4, start=0.5, end=1.0, max_new_tokens=3)]
    assert found == [0.5, 0.75]


@pytest.mark.slow
def test_a_live_source_keeps_pace(noise_film):
    eyes = casa.CasaPipeline(tiny_speaker(), tiny_processor())
    film = noise_film(1)
    found = list(eyes.watch(film, fps=4, live=True, max_new_tokens=3))
    assert found == sorted(found, key=lambda caption: caption.time)
    assert {caption.time for caption in found} <= {0.0, 0.25, 0.5, 0.75}


@pytest.mark.slow
def test_evaluating_scores_the_tasks_as_the_runner_does(eyes):
    told = []
    scores = casa.evaluate(eyes, ["scenes"], seed=3, limit=1, progress=lambda *done: told.append(done))
    assert scores["scenes"]["n"] == 1
    assert told == [("scenes", 1, 1)]
    assert casa.evaluate(eyes, ["scenes"], seed=3, limit=1) == scores


@pytest.mark.slow
def test_the_guide_runs(tmp_path, monkeypatch, noise_film):
    """docs/library.md, in a folder with its files."""
    guide = (Path(__file__).parents[1] / "docs" / "library.md").read_text(encoding="utf-8")
    for name in ("page.png", "other.png"):
        Image.new("RGB", (56, 84), "white").save(tmp_path / name)
    (tmp_path / "clip.mp4").symlink_to(noise_film(2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(casa.pipeline, "load", lambda *_, **__: casa.CasaPipeline(tiny_speaker(), tiny_processor()))
    names = {}
    for text in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(compile(text, "docs/library.md", "exec"), names)
    assert isinstance(names["session"], casa.StreamingSession)
