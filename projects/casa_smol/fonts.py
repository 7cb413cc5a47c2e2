"""Faces to draw text with, split by family into those that are trained on and those that are held out.

    python -m projects.casa_smol.fonts               writes fonts.json anew from what is fetched

fonts.json is the list that counts: every family with its split, package and licence. A family is held out by a hash of
the first word of its name, so that "IBM Plex Sans" and "IBM Plex Mono" fall together; known relatives share a word.
Without packages (in tests) the faces that matplotlib carries stand in.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from projects.casa_smol.fetch import FONT_FILES, folder_of, wanted

LISTED = Path(__file__).with_name("fonts.json")
# what the encoder tells apart: ASCII and a few signs of prices, lists and measures
CHARACTERS = "".join(map(chr, range(32, 127))) + "€£°©•–×"
NEEDED = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-()/&%$'\"+#@")
HELD_OUT_PERCENT = 15
MOST_FACES = 8  # of a family with dozens of weights
# one design under several names: the first word of each (or its beginning), and the word they are split by
RELATIVES = {
    "arimo": "postscript", "tinos": "postscript", "cousine": "postscript", "nimbus": "postscript", "tex": "postscript",
    "free": "postscript", "liberation": "postscript", "urw": "postscript", "induni": "postscript",
    "c059": "postscript", "p052": "postscript", "z003": "postscript", "hack": "dejavu", "verana": "dejavu",
    "bitstream": "dejavu", "carlito": "lato", "droid": "open", "noto": "open", "firago": "fira", "latin": "cmu",
}  # fmt: skip
# symbols at the places of letters, keys around letters, letters without case that the check below does not see
SKIPPED = ("D050000L", "Standard Symbols", "Linux Biolinum Keyboard", "Tiresias Keyfont", "Humor Sans", "Math", "Caps")


@dataclass(frozen=True)
class Face:
    """One font file. family: its name in the file. missing: characters of `CHARACTERS` that it does not draw."""

    path: str
    family: str
    missing: frozenset[str] = frozenset()

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The face in a size, in pixels an em."""
        return _sized(self.path, size)


@lru_cache(maxsize=512)
def _sized(path: str, size: int) -> ImageFont.FreeTypeFont:
    # the plain layout has no ligatures: each character keeps a place of its own
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def kin_of(family: str) -> str:
    """The word that a family is split by."""
    first = family.lower().replace("-", " ").split()[0]
    return next((word for start, word in RELATIVES.items() if first.startswith(start)), first)


def split_of(family: str) -> str:
    """ "train" or "held_out": by a hash of the family's kin."""
    number = int.from_bytes(hashlib.sha256(f"casa-smol {kin_of(family)}".encode()).digest()[:4], "big")
    return "held_out" if number % 100 < HELD_OUT_PERCENT else "train"


@lru_cache(maxsize=2)
def kins(split: str) -> list[list[Face]]:
    """The faces of a split that are on this machine, those of relatives together, in a fixed order.

    Where no package is fetched, matplotlib's own: DejaVu's serif and mono faces to train, its sans faces held out.
    """
    found: dict[str, list[Face]] = {}
    for entry in json.loads(LISTED.read_text()):
        folder = folder_of(entry["kind"], entry["package"])
        if entry["split"] == split and folder.exists():
            faces = [Face(str(folder / name), entry["family"], frozenset(entry["missing"])) for name in entry["files"]]
            found.setdefault(kin_of(entry["family"]), []).extend(faces)
    return list(found.values()) or _carried(split)


def _carried(split: str) -> list[list[Face]]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ["DejaVuSerif", "DejaVuSansMono"] if split == "train" else ["DejaVuSans"]
    return [[Face(str(folder / f"{name}{style}.ttf"), name) for style in ("", "-Bold")] for name in names]


def listed() -> list[dict]:
    """Every usable family of the fetched packages, as fonts.json keeps them."""
    found: dict[str, dict] = {}
    packages = [("debian", name) for name in wanted("debian")] + [("npm", name) for name in wanted("fontsource")]
    for kind, package in packages:
        folder = folder_of(kind, package)
        for path in sorted(folder.glob("*")) if folder.exists() else []:
            if path.suffix not in FONT_FILES or (looked := _look(path)) is None:
                continue
            family, missing = looked
            entry = found.setdefault(family, {
                "family": family, "split": split_of(family), "kind": kind, "package": package,
                "licence": _licence(folder), "files": [], "missing": missing,
            })  # fmt: skip
            if (entry["kind"], entry["package"]) == (kind, package):
                entry["files"].append(path.name)
                entry["missing"] = "".join(sorted({*entry["missing"], *missing}))
    for entry in found.values():
        step = -(-len(entry["files"]) // MOST_FACES)
        entry["files"] = entry["files"][::step]
    return [found[family] for family in sorted(found)]


def _look(path: Path) -> tuple[str, str] | None:
    """Family and missing characters of a font file; None if pages cannot be set in it."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, lazy=True) as font:
            drawn = {chr(code) for code in font.getBestCmap() or ()}
            names = font["name"]
            family = names.getDebugName(16) or names.getDebugName(1)  # type: ignore[attr-defined]
    except (TTLibError, KeyError, ValueError, AssertionError):
        return None
    if not family or not drawn >= NEEDED or _one_case(path):
        return None
    if any(word in family for word in SKIPPED):
        return None
    if family.startswith("Noto") and family not in {"Noto Sans", "Noto Serif", "Noto Mono", "Noto Sans Mono"}:
        return None  # one Latin design in many scripts' files
    return family, "".join(character for character in CHARACTERS if character not in drawn)


def _one_case(path: Path) -> bool:
    """Whether small letters are drawn as capitals, of whatever size: their case could not be read."""
    font = _sized(str(path), 48)
    return sum(_likeness(font, letter) > 0.85 for letter in "aegr") >= 3


def _likeness(font: ImageFont.FreeTypeFont, letter: str) -> float:
    pair = []
    for character in (letter, letter.upper()):
        box = font.getbbox(character)
        image = Image.new("L", (int(box[2]) + 2, int(box[3]) + 2))
        ImageDraw.Draw(image).text((0, 0), character, 255, font=font)
        pair.append(np.asarray(image.crop(image.getbbox() or box).resize((24, 24)), dtype=float).ravel())
    return float(np.corrcoef(pair)[0, 1])


def _licence(folder: Path) -> str:
    if (told := folder / "metadata.json").exists():
        return json.loads(told.read_text())["license"]["type"]
    text = (folder / "copyright").read_text(errors="replace") if (folder / "copyright").exists() else ""
    lines = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("License:")]
    return ", ".join(_distinct(lines)[:3]) or "as in the package's copyright file"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def main() -> int:
    """Writes fonts.json."""
    entries = listed()
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    LISTED.write_text(f"[\n{lines}\n]\n")
    held_out = sum(entry["split"] == "held_out" for entry in entries)
    print(f"{len(entries)} families, {held_out} held out, {sum(len(e['files']) for e in entries)} faces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
