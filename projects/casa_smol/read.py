"""Reading with the page encoder alone: what the language model will be told, as plain text.

python -m projects.casa_smol.read page.png                    prints the texts of a picture
python -m projects.casa_smol.read --score line page           error rates on held-out pictures of these tasks
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from casa.vision.page_encoder import PageEncoder
from casa.vision.page_reading import TextRun
from projects.casa_smol.metrics import distance
from projects.casa_smol.tasks import asked
from projects.casa_smol.weights import WEIGHTS, page_encoder


@torch.no_grad()
def cells_of(picture: Image.Image, encoder: PageEncoder) -> Tensor:
    """(1, d, R, C) float32: what an encoder sees in a picture, padded to whole image tokens."""
    values = np.asarray(picture.convert("RGB"))
    lacking = [-side % step for side, step in zip(values.shape, encoder.config.token_size, strict=False)]
    values = np.pad(values, ((0, lacking[0]), (0, lacking[1]), (0, 0)), mode="edge")
    mean, std = (torch.tensor(list(part)) for part in (encoder.config.image_mean, encoder.config.image_std))
    # a batch of one whose stride is not that of a whole picture takes a convolution that is six times as slow
    pixels = ((torch.from_numpy(values)[None] / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        return encoder(pixels.contiguous(memory_format=torch.channels_last)).float()


def read(picture: Image.Image, encoder: PageEncoder) -> list[TextRun]:
    """The texts of a picture, from above."""
    return encoder.runs(cells_of(picture, encoder))[0]


def score(task: str, count: int, seed: int, encoder: PageEncoder) -> dict[str, float]:
    """Character error rate and lines right. line: the whole picture; page: the line that a question asks for."""
    errors, letters, right, total = 0, 0, 0, 0
    for one in asked(task, "held_out", seed, count):
        said = [run.text for run in read(one.picture, encoder)]
        if task == "line":
            pairs = [(one.turns[0].answers[0], " ".join(" ".join(said).split()))]
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
    parser.add_argument("--encoder", type=Path, default=WEIGHTS, help="file of projects.casa_smol.weights")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args(arguments)
    encoder = page_encoder(given.encoder)
    for name in given.what:
        if given.score:
            print(name, json.dumps(score(name, given.count, given.seed, encoder)))
        else:
            print("\n".join(run.text for run in read(Image.open(Path(name)), encoder)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
