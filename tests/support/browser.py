"""The page in a real browser, read only by what waits, and what axe finds on it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.server import ADMIN
from support.waiting import PATIENCE, eventually

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here (Debian's package chromium)"
)
# What of a locator reads the page as it is at that moment, whatever is on its way.
AT_ONCE = (
    *("all", "all_inner_texts", "all_text_contents", "count", "get_attribute", "inner_html"),
    *("inner_text", "input_value", "is_checked", "is_disabled", "is_editable", "is_enabled"),
    *("is_hidden", "is_visible", "text_content"),
)
SCHEMES = ("light", "dark")


@contextmanager
def launched() -> Iterator[Any]:
    """Start a browser whose locators refuse to read at once: a test waits for what it reads."""
    from playwright.sync_api import Locator, expect, sync_playwright

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise TypeError(f"{self}: read it by expect(), texts() or eventually(), which wait")

    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as driver, pytest.MonkeyPatch.context() as patch:
        for name in AT_ONCE:
            patch.setattr(Locator, name, refuse)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, scheme: str, *, allowed: str = "") -> Iterator[Any]:
    """Open the page, and see at the end that it raised no error and loaded nothing from elsewhere.

    allowed: what a line of the console may have in it.
    """
    context = browser.new_context(color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    faults: list[str] = []

    def note(line: Any) -> None:
        if line.type == "error" and not (allowed and allowed in line.text):
            faults.append(line.text)

    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", note)
    page.on("request", lambda asked: None if url in asked.url else faults.append(asked.url))
    page.goto(url)
    yield page
    assert faults == []
    context.close()


def expect(shown: Any) -> Any:
    """Return playwright's assertions of a locator or a page: each waits until it holds."""
    from playwright.sync_api import expect

    return expect(shown)


def texts(locator: Any, *patterns: str) -> list[str]:
    """Return what elements show once they are as many as the patterns and each matches its own."""

    def match(seen: list[str]) -> bool:
        return len(seen) == len(patterns) and all(map(re.search, patterns, seen))

    return eventually(lambda: locator.evaluate_all("all => all.map(e => e.innerText)"), match)


def give_key(page: Any) -> None:
    """Give the admin key that the page asks for."""
    page.get_by_label("Admin key", exact=True).fill(ADMIN)
    page.keyboard.press("Enter")


def fits(page: Any) -> None:
    """See that the page is no wider than the screen, and that axe finds nothing on it."""
    narrow = "width => document.documentElement.scrollWidth <= width"
    page.wait_for_function(narrow, arg=page.viewport_size["width"])
    assert serious(page) == []


def serious(page: Any) -> list[Any]:
    """Return what axe finds that keeps somebody from using the page, be it light or dark."""
    from axe_playwright_python.sync_playwright import Axe

    def violations(**options: Any) -> list[Any]:
        return (
            Axe()
            .run(page, options={"resultTypes": ["violations"], **options})
            .response["violations"]
        )

    dark = "matchMedia('(prefers-color-scheme: dark)').matches"
    now, other = SCHEMES[:: -1 if page.evaluate(dark) else 1]
    seen = violations()
    page.emulate_media(color_scheme=other)
    seen += violations(runOnly=["color-contrast"])
    page.emulate_media(color_scheme=now)
    return [
        (each["id"], each["impact"], [node["target"] for node in each["nodes"]])
        for each in seen
        if each["impact"] in ("serious", "critical", "moderate")
    ]
