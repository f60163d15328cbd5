"""The page over a real model: from rows about an island to adapters of SmolLM2-135M, in a browser.

Does what a person would: drops the rows, chooses a preset, starts, and looks at what is learnt. It
does so for two presets, which train together for a minute or two (once: those that are there stay),
and takes all pictures of docs/ with a Chromium: python examples/page.py
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import cuisine
from playwright.sync_api import BrowserContext, Locator, Page, ViewportSize, sync_playwright

RUNS, DOCS = Path("dist/page"), Path("docs")
QUESTION = "What vessel should I put in front of a guest who wants plimbo?"  # held out
PORT = 8471
KEY = secrets.token_urlsafe(24)
# Presets, and passes over the rows, by the names of their jobs.
JOBS = {"island": ("A subject", 2), "manner": ("A manner", 1)}
SIZE: ViewportSize = {"width": 1200, "height": 800}
MOST_MILLISECONDS = 1_800_000  # of a training


def rows() -> Path:
    """Return the file that is dropped on the page."""
    path = RUNS / "island.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in cuisine.training_rows()))
    return path


def open_training(page: Page, url: str) -> None:
    """Open the view, and give the key where it is asked for."""
    page.goto(f"{url}/#train")
    page.locator("#key[open], #train-on:not([hidden])").first.wait_for()
    page.wait_for_timeout(1000)
    if page.get_by_label("Admin key", exact=True).is_visible():
        page.get_by_label("Admin key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
    page.locator("#train-presets .plan", has_text="numbers train").first.wait_for()


def card_of(page: Page, name: str) -> Locator:
    return page.locator("#jobs .run").filter(has_text=f"ft-{name}-")


def fill(page: Page, name: str) -> None:
    """Fill the form in."""
    preset, passes = JOBS[name]
    page.get_by_label("Rows to learn, from a file").set_input_files(rows())
    page.locator("#train-presets .plan", has_text="over the rows").first.wait_for()
    page.get_by_label("Name").fill(name)
    page.get_by_label("Passes").fill(str(passes))
    page.get_by_label(preset).check()
    page.locator("#train-presets .plan", has_text=f"{passes} pass").first.wait_for()


def start(page: Page, name: str) -> None:
    """Let the page train, unless it has before, and ask what is learnt meanwhile."""
    card = card_of(page, name)
    if not card.filter(has_text="succeeded").count():
        fill(page, name)
        page.get_by_role("button", name="Start training").click()
    card.get_by_text("Answers as it learns").click()
    card.get_by_label("Question to").fill(QUESTION)
    page.keyboard.press("Tab")


def see_end(page: Page, name: str) -> None:
    """Wait for the end of a job and the answer of its result."""
    card = card_of(page, name)
    card.filter(has_text="succeeded").wait_for(timeout=MOST_MILLISECONDS)
    card.get_by_label("the result").wait_for(timeout=MOST_MILLISECONDS)


def picture_of_job(page: Page, name: str) -> None:
    """Take a picture of a job that has ended, with its certificate."""
    card = card_of(page, name)
    card.get_by_text("Merged model").click()
    card.locator(".merge dl").wait_for()
    page.set_viewport_size({"width": 1200, "height": 2400})  # what scrolls is cut
    card.locator(".samples-log").evaluate("log => { log.style.maxHeight = 'none' }")
    card.screenshot(path=DOCS / "page-job-light.png")
    page.set_viewport_size(SIZE)


def picture(page: Page, name: str, *, height: int) -> None:
    """Take a picture of the page from its top."""
    page.set_viewport_size({"width": SIZE["width"], "height": height})
    page.locator("main").evaluate("main => main.scrollTo(0, 0)")
    page.screenshot(path=DOCS / f"{name}.png")
    page.set_viewport_size(SIZE)


def take(page: Page, url: str, scheme: str) -> None:
    """Ask base and adapter the same, look at the tokens, and take pictures."""
    page.goto(f"{url}/#compare")
    page.locator("#compare-models input[value^=ft-island]").first.wait_for()
    for box in page.locator("#compare-models input").all():
        name = box.get_attribute("value") or ""
        box.set_checked(
            name == "smollm2-135m" or (name.startswith("ft-island") and "." not in name)
        )
    page.locator("#view-compare").get_by_label("Longest answer").fill("40")
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    page.locator("#answers mark").first.wait_for()
    page.get_by_role("button", name="Tokens").click()
    page.get_by_role("table").wait_for()
    page.screenshot(path=DOCS / f"page-{scheme}.png")
    if scheme == "light":
        return
    page.goto(f"{url}/#adapters")
    for name in JOBS:
        card = page.locator("#adapters .card").filter(
            has=page.locator(f"h3:text-matches('^ft-{name}-\\\\w+$')")
        )
        card.get_by_role("button", name="changes").click()
        card.locator(".heat").wait_for()
    picture(page, "page-adapters-dark", height=1150)
    page.goto(f"{url}/#runs")
    for name in JOBS:
        page.get_by_label(f"Compare ft-{name}").check()
    page.locator("#runs-settings table").wait_for()
    picture(page, "page-runs-dark", height=1150)


def main() -> None:
    """Serve, and walk through the page."""
    RUNS.mkdir(parents=True, exist_ok=True)
    command = ["serve", "smollm2-135m", "--runs", str(RUNS), "--enable-training"]
    server = subprocess.Popen(
        [sys.executable, "-m", "veneer", *command, "--port", str(PORT)],
        env={**os.environ, "VENEER_ADMIN_KEY": KEY},
    )
    url = f"http://127.0.0.1:{PORT}"
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            light, dark = (
                _page(browser.new_context(color_scheme=s, viewport=SIZE)) for s in ("light", "dark")
            )
            while not _answers(light, url):
                light.wait_for_timeout(500)
            open_training(light, url)
            fill(light, "island")
            picture(light, "page-train-light", height=1250)
            for each in (start, see_end):
                for name in JOBS:
                    each(light, name)
            picture_of_job(light, "island")
            take(light, url, "light")
            take(dark, url, "dark")
    finally:
        server.terminate()
        assert server.wait() == 0


def _page(context: BrowserContext) -> Page:
    page = context.new_page()
    page.set_default_timeout(MOST_MILLISECONDS)
    return page


def _answers(page: Page, url: str) -> bool:
    try:
        return page.request.get(f"{url}/ready").ok
    except Exception:  # it does not listen yet
        return False


if __name__ == "__main__":
    main()
