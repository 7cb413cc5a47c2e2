"""The docs' site: built with warnings as errors; in a browser no page asks another host, complains, or is too wide.

CASA_SCREENSHOTS=folder keeps a picture of each page, light and dark.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from casa.testing import PATIENCE

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NARROW, WIDE = {"width": 390, "height": 800}, {"width": 1280, "height": 900}
pytestmark = pytest.mark.slow
in_a_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="there is no Chromium here"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(PATIENCE)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_every_public_room_is_in_the_reference(site):
    there = "".join(path.read_text(encoding="utf-8") for path in (site / "api").rglob("index.html"))
    for name in (
        "CasaPipeline.ask",
        "WindowLayout.mask",
        "FusionConfig.parallel",
        "StreamingSession.step",
        "open_recipe",
    ):
        assert re.search(rf'id="casa\.[\w.]*{re.escape(name)}"', there), name


@pytest.mark.parametrize("scheme", [pytest.param(scheme, marks=in_a_browser) for scheme in ("light", "dark")])
def test_no_page_asks_another_host_or_complains(browser, address, site, scheme):
    names = sorted(str(path.parent.relative_to(site)) for path in site.rglob("index.html"))
    assert len(names) > 25
    context = browser.new_context(viewport=WIDE, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    for name in names:
        page.goto(f"{address}/{name}/")
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)"), name
        for size in (NARROW, WIDE):
            page.set_viewport_size(size)
            # what slides out of sight takes its time
            page.wait_for_function(f"document.documentElement.scrollWidth <= {size['width']}")
        if folder := os.environ.get("CASA_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{name.replace('/', '-')}-{scheme}.png", full_page=True)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, re.findall(r"\d+", colour)[:3])) > 200) == (scheme == "light")
    context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert any(url.endswith("site.css") for url in asked), "requests are seen"


@pytest.mark.parametrize("word", [pytest.param("image_cache", marks=in_a_browser)])
def test_search_finds_a_setting(browser, address, word):
    page = browser.new_context(viewport=WIDE).new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(f"{address}/")
    page.click("[data-md-component=search-query]")
    page.keyboard.type(word)
    page.wait_for_selector(".md-search-result__item a")
    assert any(
        "library" in (link.get_attribute("href") or "") for link in page.query_selector_all(".md-search-result__item a")
    )
