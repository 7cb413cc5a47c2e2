"""A picture and its caption, the shape of most CSV files and of WebDataset samples.

    image,caption
    cat.jpg,A cat on a mat.

The user asks `prompt`. Other names of the two columns that are known stand in `IMAGE` and `CAPTION`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Record, Text
from casa.data.shapes.context import Context
from casa.data.values import record_of, text_of

IMAGE = ("image", "file_name", "filename", "image_path", "picture")
CAPTION = ("caption", "text", "description")
PROMPT = "Describe the picture."


def caption(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    image, words = (_column(row, names, what) for names, what in ((IMAGE, "image"), (CAPTION, "caption")))
    said = text_of(words, "The caption")
    answer = [Text(said)] if said.strip() else []
    question = Text(context.settings.prompt or PROMPT)
    return record_of([("user", [context.files.picture(image), question]), ("assistant", answer)], context.origin)


def _column(row: Mapping[str, Any], names: Sequence[str], what: str) -> Any:
    """The one column of those names that holds something. Raises BadRecord for none, and for several."""
    found = [name for name in names if row.get(name) is not None]
    if not found:
        raise BadRecord("wrong-type", f"The row has no {what}: name its column, columns: {{{what}: ...}}.")
    if len(found) > 1:
        raise BadRecord(
            "unknown-shape",
            f"The row has {' and '.join(found)}: say which is the {what}, columns: {{{what}: {found[0]}}}.",
        )
    return row[found[0]]
