"""What casa-smol says of pictures that were drawn beforehand and are kept beside this file: `make demo` shows it.

    python -m projects.casa_smol.show                      its answers, and demo/casa-smol.png
    python -m projects.casa_smol.show --draw               draws the pictures anew, by their seeds (browser, fonts)

None of it was trained on: fonts, words, layouts and styles of charts are held out.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

import casa
from casa.errors import UserError
from casa.models.loading import quietly
from projects.casa_smol.metrics import JUDGES, MEASURES
from projects.casa_smol.tasks import Turn, asked
from projects.casa_smol.tasks.films import FPS, film
from projects.pictures import HUE, INK, PAPER, QUIET, save_moving, watched

KEPT = Path(__file__).with_name("shown")
SEED = 24
# of each task: the number of the picture, and of the questions about it
CHOSEN = {"receipt": (6, (6, 0, 3)), "window": (8, (0, 4)), "chart": (4, (2, 1, 3)), "page": (8, (1, 0))}
FILM, SECONDS = (SEED, 4), 28.0
WIDTH, SIDE, LINE = 760, 340, 22  # px of the picture of all answers: its width, that of a picture in it, of a line


@dataclass(frozen=True)
class Shown:
    """A picture and what is asked about it."""

    task: str
    picture: Image.Image
    turns: tuple[Turn, ...]

    def is_right(self, said: str, turn: Turn) -> bool:
        """By the task's own measure."""
        return JUDGES[MEASURES.get(self.task, "exact")](said, turn.answers) == 1.0


def kept(folder: Path = KEPT) -> list[Shown]:
    """The pictures that were drawn."""
    told = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [
        Shown(one["task"], Image.open(folder / one["picture"]), tuple(Turn(q, tuple(a)) for q, a in one["turns"]))
        for one in told
    ]


def draw(folder: Path = KEPT) -> None:
    """Draws them: `CHOSEN` of the held-out pictures of `SEED`."""
    folder.mkdir(exist_ok=True)
    told = []
    for task, (number, questions) in CHOSEN.items():
        (one,) = asked(task, "held_out", SEED, 1, number)
        name = f"{task}.jpg"
        one.picture.save(folder / name, quality=88)
        turns = [(one.turns[place].question, one.turns[place].answers) for place in questions]
        told.append({"picture": name, "task": task, "seed": one.seed, "turns": turns})
    (folder / "questions.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def answers(eyes: Any, shown: Sequence[Shown]) -> list[list[str]]:
    """What a model says to each question about each picture. eyes: what `casa.load` gives."""
    return [eyes.ask(one.picture, [turn.question for turn in one.turns], max_new_tokens=48) for one in shown]


def lines(shown: Sequence[Shown], said: Sequence[Sequence[str]]) -> Iterator[str]:
    """Questions and answers as text, with the truth where they differ."""
    right = 0
    for one, answered in zip(shown, said, strict=True):
        yield f"A {one.task} that it has not seen:"
        for turn, text in zip(one.turns, answered, strict=True):
            right += (is_right := one.is_right(text, turn))
            yield f"  {turn.question}  {text or '(nothing)'}   ({'right' if is_right else f'wrong: {turn.answer}'})"
    yield f"{right} of {sum(len(one.turns) for one in shown)} right"


def sheet(shown: Sequence[Shown], said: Sequence[Sequence[str]]) -> Image.Image:
    """The pictures one below the other, questions and answers beside them; what is wrong is in grey, with the truth."""
    rows = []
    for one, answered in zip(shown, said, strict=True):
        picture = ImageOps.contain(one.picture.convert("RGB"), (SIDE, SIDE))
        row = Image.new("RGB", (WIDTH, max(picture.height, 3 * LINE * len(one.turns)) + 24), PAPER)
        row.paste(picture, (12, 12))
        pen = ImageDraw.Draw(row)
        for number, (turn, text) in enumerate(zip(one.turns, answered, strict=True)):
            top, is_right = 12 + 3 * LINE * number, one.is_right(text, turn)
            pen.text((SIDE + 36, top), turn.question[:52], INK, font_size=15)
            pen.text((SIDE + 36, top + LINE), (text or "(nothing)")[:46], HUE if is_right else QUIET, font_size=17)
            if not is_right:
                pen.text((SIDE + 36, top + 2 * LINE - 2), f"it is {turn.answer}"[:56], QUIET, font_size=13)
        rows.append(row)
    whole = Image.new("RGB", (WIDTH, sum(row.height for row in rows)), PAPER)
    for number, row in enumerate(rows):
        whole.paste(row, (0, sum(one.height for one in rows[:number])))
    return whole


def pictures(eyes: Any, folder: Path, shown: Sequence[Shown] | None = None) -> Iterator[Path]:
    """Draws what the docs show: answers on the kept pictures, and a screen captioned live. Yields the files."""
    shown = kept() if shown is None else shown
    folder.mkdir(parents=True, exist_ok=True)
    yield _saved(sheet(shown, answers(eyes, shown)), folder / "casa-smol.png")
    screen = film(FILM, "held_out", SECONDS, "terminal")
    frames = ((frame, number / FPS) for number, frame in enumerate(screen.frames))
    save_moving(watched("casa-smol", eyes, frames, box=(480, 336), panel=420), folder / "casa-smol.webp", FPS)
    yield folder / "casa-smol.webp"


def _saved(picture: Image.Image, path: Path) -> Path:
    picture.quantize(192).save(path, optimize=True)
    return path


def main(arguments: list[str]) -> int:
    """Shows what is at hand; what is not is said in a sentence, and is no failure: the demo has shown casa-tiny."""
    parser = argparse.ArgumentParser(description="Shows what casa-smol answers.")
    parser.add_argument("model", nargs="?", default="casa-smol")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--draw", action="store_true", help="draw the pictures anew")
    given = parser.parse_args(arguments)
    if given.draw:
        draw()
        return 0
    try:
        with quietly(reports=False):
            eyes = casa.load(given.model)
    except UserError as error:
        print(f"\ncasa-smol is not shown: {error}")
        return 0
    shown = kept()
    said = answers(eyes, shown)
    print("\ncasa-smol, a language model that sees:", *lines(shown, said), sep="\n")
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"  {_saved(sheet(shown, said), given.out / 'casa-smol.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
