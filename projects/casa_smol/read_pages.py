"""Pages as the page encoder reads them: what image tokens tell of the tasks' pictures, errors and all.

    python -m projects.casa_smol.read_pages data/casa-smol --out data/read

Pictures are read once, and kept as texts and places, so that a step of training costs no encoder. One file for each tar
of `data.py`; a command that was broken off goes on with the next one.

A question goes in if its answer was read, or is one of those that no picture spells out, as "Yes" and "blue": those
come again and again. What was misread cannot be answered, and would only teach to guess.
"""

import argparse
import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from casa.atomic import replacing
from casa.vision.page_encoder import PageEncoder
from casa.vision.page_reading import TextRun
from casa.vision.page_words import apart, known_words, words_of_page
from projects.casa_smol.perfect_pages import BLOCK, PROMPT, TOKEN, Sample, after, encoding
from projects.casa_smol.read import cells_of
from projects.casa_smol.weights import WEIGHTS, page_encoder
from projects.casa_smol.words import Words

OFTEN = 6  # pictures of which an answer that none of them spells out is the answer, at least
COMMON = 0.005  # of all questions have a word that belongs to how one asks, and not to what is asked for
NAMED = 0.01  # of all pages have a word that names one thing among many, at most
RENAMED = 0.5  # of the samples have other names
WORD = re.compile("([A-Za-z]{4,})")


@dataclass(frozen=True)
class ReadPage:
    """A picture as it was read. cells: rows and columns. turns: question, answer, and whether the answer was read."""

    task: str
    cells: tuple[int, int]
    runs: list[TextRun]
    turns: list[tuple[str, str, bool]]


def read_page(task: str, picture: Image.Image, turns: Sequence[tuple[str, str]], encoder: PageEncoder) -> ReadPage:
    """Reads a picture. turns: questions and answers."""
    cells = cells_of(picture, encoder)
    runs = encoder.runs(cells)[0]
    texts = "\n".join(run.text for run in runs)
    told = [(question, answer, answer in texts) for question, answer in turns]
    return ReadPage(task, (cells.shape[2], cells.shape[3]), runs, told)


def pictures_of(tar: Path) -> Iterator[tuple[Image.Image, list[tuple[str, str]]]]:
    """Pictures with their questions and answers, of a tar that `data.py` wrote."""
    with tarfile.open(tar) as file:
        for name in sorted(name for name in file.getnames() if name.endswith(".json")):
            chat: Any = json.load(file.extractfile(name))["messages"]  # type: ignore[arg-type]
            asked = [
                (next(part["text"] for part in question["content"] if part["type"] == "text"), answer["content"])
                for question, answer in zip(chat[::2], chat[1::2], strict=True)
            ]
            data: Any = file.extractfile(name.replace(".json", ".jpg"))
            yield Image.open(io.BytesIO(data.read())), asked


def write(data: Path, encoder: PageEncoder, out: Path) -> Iterator[Path]:
    """Reads the tars of a folder that have not been read, and yields each new file."""
    out.mkdir(parents=True, exist_ok=True)
    for tar in sorted(data.glob("*.tar"), key=lambda tar: tar.stem.rpartition("-")[::-1]):
        if not (file := out / f"{tar.stem}.jsonl").exists():
            task = tar.stem.rpartition("-")[0]
            pages = [read_page(task, picture, turns, encoder) for picture, turns in pictures_of(tar)]
            with replacing(file) as path:
                path.write_text("".join(json.dumps(asdict(one), default=_listed) + "\n" for one in pages))
            yield file


def _listed(values: np.ndarray) -> list[float]:
    return values.round(2).tolist()


def load(file: Path) -> Iterator[ReadPage]:
    """The pages of a file."""
    for line in file.read_text().splitlines():
        kept = json.loads(line)
        runs = [TextRun(run["text"], np.array(run["rows"]), np.array(run["columns"])) for run in kept["runs"]]
        yield ReadPage(kept["task"], tuple(kept["cells"]), runs, [tuple(turn) for turn in kept["turns"]])


