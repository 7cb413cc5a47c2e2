"""A question about pictures and its answer, as most sets for measuring have it: VQAv2, TextVQA, DocVQA, ChartQA.

    {"image": "cat.jpg", "question": "What is it?", "answers": ["A cat.", "cat"]}

The question is `question` or `query`; the answer `answer`, `label` or `response`, or a list of those that are accepted.
The first is learned (VQAv2's `multiple_choice_answer`, where there is one); all are the record's `references`. Pictures
stand before the question, unless <image> tags say otherwise.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Message, Record, Text
from casa.data.shapes.context import Context
from casa.data.shapes.fields import refuse
from casa.data.values import column_of, first_of, many, pictures_before, record_of, row_pictures, text_of

QUESTION = ("question", "query")
# names of one answer, and of the list that it is from
_ANSWERS = (("multiple_choice_answer", "answer", "answers"), ("label", "labels"), ("response",))
ANSWER = tuple(name for names in _ANSWERS for name in names)
_CHOICES = "write it into the question, and the answer as words"
_ASKED: Mapping[str, str] = dict.fromkeys(("choices", "options", "context", "hint", "passage"), _CHOICES)


def vqa(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    refuse(row, _ASKED, "The row")
    question = text_of(column_of(row, QUESTION, "question"), "The question")
    accepted = list(dict.fromkeys(text.strip() for text in _accepted(row) if text.strip()))
    messages = [
        Message("user", (Text(question),) if question.strip() else ()),
        Message("assistant", (Text(accepted[0]),) if accepted else ()),
    ]
    pictures = row_pictures(row, context.files.picture)
    return record_of(pictures_before(messages, pictures), context.origin, accepted)


def _accepted(row: Mapping[str, Any]) -> Iterator[str]:
    """The answers that a row gives; the one to learn first."""
    found = [names for names in _ANSWERS if any(row.get(name) is not None for name in names)]
    if len(found) != 1:
        named = " and ".join(name for names in found for name in names if row.get(name) is not None)
        why = f"has {named}: say which is the answer" if found else "has no answer: name its column"
        raise BadRecord("unknown-shape" if found else "wrong-type", f"The row {why}, columns: {{answer: ...}}.")
    for name in found[0]:
        yield from _texts(row.get(name))


def _texts(value: Any) -> Iterator[str]:
    for entry in many(value):
        if isinstance(entry, Mapping):
            yield from _texts(first_of(entry, "answer", "text"))
        else:
            yield text_of(entry, "An answer")
