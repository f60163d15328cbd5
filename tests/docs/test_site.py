"""The site in a browser: it loads nothing from elsewhere, finds what is searched for, and fits."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from playwright.sync_api import expect

from support.browser import launched, needs_chromium, opened

pytestmark = [pytest.mark.slow, needs_chromium]
ROOT = Path(__file__).parents[2]
# What is typed, and the pages of which one is the first that is shown.
SEARCHES = {
    "disk full": {"how-to/troubleshooting/"},
    "out of memory": {"how-to/troubleshooting/", "how-to/little-memory/"},
    "rank": {"how-to/rank-and-rate/", "choosing/"},
    "GGUF": {"tutorials/gguf-laptop/", "formats/"},
}
WIDTHS = {"desktop": 1280, "phone": 390}
LOOKED_AT = ("", "explanation/lora/", "explanation/family/", "reference/commands/tune/", "formats/")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[str]:
    """The address of the site, built strictly."""
    place = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(place)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    with launched() as running:
        yield running


@pytest.mark.parametrize("words", SEARCHES)
def test_a_search_finds_it_on_the_first_try(words, site, browser):
    with opened(browser, site, "light") as page:
        page.locator("input[name=query]").fill(words)
        first = page.locator(".md-search-result__item a").first
        places = "|".join(SEARCHES[words])
        expect(first).to_have_attribute("href", re.compile(rf"/(?:{places})(?:[?#].*)?$"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_the_screen(scheme, site, browser):
    with opened(browser, site, scheme) as page:
        for width in WIDTHS.values():
            page.set_viewport_size({"width": width, "height": 900})
            for address in LOOKED_AT:
                page.goto(site + address)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                background = page.evaluate(
                    "getComputedStyle(document.body).getPropertyValue('--md-default-bg-color')"
                )
                assert background


@pytest.mark.parametrize(("scheme", "frozen"), [("light", "#9db4c8"), ("dark", "#4d6d8a")])
def test_figures_have_the_colours_of_the_page(scheme, frozen, site, browser):
    with opened(browser, site, scheme) as page:
        page.goto(site + "explanation/lora/")
        page.wait_for_function("() => document.querySelector('article img').complete")
        pixel = page.evaluate(
            """() => {
                const canvas = document.createElement('canvas');
                [canvas.width, canvas.height] = [720, 400];
                const drawing = canvas.getContext('2d');
                drawing.drawImage(document.querySelector('article img'), 0, 0, 720, 400);
                return [...drawing.getImageData(220, 60, 1, 1).data];
            }"""  # a point of the box of W
        )
    assert bytes(pixel[:3]).hex() == frozen.removeprefix("#")
