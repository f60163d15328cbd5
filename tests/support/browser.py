"""The page in a real browser, and what axe finds on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here (Debian's package chromium)"
)


@contextmanager
def launched() -> Iterator[Any]:
    """Start a browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
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
    page.set_default_timeout(20_000)
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


def serious(page: Any) -> list[Any]:
    """Return what axe finds that keeps somebody from using the page."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [
        (each["id"], each["impact"], [node["target"] for node in each["nodes"]])
        for each in violations
        if each["impact"] in ("serious", "critical", "moderate")
    ]
