"""The shapes of rows that people have, to records: one small reader per shape, told apart by their keys.

A reader is given a row and its context, and raises BadRecord for what cannot be learned from. docs/data.md has an
example of each.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from casa.data.pictures import RowContext
from casa.data.record import BadRecord, Message, NoRecord, Picture, Record, Text
from casa.data.turns import (
    ROW,
    TAG,
    Fields,
    Parts,
    column_of,
    first_of,
    list_of,
    many,
    record_of,
    record_of_chat,
    refuse,
    seconds_of,
    text_of,
    with_system,
)

# columns of captions and of questions; the answer's names are of one answer, and of the list that it is from
_IMAGE = ("image", "file_name", "filename", "image_path", "picture")
_CAPTION = ("caption", "text", "description")
_QUESTION = ("question", "query")
_ANSWERS = (("multiple_choice_answer", "answer", "answers"), ("label", "labels"), ("response",))
_TIMED = ("words", "text_stream", "segments")
# words may lie this far outside of a clip and still be its own, in seconds
_SLACK = 1.0


def parse_row(row: object, context: RowContext) -> Record:
    """A record from one row of the shape that the settings name, or that its keys tell.

    Raises:
        BadRecord: The row cannot be learned from.
        NoRecord: It holds no record by its nature.
    """
    if isinstance(row, list):
        # a chat without anything around it, as Live-WhisperX's lines are
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise BadRecord("wrong-type", f"The row is a {type(row).__name__}, not an object with keys.")
    for known, actual in context.settings.columns.items():
        if actual not in row:
            raise BadRecord("wrong-type", f"The row has no column {actual!r}: mend columns in the settings.")
        row = {**{key: value for key, value in row.items() if key != actual}, known: row[actual]}
    refuse(row, ROW, "The row")
    shape = SHAPES[recognised(row) if context.settings.shape == "auto" else context.settings.shape]
    refuse(row, shape.refused, "The row")
    return with_system(shape.read(row, context), row)


def recognised(row: Fields) -> str:
    """The name of the one shape that has such keys; null counts as absent. Raises BadRecord for none or several."""
    has = {key for key, value in row.items() if value is not None}
    fits = []
    if "messages" in has:
        streams = any(part.get("type") == "text_stream" for part in _object_parts(row["messages"]))
        fits.append("live-whisperx" if streams else "chat")
    if "texts" in has:
        fits.append("finevision")
    if "conversations" in has:
        fits += [name for name, key in (("llava-video", "video"), ("llava", "image")) if key in has] or ["llava"]
    if "video" in has and has & set(_TIMED):
        fits.append("live-whisperx")
    if {"prompt", "completion"} <= has:
        fits.append("prompt-completion")
    # columns of a chat's row that such tables have too are notes beside it
    if not fits:
        columns = {"vqa": (_QUESTION, sum(_ANSWERS, ())), "caption": (_IMAGE, _CAPTION)}
        fits += [name for name, pair in columns.items() if all(has & set(names) for names in pair)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise BadRecord("unknown-shape", f"The row could be {' or '.join(fits)}: name the shape.")
    keys = ", ".join(sorted(map(str, has))[:8]) or "none"
    raise BadRecord("unknown-shape", f"The row's keys ({keys}) fit no shape: name the shape, or map its columns.")


def _chat(row: Fields, context: RowContext) -> Record:
    return record_of_chat(row, context, list_of(row.get("messages"), "messages"))


def _llava(row: Fields, context: RowContext) -> Record:
    return record_of_chat(row, context, list_of(row.get("conversations"), "conversations"))


def _llava_video(row: Fields, context: RowContext) -> Record:
    """One tag, <image> or <video>, stands for all frames. The video is read once all else is right."""
    path = context.path(row.get("video"), "video")
    video, entries = Picture(path), list_of(row.get("conversations"), "conversations")
    record = record_of_chat(row, context, entries, pictures=[video], tags=(TAG, "<video>"))
    frames = context.frames(path, thin=True)
    messages = [
        replace(message, parts=tuple(p for part in message.parts for p in (frames if part is video else [part])))
        for message in record.messages
    ]
    return replace(record, messages=tuple(messages))


def _finevision(row: Fields, context: RowContext) -> Record:
    entries: list[Fields] = []
    for entry in list_of(row.get("texts"), "texts"):
        if not isinstance(entry, Mapping):
            raise BadRecord("wrong-type", "An entry of texts is no object with user and assistant.")
        asked, said = (text_of(entry.get(side), side) for side in ("user", "assistant"))
        beside = {key: value for key, value in entry.items() if key not in ("user", "assistant")}
        entries += _question(asked), {**beside, "role": "assistant", "content": said}
    return record_of_chat(row, context, entries, placed=False)


def _prompt_completion(row: Fields, context: RowContext) -> Record:
    if row.get("label") is False:
        raise BadRecord("unfollowed-field", "The row has label false, a bad answer: leave the record out.")
    prompt, completion = (
        [{"role": role, "content": row[key]}] if isinstance(row.get(key), str) else list_of(row.get(key), key)
        for key, role in (("prompt", "user"), ("completion", "assistant"))
    )
    return record_of_chat(row, context, [*prompt, *completion], read=len(prompt), placed=False)


def _vqa(row: Fields, context: RowContext) -> Record:
    """The first answer is learned, all are the record's references, as often as they were given: metrics count people.

    Of VQAv2's, `multiple_choice_answer` is learned. One answer beside a list of them that has it is not counted again.
    """
    question = text_of(column_of(row, _QUESTION, "question"), "The question")
    found = [name for names in _ANSWERS for name in names if row.get(name) is not None]
    kinds = [names for names in _ANSWERS if set(names) & set(found)]
    if len(kinds) != 1:
        why = f"has {' and '.join(found)}: say which is the answer" if found else "has no answer: name its column"
        raise BadRecord("unknown-shape" if found else "wrong-type", f"The row {why}, columns: {{answer: ...}}.")
    given = [[text.strip() for text in _answers(row[name]) if text.strip()] for name in found]
    learned, *rest = [text for texts in given for text in texts] or [""]
    entries = [_question(question), {"role": "assistant", "content": learned}]
    beside = isinstance(row[found[0]], str) and learned in rest
    references = rest if beside else [learned, *rest] if learned else []
    return record_of_chat(row, context, entries, placed=False, references=references)


def _question(text: str) -> Fields:
    return {"role": "user", "content": text if text.strip() else ""}


def _answers(value: object) -> Iterator[str]:
    for entry in many(value):
        if isinstance(entry, Mapping):
            yield from _answers(first_of(entry, "answer", "text"))
        else:
            yield text_of(entry, "An answer")


def _caption(row: Fields, context: RowContext) -> Record:
    """The user asks the settings' `prompt`, and the caption answers."""
    image, said = column_of(row, _IMAGE, "image"), text_of(column_of(row, _CAPTION, "caption"), "The caption")
    asked = Text(context.settings.prompt or "Describe the picture.")
    messages = [Message("user", (context.picture(image), asked)), Message("assistant", (Text(said),))]
    return record_of(messages, context)


