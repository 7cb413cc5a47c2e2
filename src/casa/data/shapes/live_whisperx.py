"""Live captions, Live-WhisperX's rows: a video, and words with the times at which they are said.

    [{"role": "user", "content": [{"type": "video", "video": "game.mp4", "video_start": 12.0, "video_end": 14.0},
                                  {"type": "text", "text": "", "title": "The final"}]},
     {"role": "assistant", "content": [
         {"type": "text_stream", "text_stream": [[12.1, 12.4, "And"], [12.4, 12.8, "she"], [13.2, 13.9, "won"]]}]}]

or, flat, {"video": ..., "words": [...]} with words as lists or as objects (start, end, word). Each frame is followed by
the words that begin before the next one, so that no word is learned before its frame is seen:

    frame 12.0   And she      frame 12.5             frame 13.0   won          frame 13.5

The last line of the set's own file is a list of numbers, the bytes where its lines begin: that is no record.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from casa.data.bad import BadRecord, NoRecord
from casa.data.record import Message, Picture, Record, Text
from casa.data.shapes.context import Context
from casa.data.values import Parts, first_of, list_of, record_of, seconds_of, text_of

PROMPT = "Describe what is new."
_TIMED = ("words", "text_stream", "segments")
# words may lie this far outside of the span and still be its own, in seconds
_SLACK = 1.0


@dataclass(frozen=True)
class _Clip:
    """What a row says, in either form. asked: the user's texts."""

    video: Any
    words: Any
    start: float
    end: float | None
    asked: tuple[str, ...]


def live_whisperx(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row, and its video once all else is right. Raises BadRecord, and NoRecord for a list of offsets."""
    if _offsets(row.get("messages")):
        raise NoRecord
    clip = _clip(row)
    path = context.files.path(clip.video, "video")
    words = [_word(entry) for entry in list_of(clip.words, "The timed words")]
    words = sorted((word for word in words if word.text), key=lambda word: word.start or 0.0)
    if not words:
        raise BadRecord("empty-answer", "No word is said: there is nothing to learn.")
    # silence after the last word is kept only where the row says how long it lasts
    end = clip.end if clip.end is not None else max(word.end or 0.0 for word in words)
    end = max(end, clip.start + 1 / context.settings.fps)
    if not any(clip.start - _SLACK <= (word.start or 0.0) <= end + _SLACK for word in words):
        raise BadRecord(
            "wrong-type",
            f"No word is said between {clip.start:g} and {end:g} s: count all times from the video's start.",
        )
    frames = context.frames(path, clip.start, end, thin=False)
    asked = [Text(text) for text in clip.asked] or [Text(context.settings.prompt or PROMPT)]
    said = Message("assistant", tuple(interleaved(frames, words)))
    return record_of([Message("user", tuple(asked)), said], context.origin)


def interleaved(frames: list[Picture], words: list[Text]) -> Parts:
    """Frames in rising time, each followed by the words (rising too) that begin before the next, as one text.

    Words from before the first frame follow it.
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


def _offsets(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and all(type(entry) is int for entry in messages)


def _clip(row: Mapping[str, Any]) -> _Clip:
    """The parts of a row, wherever its form keeps them."""
    video = speaker = row
    words = first_of(row, *_TIMED)
    if row.get("messages") is not None:
        video, speaker = {}, {}
        for part in _parts(row["messages"]):
            kind = part.get("type")
            if kind == "video":
                video = part
            elif kind == "text":
                speaker = part
            elif kind == "text_stream":
                words = part.get("text_stream")
    start, end = first_of(video, "video_start", "start"), first_of(video, "video_end", "end")
    return _Clip(
        video.get("video"),
        words,
        seconds_of(start or 0.0),
        None if end is None else seconds_of(end),
        tuple(_asked(speaker)),
    )


def _parts(messages: Any) -> Iterator[Mapping[str, Any]]:
    for message in list_of(messages, "messages"):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping):
                yield part


def _asked(speaker: Mapping[str, Any]) -> Iterator[str]:
    """What the user says: the text or the title, then what was said before the clip."""
    for value in (speaker.get("text") or speaker.get("title"), speaker.get("previous")):
        if value and text_of(value, "A text").strip():
            yield value


def _word(entry: Any) -> Text:
    if isinstance(entry, Mapping):
        entry = [entry.get("start"), entry.get("end"), first_of(entry, "word", "text")]
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        raise BadRecord("wrong-type", "A timed word is not [start, end, word].")
    start, end = seconds_of(entry[0]), seconds_of(entry[1])
    if end < start:
        raise BadRecord("wrong-type", f"A word ends ({end:g} s) before it begins ({start:g} s).")
    return Text(text_of(entry[2], "A word").strip(), start, end)
