"""Reading with the page encoder alone: what the language model will be told, as plain text.

    python -m projects.casa_smol.read page.png                    prints the lines of a picture
    python -m projects.casa_smol.read --score line page           error rates on held-out pictures of these tasks

A character is where the map of middles has a peak; its class is that of the peak's cell. Characters whose rows touch
make lines; a space is one that was read or a gap wider than usual.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from casa.vision.page_encoder import CELL
from projects.casa_smol.encoder import Learner
from projects.casa_smol.fonts import CHARACTERS
from projects.casa_smol.metrics import distance
from projects.casa_smol.tasks import asked
from projects.casa_smol.weights import learner

LEAST = 0.5  # of the probability that a character has its middle in a cell
SPACE = 1 + CHARACTERS.index(" ")
WIDE_GAP = 2.1  # of a line's usual step between characters


@dataclass(frozen=True)
class Line:
    """A line of writing, its cells' row, first and last column."""

    text: str
    row: float
    left: int
    right: int


@torch.no_grad()
def read(picture: Image.Image, encoder: Learner) -> list[Line]:
    """The lines of a picture, from above."""
    values = np.asarray(picture.convert("RGB"))
    lacking = [-side % step for side, step in zip(values.shape, CELL, strict=False)]
    values = np.pad(values, ((0, lacking[0]), (0, lacking[1]), (0, 0)), mode="edge")
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(torch.from_numpy(values)[None])
    middles = found["middles"][0, 0].float().sigmoid()
    classes = found["classes"][0].float().softmax(0)
    # a peak among its neighbours: cells beside it, and those above and below it
    around = torch.nn.functional.max_pool2d(middles[None, None], (3, 3), stride=1, padding=1)[0, 0]
    peaks = torch.nonzero((middles >= LEAST) & (middles == around) & (classes[0] < 0.5)).tolist()
    best = classes[1:].argmax(0)
    spots = [(row, column, CHARACTERS[int(best[row, column])]) for row, column in peaks]
    return _lines(spots)


def _lines(spots: list[tuple[int, int, str]]) -> list[Line]:
    """Characters (row, column, character) in lines: each joins the line whose last character is near."""
    lines: list[list[tuple[int, int, str]]] = []
    for spot in sorted(spots, key=lambda one: one[1]):
        near = [line for line in lines if abs(line[-1][0] - spot[0]) <= 1 and spot[1] - line[-1][1] <= 24]
        if near:
            min(near, key=lambda line: (abs(line[-1][0] - spot[0]), spot[1] - line[-1][1])).append(spot)
        else:
            lines.append([spot])
    made = [_line(line) for line in lines]
    return sorted((line for line in made if line.text), key=lambda line: (line.row, line.left))


def _line(line: list[tuple[int, int, str]]) -> Line:
    columns = np.array([column for _, column, _ in line])
    steps = np.diff(columns)
    usual = float(np.median(steps)) if len(steps) else 1.0
    text = line[0][2]
    for step, (_, _, character) in zip(steps, line[1:], strict=True):
        text += (" " if step > WIDE_GAP * usual + 1 else "") + character
    row = float(np.mean([row for row, _, _ in line]))
    return Line(" ".join(text.split()), row, int(columns[0]), int(columns[-1]))


def score(task: str, count: int, seed: int, encoder: Learner) -> dict[str, float]:
    """Character error rate and lines right. line: the whole picture; page: the line that a question asks for."""
    errors, letters, right, total = 0, 0, 0, 0
    for one in asked(task, "held_out", seed, count):
        said = [line.text for line in read(one.picture, encoder)]
        if task == "line":
            pairs = [(one.turns[0].answers[0], " ".join(said))]
        else:
            reading = [
                turn.answers[0] for turn in one.turns if turn.question.lower().startswith(("read", "what does the"))
            ]
            pairs = [(wanted, min(said, key=lambda text: distance(text, wanted), default="")) for wanted in reading]
        for wanted, text in pairs:
            errors += distance(text, wanted)
            letters += len(wanted)
            right += text == wanted
            total += 1
    return {"error_rate": round(errors / letters, 4), "right": round(right / total, 4), "lines": total}


def main(arguments: list[str]) -> int:
    """Reads pictures, or measures reading."""
    parser = argparse.ArgumentParser(description="Reads with the page encoder alone.")
    parser.add_argument("what", nargs="+", help="pictures; with --score, of the tasks: line, page")
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args(arguments)
    encoder = learner()
    for name in given.what:
        if given.score:
            print(name, json.dumps(score(name, given.count, given.seed, encoder)))
        else:
            print("\n".join(line.text for line in read(Image.open(Path(name)), encoder)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
