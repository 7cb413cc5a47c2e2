"""Contact sheets: what the tasks look like, with their questions and answers, to be looked at.

python -m projects.casa_smol.sheet sheets/ receipt chart --split held_out --count 9
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from projects.casa_smol.fonts import kins
from projects.casa_smol.tasks import SPLITS, TASKS, Asked, asked

CELL, TEXT, EDGE = 420, 130, 8


def sheet(shown: Sequence[Asked], across: int = 3) -> Image.Image:
    """Pictures in rows, each above its first questions."""
    rows = -(-len(shown) // across)
    whole = Image.new("RGB", (across * CELL, rows * (CELL + TEXT)), (90, 90, 90))
    pen, font = ImageDraw.Draw(whole), _font()
    for number, one in enumerate(shown):
        x, y = number % across * CELL, number // across * (CELL + TEXT)
        picture = one.picture.copy()
        picture.thumbnail((CELL - EDGE, CELL - EDGE))
        whole.paste(picture, (x + EDGE // 2, y + EDGE // 2))
        said = "\n".join(f"{turn.question}  {' | '.join(turn.answers)}"[:74] for turn in one.turns[:7])
        pen.multiline_text((x + EDGE, y + CELL), said, font=font, fill="white", spacing=3)
    return whole


def _font() -> ImageFont.FreeTypeFont:
    return kins("train")[0][0].at(12)


def main(arguments: list[str]) -> int:
    """Draws a sheet of each task named."""
    parser = argparse.ArgumentParser(description="Draws contact sheets of tasks.")
    parser.add_argument("out", type=Path)
    parser.add_argument("tasks", nargs="*", default=TASKS, help=f"of {', '.join(TASKS)}; all if left out")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for task in given.tasks:
        began = time.perf_counter()
        shown = list(asked(task, given.split, given.seed, given.count))
        print(f"{task}: {(time.perf_counter() - began) / len(shown):.3f} s a picture")
        sheet(shown).save(given.out / f"{task}-{given.split}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