def _live(row: Fields, context: RowContext) -> Record:
    """A video, and words with the times at which they are said: flat, or as parts of a chat, Live-WhisperX's form.

    Each frame is followed by the words that begin before the next one. The video is read once all else is right. The
    last line of the set's own file is a list of the bytes where its lines begin: that is no record (NoRecord).
    """
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(type(entry) is int for entry in messages):
        raise NoRecord
    video = speaker = row
    timed = first_of(row, *_TIMED)
    if messages is not None:
        list_of(messages, "messages")
        kinds = {part.get("type"): part for part in _object_parts(messages)}
        video, speaker = kinds.get("video", {}), kinds.get("text", {})
        timed = kinds["text_stream"].get("text_stream") if "text_stream" in kinds else timed
    path = context.path(video.get("video"), "video")
    start = seconds_of(first_of(video, "video_start", "start") or 0.0)
    end = first_of(video, "video_end", "end")
    asked = [speaker.get("text") or speaker.get("title"), speaker.get("previous")]
    asked = [Text(value) for value in asked if value and text_of(value, "A text").strip()]
    words = [_word(entry) for entry in list_of(timed, "The timed words")]
    words = sorted((word for word in words if word.text), key=lambda word: word.start or 0.0)
    if not words:
        raise BadRecord("empty-answer", "No word is said: there is nothing to learn.")
    # silence after the last word is kept only where the row says how long it lasts
    end = seconds_of(end) if end is not None else max(word.end or 0.0 for word in words)
    end = max(end, start + 1 / context.settings.fps)
    if not any(start - _SLACK <= (word.start or 0.0) <= end + _SLACK for word in words):
        raise BadRecord(
            "wrong-type", f"No word is said between {start:g} and {end:g} s: count all times from the video's start."
        )
    prompt = asked or [Text(context.settings.prompt or "Describe what is new.")]
    said = interleaved(context.frames(path, start, end, thin=False), words)
    return record_of([Message("user", tuple(prompt)), Message("assistant", tuple(said))], context)


