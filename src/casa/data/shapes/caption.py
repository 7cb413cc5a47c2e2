"""A picture and its caption, the shape of most CSV files and of WebDataset samples.

    image,caption
    cat.jpg,A cat on a mat.

The user asks `prompt`. Other names of the two columns that are known stand in `IMAGE` and `CAPTION`.
"""

from collections.abc import Mapping
from typing import Any

from casa.data.record import Message, Record, Text
from casa.data.shapes.context import Context
from casa.data.values import column_of, record_of, text_of

IMAGE = ("image", "file_name", "filename", "image_path", "picture")
CAPTION = ("caption", "text", "description")
PROMPT = "Describe the picture."


def caption(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    image, words = column_of(row, IMAGE, "image"), column_of(row, CAPTION, "caption")
    said = text_of(words, "The caption")
    question = Text(context.settings.prompt or PROMPT)
    asked = Message("user", (context.files.picture(image), question))
    return record_of([asked, Message("assistant", (Text(said),) if said.strip() else ())], context.origin)