class ReadPages:
    """Draws samples of a folder that `write` has filled; tasks by their numbers of pictures.

    Args:
        folder: Of read pages.
        tokenizer: Of the text model.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.encode, self.known = encoding(tokenizer), known_words(tokenizer.get_vocab())
        self.line_break = self.encode("\n")[0][0]
        pages = [page for file in sorted(folder.glob("*.jsonl")) for page in load(file)]
        unread = Counter(
            answer for page in pages for answer in {answer for _, answer, is_read in page.turns if not is_read}
        )
        self.turns = [
            (
                page,
                [(question, answer) for question, answer, is_read in page.turns if is_read or unread[answer] >= OFTEN],
            )
            for page in pages
        ]
        self.turns = [(page, turns) for page, turns in self.turns if turns]
        written = Counter(word for page in pages for word in {*WORD.findall(" ".join(run.text for run in page.runs))})
        self.kept = {word.lower() for word, count in written.items() if count > NAMED * len(pages)}
        questions = sum(len(turns) for _, turns in self.turns)
        said = Counter(word for _, turns in self.turns for question, _ in turns for word in WORD.findall(question))
        self.kept |= {word.lower() for word, count in said.items() if count > COMMON * questions}

    def sample(self, rng: Generator) -> Sample:
        """A question about a page of any task."""
        page, turns = self._drawn(rng)
        return self.asked(page, *turns[int(rng.integers(len(turns)))])

    def chat(self, rng: Generator, most: int = 3) -> Sample:
        """Up to so many questions about one page, one after the other."""
        page, turns = self._drawn(rng)
        chosen = [turns[int(at)] for at in rng.permutation(len(turns))[: int(rng.integers(1, most + 1))]]
        said = self.asked(page, *chosen[0])
        for turn in chosen[1:]:
            said = after(replace(self.asked(page, *turn), ids=said.ids), said, self.line_break)
        return said

    def _drawn(self, rng: Generator) -> tuple[ReadPage, list[tuple[str, str]]]:
        page, turns = self.turns[int(rng.integers(len(self.turns)))]
        return renamed(rng, page, turns, self.kept) if rng.random() < RENAMED else (page, turns)

    def asked(self, page: ReadPage, question: str, answer: str) -> Sample:
        """The sample of a question."""
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        prompt, said = (
            [token for token, _ in self.encode(text)] for text in (PROMPT.format(question=question), answer)
        )
        grid = page.cells[0] // BLOCK[0], page.cells[1] // BLOCK[1]
        texts = apart(page.runs)
        words = words_of_page(texts, grid, BLOCK, self.encode, end, self.known)
        # of an answer that is a text of its own, and the only one, it is known where it begins
        places = [spots[0][0] for text, spots in zip(texts, words.spots, strict=True) if text.text == answer]
        return Sample(words.ids, prompt, [*said, end], begins=places[0] if len(places) == 1 else -1)


def renamed(
    rng: Generator, page: ReadPage, turns: Sequence[tuple[str, str]], kept: Collection[str]
) -> tuple[ReadPage, list[tuple[str, str]]]:
    """The page with other words in place of its names, and questions and answers that go with them.

    So one page is many: layers learned by heart what is asked about it. kept: words in small letters that stay.
    """
    names = {word for run in page.runs for word in WORD.findall(run.text.lower())} - {*kept}
    drawn = {name: re.sub("[^a-z]", "", Words().word(rng).lower()) or name for name in sorted(names)}

    def other(word: str) -> str:
        new = drawn.get(word.lower(), word)
        return new.upper() if word.isupper() else new.capitalize() if word.istitle() else new

    def said_so(text: str) -> str:
        return WORD.sub(lambda found: other(found[0]), text)

    def other_run(run: TextRun) -> TextRun:
        parts = WORD.split(run.text)
        said, ends, own = [*map(other, parts)], np.cumsum([0, *map(len, parts)]), np.arange(len(run.text))
        spans = zip(ends, ends[1:], said, strict=False)
        at = np.concatenate([np.linspace(start, stop - 1, len(new)) for start, stop, new in spans if new])
        return TextRun("".join(said), np.interp(at, own, run.rows), np.interp(at, own, run.columns))

    return replace(page, runs=[other_run(run) for run in page.runs]), [
        (said_so(question), said_so(answer)) for question, answer in turns
    ]


def main(arguments: list[str]) -> int:
    """Reads tars."""
    parser = argparse.ArgumentParser(description="Reads the pictures of tars with a page encoder.")
    parser.add_argument("data", type=Path, help="folder of tars, by projects.casa_smol.data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, default=WEIGHTS, help="file of projects.casa_smol.weights")
    given = parser.parse_args(arguments)
    for file in write(given.data, page_encoder(given.encoder, token_size=(TOKEN, TOKEN)), given.out):
        print(file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
