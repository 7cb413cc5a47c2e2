"""Live captions: frames and the words said during them, in both forms of a row."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casa.data import BadRecord, Picture, Text, parse_row
from casa.data.record import NoRecord
from casa.data.shapes import interleaved

WORDS = [[1.1, 1.4, "And"], [1.4, 1.8, " she"], [2.2, 2.9, "won"]]


@pytest.fixture(autouse=True)
def video(root):
    (root / "v.mp4").write_bytes(b"video")


def nested(words, text="", **rest):
    clip = {"type": "video", "video": "v.mp4", "video_start": 1.0, "video_end": 3.0}
    user = {"role": "user", "content": [clip, {"type": "text", "text": text, **rest}]}
    return [user, {"role": "assistant", "content": [{"type": "text_stream", "text_stream": words}]}]


def test_each_frame_is_followed_by_the_words_that_begin_before_the_next(context, told):
    read = told(parse_row(nested(WORDS, title="The final", previous="What a match."), context()))
    assert read[0] == ("user", ["The final", "What a match."])
    assert read[1] == ("assistant", [1.0, ("And she", 1.1, 1.8), 1.5, 2.0, ("won", 2.2, 2.9), 2.5])


def test_the_flat_form_says_the_same(context, told):
    words = [{"start": start, "end": end, "word": word} for start, end, word in WORDS]
    flat = {"video": "v.mp4", "video_start": 1.0, "video_end": 3.0, "words": words}
    assert told(parse_row(flat, context()))[1] == told(parse_row(nested(WORDS), context()))[1]
    assert told(parse_row(flat, context()))[0] == ("user", ["Describe what is new."])


def test_keys_that_are_null_are_as_if_absent(context, told):
    words = [{"start": start, "end": end, "word": None, "text": word} for start, end, word in WORDS]
    flat = {"video": "v.mp4", "video_start": None, "start": 1.0, "video_end": None, "end": 3.0, "words": words}
    assert told(parse_row(flat, context()))[1] == told(parse_row(nested(WORDS), context()))[1]


def test_the_list_of_offsets_that_ends_a_file_is_no_record(context):
    with pytest.raises(NoRecord):
        parse_row([0, 812, 1630], context(shape="live-whisperx"))


def test_without_an_end_the_clip_lasts_as_long_as_its_words(context, told):
    read = told(parse_row({"video": "v.mp4", "words": WORDS}, context(fps=1.0)))
    assert read[1] == ("assistant", [0.0, 1.0, ("And she", 1.1, 1.8), 2.0, ("won", 2.2, 2.9)])


@given(
    st.lists(st.floats(0, 20), max_size=12, unique=True),
    st.lists(st.floats(0, 25), max_size=12),
)
def test_no_word_is_lost_moved_or_said_before_its_frame(times, starts):
    frames = [Picture(b"png", time) for time in sorted(times)]
    words = [Text(f"w{k}", start, start) for k, start in enumerate(sorted(starts))]
    parts = interleaved(frames, words)
    assert [part for part in parts if isinstance(part, Picture)] == frames
    said = " ".join(part.text for part in parts if isinstance(part, Text)).split()
    assert said == ([word.text for word in words] if frames else [])
    for before, after in itertools.pairwise(parts):
        if isinstance(after, Text):
            assert isinstance(before, Picture)
            assert before is frames[0] or before.time <= after.start


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (nested([]), "empty-answer"),
        (nested([[1.1, 1.2, " "]]), "empty-answer"),
        (nested([[1.1, "And"]]), "wrong-type"),
        (nested([[1.1, 1.0, "And"]]), "wrong-type"),
        (nested([[-1, 1.0, "And"]]), "wrong-type"),
        (nested([[float("nan"), 1.0, "And"]]), "wrong-type"),
        (nested([["1", "2", "And"]]), "wrong-type"),
        (nested([[61.0, 61.5, "And"]]), "wrong-type"),
        (nested("And"), "wrong-type"),
        ({"messages": []}, "missing-picture"),
        ({"messages": [0, True]}, "missing-picture"),
        ({"messages": [0, 1.5]}, "missing-picture"),
        ({"video": "missing.mp4", "words": WORDS}, "missing-picture"),
        ({"video": "../v.mp4", "words": WORDS}, "outside"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(context, row, reason):
    with pytest.raises(BadRecord) as refused:
        parse_row(row, context(shape="live-whisperx"))
    assert refused.value.reason == reason
