"""Documents drawn by a browser: many at once, in faces of a split.

A sheet is one tall page with documents side by side; each is cut out of one screenshot.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.random import Generator
from PIL import Image

from projects.casa_smol.fonts import Face, kins
from projects.casa_smol.words import pick

CHROMIUM = "/usr/bin/chromium"
GAP, SHEET_WIDTH = 8, 1900
MIME = {".ttf": "font/ttf", ".otf": "font/otf", ".woff": "font/woff"}


@dataclass(frozen=True)
class Html:
    """One document. css: rules below its own box, "&" being the box itself. faces: by the names the css calls them."""

    body: str
    css: str
    width: int
    faces: tuple[tuple[str, Face], ...] = ()


def faces_for(rng: Generator, split: str, names: Sequence[str] = ("text",)) -> tuple[tuple[str, Face], ...]:
    """A face of the split for each name."""
    return tuple((name, pick(rng, pick(rng, kins(split)))) for name in names)


def safe(text: str) -> str:
    """Text as HTML has it."""
    return escape(text, quote=False)


class Browser:
    """Chromium, started once for many sheets: `with Browser() as browser: pictures = browser.draw(documents)`."""

    def __enter__(self) -> "Browser":
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        arguments = ["--no-sandbox", "--disable-gpu", "--font-render-hinting=slight"]
        self._browser = self._playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        self._page = self._browser.new_page(viewport={"width": SHEET_WIDTH, "height": 1000})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._browser.close()
        self._playwright.stop()

    def draw(self, documents: Sequence[Html]) -> list[Image.Image]:
        """A picture of each document, at its own width and the height it takes."""
        self._page.set_content(_sheet(documents), wait_until="load")
        self._page.evaluate("document.fonts.ready")
        boxes: list[Any] = self._page.evaluate(
            "[...document.querySelectorAll('.doc')].map(d => d.getBoundingClientRect())"
            ".map(b => [b.x, b.y, b.right, b.bottom])"
        )
        whole = Image.open(BytesIO(self._page.screenshot(full_page=True, type="png"))).convert("RGB")
        return [whole.crop(tuple(round(side) for side in box)) for box in boxes]  # type: ignore[arg-type]


def _sheet(documents: Sequence[Html]) -> str:
    fonts, rules, bodies = {}, [], []
    for number, document in enumerate(documents):
        css = document.css
        for name, face in document.faces:
            fonts[face.path] = key = f"f{abs(hash(face.path)) % 10**12}"
            css = css.replace(f"face({name})", f"'{key}', sans-serif")
        rules.append(f".d{number} {{ width: {document.width}px; {css} }}")
        bodies.append(f'<div class="doc d{number}">{document.body}</div>')
    faces = "".join(f"@font-face {{ font-family: '{key}'; src: url({_data(path)}); }}" for path, key in fonts.items())
    common = (
        f"body {{ margin: 0; display: flex; flex-wrap: wrap; gap: {GAP}px; align-items: flex-start; background: #888 }}"
    )
    # wider than asked for rather than cut off
    boxes = ".doc { box-sizing: border-box; min-width: min-content } .doc * { box-sizing: border-box }"
    # without a doctype tables would not inherit ink and size
    return f"<!DOCTYPE html><style>{faces}{common}{boxes}{''.join(rules)}</style>{''.join(bodies)}"


@lru_cache(maxsize=256)
def _data(path: str) -> str:
    return f"data:{MIME[Path(path).suffix]};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
