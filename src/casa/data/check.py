"""A look at a whole data set: what is in it, how long and large it is, what cannot be used, and some of it to look at.

Every picture is decoded, so what passes here passes in training. Memory holds a few numbers per record, and samples.
"""

import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from casa.data.pictures import open_one
from casa.data.record import BadRecord, BadRecordReport, Record, Text
from casa.data.records import Records
from casa.data.settings import DataSettings, Shard

# quantities of a record, in the order in which tables show them
QUANTITIES = {
    "turns": "turns",
    "characters": "characters of text",
    "answer": "characters to learn",
    "text_tokens": "text tokens",
    "pictures": "pictures",
    "image_tokens": "image tokens",
    "width": "width of a picture, px",
    "height": "height of a picture, px",
}
_THUMBNAIL = 360  # px
_MOST_THUMBNAILS = 24


@dataclass
class SampledRecord:
    """A record to look at, and its first pictures, made small. tokens: of its images. number: among the good ones."""

    record: Record
    thumbnails: list[Image.Image]
    tokens: int
    number: int = 0


@dataclass
class Checked:
    """What was found. values: by the names in `QUANTITIES`. complete: whether every record was looked at."""

    records: int = 0
    complete: bool = True
    values: dict[str, array] = field(default_factory=lambda: {name: array("q") for name in QUANTITIES})
    samples: list[SampledRecord] = field(default_factory=list)
    report: BadRecordReport = field(default_factory=BadRecordReport)

    def statistics(self) -> dict[str, dict[str, float]]:
        """least, median, mean, 95 %, most and total of each quantity that was counted."""
        counted = {name: np.frombuffer(values, dtype=np.int64) for name, values in self.values.items() if values}
        return {
            name: {
                "least": int(numbers.min()),
                "median": float(np.median(numbers)),
                "mean": round(float(numbers.mean()), 2),
                "p95": float(np.percentile(numbers, 95)),
                "most": int(numbers.max()),
                "total": int(numbers.sum()),
            }
            for name, numbers in counted.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, as plain values."""
        listed = [{"origin": str(o), "reason": bad.reason, "why": str(bad)} for o, bad in self.report.first]
        return {
            "records": self.records,
            "complete": self.complete,
            "bad": self.report.total,
            "reasons": dict(self.report.counts),
            "statistics": self.statistics(),
            "first_bad": listed,
        }


def image_tokens(width: int, height: int) -> int:
    """Tokens of a picture in the paper's encoder: patches of 14 px, merged 2 x 2."""
    return max(1, round(width / 28)) * max(1, round(height / 28))


def check_data(
    settings: DataSettings,
    *,
    limit: int | None = None,
    count_text: Callable[[str], int] | None = None,
    count_image: Callable[[int, int], int] = image_tokens,
    samples: int = 12,
    report: BadRecordReport | None = None,
    progress: Callable[[int], None] | None = None,
) -> Checked:
    """Reads every record once, in the order of the files, and decodes its pictures.

    Raises:
        UserError: Data that are not there. Bad records are counted.

    Args:
        limit: Rows at most, good or bad.
        count_text: Tokens of a text; None leaves them out.
        count_image: Tokens of a picture of (width, height) px.
        samples: Records kept to look at, chosen evenly.
        progress: Told the rows so far.
    """
    once = DataSettings(settings.sources, shuffle=0, exhausted="leave")
    found = Checked(report=report or BadRecordReport())
    records = Records(once, 0, Shard(), found.report)
    chance = random.Random(0)
    for record in _limited(records, limit, found, progress):
        sizes, thumbnails = [], []
        try:
            for number, picture in enumerate(record.pictures(), start=1):
                image = open_one(picture, number)
                sizes.append(image.size)
                if number <= _MOST_THUMBNAILS:
                    thumbnails.append(image)
        except BadRecord as bad:
            records.refuse(record.origin, bad)
            continue
        found.records += 1
        tokens = _count(found, record, sizes, count_text, count_image)
        # every record has the same chance to be seen
        place = len(found.samples) if len(found.samples) < samples else chance.randrange(found.records)
        if place < samples:
            sample = SampledRecord(record, [_small(image) for image in thumbnails], tokens, found.records)
            found.samples[place : place + 1] = [sample]
    found.samples.sort(key=lambda sample: sample.number)
    return found


def _limited(
    records: Records, limit: int | None, found: Checked, progress: Callable[[int], None] | None
) -> Iterator[Record]:
    """The good ones among the first `limit` rows, however many of these are bad."""
    for taken, record in enumerate(records.rows(), start=1):
        if record is not None:
            yield record
        if progress is not None:
            progress(taken)
        if taken == limit:
            found.complete = not records.skip()
            return


def _count(
    found: Checked,
    record: Record,
    sizes: list[tuple[int, int]],
    count_text: Callable[[str], int] | None,
    count_image: Callable[[int, int], int],
) -> int:
    said = [
        (message.role == "assistant" and message.learn, part.text)
        for message in record.messages
        for part in message.parts
        if isinstance(part, Text)
    ]
    tokens = sum(count_image(width, height) for width, height in sizes)
    found.values["turns"].append(len(record.messages))
    found.values["characters"].append(sum(len(text) for _, text in said))
    found.values["answer"].append(sum(len(text) for learned, text in said if learned))
    found.values["pictures"].append(len(sizes))
    found.values["image_tokens"].append(tokens)
    found.values["width"].extend(width for width, _ in sizes)
    found.values["height"].extend(height for _, height in sizes)
    if count_text is not None:
        found.values["text_tokens"].append(sum(count_text(text) for _, text in said))
    return tokens


def _small(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    return image