def interleaved(frames: Sequence[Picture], words: Sequence[Text]) -> Parts:
    """Frames in rising time, each followed by the words (rising too) that begin before the next, as one text.

    No word is learned before its frame is seen. Words from before the first frame follow it.

        frame 12.0   And she      frame 12.5             frame 13.0   won          frame 13.5
    """
    found: Parts = []
    taken = 0
    for number, frame in enumerate(frames):
        until = frames[number + 1].time if number + 1 < len(frames) else math.inf
        begun = taken
        while taken < len(words) and (words[taken].start or 0.0) < (until or 0.0):
            taken += 1
        found.append(frame)
        if said := words[begun:taken]:
            found.append(Text(" ".join(word.text for word in said), said[0].start, said[-1].end))
    return found


def _word(entry: object) -> Text:
    if isinstance(entry, Mapping):
        entry = [entry.get("start"), entry.get("end"), first_of(entry, "word", "text")]
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        raise BadRecord("wrong-type", "A timed word is not [start, end, word].")
    start, end = seconds_of(entry[0]), seconds_of(entry[1])
    if end < start:
        raise BadRecord("wrong-type", f"A word ends ({end:g} s) before it begins ({start:g} s).")
    return Text(text_of(entry[2], "A word").strip(), start, end)


def _object_parts(messages: object) -> Iterator[Fields]:
    """The parts of a chat's contents that are objects."""
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from (part for part in many(content) if isinstance(part, Mapping))


class Shape(NamedTuple):
    """How rows of one shape are read, and which of their fields cannot be followed, each with its remedy."""

    read: Callable[[Fields, RowContext], Record]
    refused: Mapping[str, str] = {}


_PART: Mapping[str, str] = dict.fromkeys(
    ("video", "videos"), "write it as a part of the content, {type: video, video: ...}"
)
_ASKED = ("choices", "options", "context", "hint", "passage")
SHAPES: Mapping[str, Shape] = {
    # {"messages": [{"role": ..., "content": ...}, ...], "images": [...]}
    "chat": Shape(_chat, _PART),
    # {"image": ..., "conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": ...}]}
    "llava": Shape(_llava, {"videos": "name one film, in video"}),
    # {"images": [...], "texts": [{"user": ..., "assistant": ...}, ...]}
    "finevision": Shape(_finevision),
    # {"video": ..., "conversations": ...}
    "llava-video": Shape(_llava_video),
    # {"video": "game.mp4", "video_start": 12.0, "words": [{"start": 12.1, "end": 12.4, "word": "And"}, ...]}
    "live-whisperx": Shape(_live),
    # {"image": ..., "question": ..., "answers": [...]}
    "vqa": Shape(_vqa, dict.fromkeys(_ASKED, "write it into the question, and the answer as words")),
    # {"prompt": ..., "completion": ...}, two texts or the two parts of a chat; only the completion is learned
    "prompt-completion": Shape(_prompt_completion, _PART),
    # {"image": ..., "caption": ...}
    "caption": Shape(_caption),
}
