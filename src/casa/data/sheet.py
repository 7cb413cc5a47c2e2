"""Samples of a data set as an HTML page: what is said about which pictures, in the windows that training will cut."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from casa.data.check import SampledRecord
from casa.data.html_report import SampleCard, ShownPicture, ShownText, ShownWindow, write_report
from casa.data.record import Picture, Record, Text
from casa.figures import counted
from casa.windows import WindowLayout

UNLEARNED = "assistant, not learned"
MAX_WINDOWS, MAX_PICTURES = 12, 8


def write_sheet(
    samples: Sequence[SampledRecord], path: str | os.PathLike[str], title: str = "", note: str = ""
) -> None:
    """Writes the samples as cards. title, note: two lines above them.

    Raises:
        UserError: The file has another ending than .html, or cannot be written there.
    """
    write_report(path, [_card(sample) for sample in samples], title=title, note=note)


def record_windows(record: Record) -> list[tuple[list[int], list[tuple[str, str]]]]:
    """The windows of a record before any tokens: numbers of its pictures from 0, and (who, words) in order.

    The border between messages counts as text, and so does the delimiter behind every frame of an assistant's.
    """
    texts: list[tuple[str, str] | None] = []
    places: list[tuple[int, int]] = []
    for message in record.messages:
        who = message.role if message.learn or message.role != "assistant" else UNLEARNED
        texts.append(None)
        for part in message.parts:
            if isinstance(part, Text):
                texts.append((who, part.text))
                continue
            places.append((len(texts), 1))
            texts += [None] if message.role == "assistant" else []
    found = []
    for window in WindowLayout.from_insertions([len(texts)], [places]).windows:
        said = [text for text in texts[window.text_start : window.text_stop] if text is not None]
        if window.num_image or said:
            found.append((list(range(window.image_start, window.image_stop)), said))
    return found


def _card(sample: SampledRecord) -> SampleCard:
    windows, pictures = record_windows(sample.record), list(sample.record.pictures())
    facts = f"{counted(len(pictures), 'picture')}, {counted(sample.tokens, 'image token')}" if pictures else "text only"
    origin = sample.record.origin
    shown = [_window(sample, pictures, numbers, said) for numbers, said in windows[:MAX_WINDOWS]]
    title = str(replace(origin, path=Path(origin.path).name))
    return SampleCard(title, facts, shown, max(0, len(windows) - MAX_WINDOWS))


def _window(
    sample: SampledRecord, pictures: Sequence[Picture], numbers: Sequence[int], said: Sequence[tuple[str, str]]
) -> ShownWindow:
    times = {number: pictures[number].time for number in numbers[:MAX_PICTURES] if number < len(sample.thumbnails)}
    shown = [
        ShownPicture(sample.thumbnails[number], "" if time is None else f"{time:.1f} s")
        for number, time in times.items()
    ]
    # what one side says in a row is one text
    texts = [
        ShownText("\n".join(text for _, text in run), who, learned=who == "assistant")
        for who, run in groupby(said, key=lambda entry: entry[0])
    ]
    return ShownWindow(shown, texts, len(numbers) - len(shown))
