"""The page of an inspection in a real browser, from its file: tokens, layers, heads and maps can be chosen.

Skipped where there is no Chromium, unless CI is set in the environment. CASA_SCREENSHOT=path keeps a picture of the
page.
"""

import os
import shutil

import pytest
from PIL import Image

from casa.analysis.inspect_page import write_inspection
from casa.analysis.inspection import inspect_answer
from casa.media import open_picture
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.testing import PATIENCE, noise_frames, tiny_casa, tiny_processor

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="there is no Chromium here"),
]
PIXELS = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Opens a file, in which no error and no request may show."""
    contexts, complaints, elsewhere = [], [], []

    def go(path, scheme="light"):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: elsewhere.append(r.url) if r.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in elsewhere if not url.startswith("data:image/")] == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    model = CasaForConditionalGeneration.from_pretrained("casa-tiny").eval()
    processor = CasaProcessor.from_pretrained("casa-tiny")
    found = inspect_answer(model, processor, [open_picture("docs/images/page.png")], "Read line 1.")
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_inspection(path, found, model="casa-tiny")
    return path, found


def overlay(page, number=0):
    return page.locator("figure canvas").nth(number).evaluate(PIXELS)


def test_a_click_on_a_token_changes_the_overlay(opened, report):
    path, found = report
    page = opened(path)
    first = overlay(page)
    page.click(".token.answered >> nth=1")
    second = overlay(page)
    assert first != second
    assert "9" in page.inner_text("#heading")
    if "CASA_SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["CASA_SCREENSHOT"], full_page=True)
    # warmest where the numbers are largest: the digit's own cell
    place = next(n for n, token in enumerate(found.tokens) if token.answered)
    row = found.shares.tokens.index(place)  # the second token is written where the first stands
    weights = found.shares.image_weights[:, row].mean(0)
    assert max(range(64), key=lambda cell: second[4 * cell + 3]) == int(weights.argmax())
    page.keyboard.press("ArrowLeft")
    assert overlay(page) == first


def test_layers_heads_and_maps_are_chosen(opened, report):
    path = report[0]
    page = opened(path, "dark")
    seen = {tuple(overlay(page))}
    page.click(".layer >> nth=2")
    assert page.input_value("#layer") == "1"
    seen.add(tuple(overlay(page)))
    page.click("#heads button >> nth=11")
    assert (page.input_value("#layer"), page.input_value("#head")) == ("2", "3")
    seen.add(tuple(overlay(page)))
    for view in ("relative", "tokens", "layers"):
        page.select_option("#view", view)
        seen.add(tuple(overlay(page)))
    assert len(seen) == 6
    page.select_option("#view", "none")
    assert set(overlay(page)) == {0}
    page.select_option("#view", "raw")
    page.select_option("#when", "reads")
    page.hover("figure")
    assert "norm" in page.inner_text("#spot")
    # each layer's bar is full: shares sum to one
    widths = page.locator(".layer >> nth=1").locator("i").evaluate_all("all => all.map(i => parseFloat(i.style.width))")
    assert sum(widths) == pytest.approx(100, abs=0.01)
    colours = {page.evaluate("getComputedStyle(document.body).backgroundColor") for page in (page, opened(path))}
    assert len(colours) == 2


@pytest.mark.parametrize("method", ["casa", "insertion", "cross_attention"])
def test_several_pictures_have_a_row_each(opened, tmp_path, method):
    model = tiny_casa(method=method)
    frames = [Image.fromarray(frame) for frame in noise_frames(0, 3)]
    found = inspect_answer(
        model, tiny_processor(), frames, "<img src=x onerror=alert(1)>?", labels=("0 s", "1 s", "2 s"), max_new_tokens=4
    )
    write_inspection(tmp_path / "film.html", found)
    page = opened(tmp_path / "film.html")
    assert page.locator(".frame").count() == 3
    assert page.locator(".frame b").all_inner_texts() == ["0 s", "1 s", "2 s"]
    assert sum(max(overlay(page, number)) for number in range(3)) > 0
    page.select_option("#view", "layers")
    page.click("#grid button >> nth=0")
    # a question cannot write into the page
    assert page.locator("img").count() == 3
