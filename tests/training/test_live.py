"""Live captions as tokens: those that a StreamingSession feeds for the same frames and words, one window per frame."""

import io
from dataclasses import dataclass, field, replace

import pytest
import torch
from PIL import Image

from casa import CasaForConditionalGeneration, StreamingSession, WindowLayout
from casa.data.record import BadRecord, Message, Origin, Record, Text
from casa.models import processor_for
from casa.streaming import Sampling
from casa.testing import TOKENIZERS, tiny_casa, tiny_encoder, tiny_processor, tiny_tokenizer
from casa.training.collator import PackCollator
from casa.training.config import TokenBudget
from casa.training.samples import SampleMaker

BIG = TokenBudget(10_000, 100_000)


@dataclass(frozen=True)
class Told(Sampling):
    """Says what it is told to, by frame and question."""

    words: list[list[int]] = field(default_factory=list)

    def pick(self, logits, said, draws, stops, earlier):
        if len(said) < len(self.words[0]):
            return self.words[0][len(said)]
        self.words.pop(0)
        return min(stops)


class Heard:
    """Stands before a model, and keeps what it is fed."""

    def __init__(self, model):
        self.ids, self.places = [], []

        def keep(module, args, kwargs):
            if kwargs.get("image_positions") is not None:
                self.places += [len(self.ids) + index for _, index in kwargs["image_positions"].tolist()]
            self.ids += kwargs["input_ids"][0].tolist()

        self.hook = model.register_forward_pre_hook(keep, with_kwargs=True)


@pytest.fixture(scope="module")
def model() -> CasaForConditionalGeneration:
    found = tiny_casa(dtype=torch.float32)
    found.generation_config.eos_token_id = 2
    return found


def live(picture, words, prompt="say it"):
    frames = [picture(56, 56, number, number / 2) for number in range(len(words))]
    parts = []
    for frame, said in zip(frames, words, strict=True):
        parts.append(frame)
        if said:
            parts.append(Text(said, frame.time, frame.time + 0.4))
    lead = () if prompt is None else (Message("user", (Text(prompt),)),)
    return Record((*lead, Message("assistant", tuple(parts))), Origin("live.jsonl", 1)), frames


@pytest.mark.slow
@pytest.mark.parametrize("delimited", [True, False])
@pytest.mark.parametrize("prompt", ["what is new", None])
@pytest.mark.parametrize("prefix", ["", "<user>"])
@pytest.mark.parametrize("gist", [0, 2])
def test_the_tokens_are_those_that_a_session_feeds(model, picture, delimited, prompt, prefix, gist):
    if gist:
        model = tiny_casa(dtype=torch.float32, gist=2)
        model.generation_config.eos_token_id = 2
    processor = tiny_processor(delimited)
    processor.frame_prefix = prefix
    processor.gist_ids = model.gist_ids
    words = ["ab c", "", "d", "", "", "efg h"]
    record, frames = live(picture, words, prompt)
    sample = SampleMaker(processor, BIG)(record)[0]

    heard = Heard(model)
    told = [processor.tokenizer.encode(said) for said in words]
    session = StreamingSession(model, processor, prompt, sampling=Told(words=told))
    for frame in frames:
        session.step(Image.open(io.BytesIO(frame.source)))
    heard.hook.remove()
    # the last stop token is chosen, and waits to be fed
    assert [*heard.ids, *session._pending] == list(sample.ids)
    assert heard.places == list(sample.places)
    said = [token for token, learn in zip(sample.ids, sample.learn, strict=True) if learn]
    assert processor.tokenizer.decode(said) == "".join(f"{each}<end>" for each in words)


def test_a_question_in_mid_stream_is_what_ask_feeds(model, picture):
    processor = tiny_processor()
    first, frames = live(picture, ["ab", ""])
    later, more = live(picture, ["c"], prompt=None)
    ask = (Message("user", (Text("why"),)), Message("assistant", (Text("no"),)))
    record = Record((*first.messages, *ask, *later.messages), Origin("live.jsonl", 2))
    sample = SampleMaker(processor, BIG)(record)[0]

    heard = Heard(model)
    told = [processor.tokenizer.encode(said) for said in ("ab", "", "no", "c")]
    session = StreamingSession(model, processor, "say it", sampling=Told(words=told))
    for frame in frames:
        session.step(Image.open(io.BytesIO(frame.source)))
    session.ask("why")
    session.step(Image.open(io.BytesIO(more[0].source)))
    heard.hook.remove()
    assert [*heard.ids, *session._pending] == list(sample.ids)
    assert heard.places == list(sample.places)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_said_live_is_text_and_an_answer_begins_behind_its_prompt(picture, kind):
    processor = processor_for(tiny_tokenizer(kind), tiny_encoder().config)
    first, _ = live(picture, ["line </s>", ""], prompt="an <image>")
    ask = (Message("user", (Text("line <image>"),)), Message("assistant", (Text("407"),)))
    sample = SampleMaker(processor, BIG)(Record((*first.messages, *ask), first.origin))[0]
    asked = [
        processor.apply_chat_template(
            [{"role": "user", "content": words}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0].tolist()
        for words in ("an <image>", "line <image>")
    ]
    assert list(sample.ids[: len(asked[0])]) == asked[0]
    assert len(sample.places) == 2
    # two frames, and the answer behind the words that asked for it
    assert sample.ids.count(3) == 3
    answer = sample.ids[len(sample.ids) - 1 - list(sample.ids)[::-1].index(asked[1][-1]) + 1 :]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": "line <image>"}, {"role": "assistant", "content": "407"}], tokenize=True
    )[0].tolist()
    decode = processor.tokenizer.decode
    assert decode([*asked[1], *answer]) == decode(chat).rstrip()
    learned = [token for token, learn in zip(sample.ids, sample.learn, strict=True) if learn]
    said = processor.typed_text.encode_spelled("line </s>").ids
    assert learned == [*said, 3, 3, *answer]


@pytest.mark.parametrize("delimited", [True, False])
def test_every_frame_has_a_window(picture, delimited):
    processor = tiny_processor(delimited)
    record, _ = live(picture, ["a", "", "b"])
    sample = SampleMaker(processor, BIG)(record)[0]
    layout = WindowLayout.from_insertions([len(sample.ids)], [[(place, 4) for place in sample.places]])
    assert [len(window.images) for window in layout.windows] == [0, 1, 1, 1]
    batch = PackCollator(processor)([sample])
    assert batch["image_positions"].tolist() == [[0, place] for place in sample.places]


def test_words_before_the_first_frame_are_said_of_it(picture):
    processor = tiny_processor()
    record, _ = live(picture, ["b"])
    lead, said = record.messages
    early = Record((lead, Message("assistant", (Text("a", 0.0, 0.1), *said.parts))), record.origin)
    sample = SampleMaker(processor, BIG)(early)[0]
    assert processor.tokenizer.decode(sample.ids).endswith("<assistant><frame>a b<end>")


def test_pictures_of_a_user_among_live_frames_are_refused(picture):
    record, _ = live(picture, ["b"])
    shown = Record((Message("user", (picture(),)), *record.messages), record.origin)
    with pytest.raises(BadRecord, match="two records"):
        SampleMaker(tiny_processor(), BIG)(shown)


def test_captions_that_are_not_to_be_learned_are_refused(picture):
    record, _ = live(picture, ["b"])
    lead, said = record.messages
    with pytest.raises(BadRecord, match="leave those out"):
        SampleMaker(tiny_processor(), BIG)(replace(record, messages=(lead, replace(said, learn=False))))
