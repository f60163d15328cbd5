"""A newcomer's whole path over a true server: by mouse and by keyboard alone, on a desk and on a
phone."""

import json
import zipfile

import pytest
import torch

import veneer
from support.browser import expect, fits, needs_chromium, opened, texts
from support.jobs import ROWS, lines, serving
from support.random_adapters import logits, tokenizer
from support.server import ADMIN
from support.tiny_models import tiny
from veneer.serve.jobs.watching import STOP_SECONDS

pytestmark = [needs_chromium, pytest.mark.slow]
PATIENCE = 400_000  # of what a process of its own does, on however busy a machine
DESK, PHONE = {"width": 1280, "height": 720}, {"width": 375, "height": 700}


@pytest.fixture
def server(tmp_path):
    veneer.write_model(tiny("llama"), tokenizer(), tmp_path / "llama")
    (tmp_path / "runs").mkdir()
    server = serving(tmp_path / "llama", tmp_path / "runs")
    yield server
    server.process.terminate()
    assert server.process.wait(STOP_SECONDS + 60) == 0  # a training may need the first for its step


class Mouse:
    def __init__(self, page):
        self.page = page

    def press(self, element, key="Enter"):
        element.click()

    def write(self, element, text):
        element.fill(text)

    def choose(self, element, which):
        element.select_option(index=which)

    def give_rows(self, place):
        (place / "rows.jsonl").write_bytes(lines(ROWS))
        self.page.get_by_label("Rows to learn, from a file").set_input_files(place / "rows.jsonl")


class Keyboard(Mouse):
    """Reaches everything by Tab, and fails where the focus does not come."""

    def reach(self, element):
        element.wait_for()
        for _ in range(120):
            if element.evaluate("element => element === document.activeElement"):
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(element)

    def press(self, element, key="Enter"):
        self.reach(element)
        self.page.keyboard.press(key)

    def write(self, element, text):
        self.reach(element)
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(text)

    def choose(self, element, which):
        self.reach(element)
        self.page.keyboard.press("Home")
        for _ in range(which):
            self.page.keyboard.press("ArrowDown")

    def give_rows(self, place):
        self.press(self.page.locator("summary", has_text="Or paste rows"))
        self.write(self.page.locator("#train-text"), "\n".join(map(json.dumps, ROWS)))
        self.press(self.page.get_by_role("button", name="Use these rows"))


@pytest.mark.parametrize(
    ("hands", "size", "scheme"),
    [
        (Mouse, DESK, "light"),
        (Keyboard, PHONE, "dark"),
        (Mouse, PHONE, "dark"),
        (Keyboard, DESK, "light"),
    ],
    ids=["mouse, desk", "keyboard, phone", "mouse, phone", "keyboard, desk"],
)
def test_from_an_empty_server_to_a_downloaded_adapter(
    browser, server, tmp_path, hands, size, scheme
):
    with opened(browser, server.url, scheme, allowed="status of 40") as page:
        page.set_viewport_size(size)
        hand = hands(page)
        hand.press(page.get_by_role("link", name="Train"))
        hand.write(page.get_by_label("Admin key", exact=True), ADMIN)
        page.keyboard.press("Enter")
        page.get_by_text("None yet.").first.wait_for()
        hand.give_rows(tmp_path)
        page.get_by_text("24 rows.").first.wait_for()
        page.locator("#plan-1", has_text="passes over the rows, about").wait_for()
        fits(page)
        hand.write(page.get_by_label("Name", exact=True), "island")
        hand.write(page.get_by_label("Passes"), "30")
        page.keyboard.press("Tab")
        page.locator("#plan-1", has_text="30 passes").wait_for()
        hand.press(page.get_by_role("button", name="Start training"))
        card = page.locator("#jobs .run")
        hand.press(card.locator("summary", has_text="Answers as it learns"))
        card.get_by_label("before: llama").wait_for(timeout=PATIENCE)
        card.locator(".samples-log article").nth(1).wait_for(timeout=PATIENCE)
        hand.press(card.get_by_role("button", name="Pause"))
        card.get_by_role("button", name="Go on").wait_for(timeout=PATIENCE)
        fits(page)
        hand.press(card.get_by_role("button", name="Go on"))
        card.filter(has_text="succeeded").wait_for(timeout=PATIENCE)
        card.get_by_label("the result").wait_for(timeout=PATIENCE)
        hand.press(card.get_by_role("button", name="What ft-island"))
        card.locator(".heat").wait_for()
        hand.press(card.locator("summary", has_text="Merged model"))
        card.locator(".merge dl", has_text="The adapter's effect").wait_for()
        fits(page)
        with page.expect_download() as saved:
            hand.choose(card.get_by_label("Download ft-"), 2)
        with zipfile.ZipFile(saved.value.path()) as archive:
            archive.extractall(tmp_path / "saved")
        (name,) = texts(card.locator("h4"), "^ft-island")
        # A checkpoint is merged on demand.
        hand.press(page.get_by_role("link", name="Adapters"))
        other = page.locator("#adapters .card").filter(has_text=".step-").last
        hand.press(other.locator("summary", has_text="Merged model"))
        hand.press(other.get_by_role("button", name="Merge ft-"))
        other.locator(".merge dl").wait_for(timeout=PATIENCE)
        fits(page)
        # What it learnt, beside the base.
        hand.press(page.get_by_role("link", name="Compare"))
        expect(page.locator("#title-compare")).to_be_focused()
        boxes = page.locator("#compare-models input")
        expect(page.locator(f"#compare-models input[value='{name}']")).to_be_attached()
        marked = boxes.evaluate_all("all => all.map(box => [box.value, box.checked])")
        for box, is_marked in marked:
            if is_marked != (box in ("llama", name)):
                hand.press(page.locator(f"#compare-models input[value='{box}']"), "Space")
        hand.write(page.locator("#compare-text"), "a b c")
        page.keyboard.press("Enter")
        page.locator("#status", has_text="2 answers").wait_for(state="attached", timeout=PATIENCE)
        hand.press(page.get_by_role("button", name="Tokens"))
        page.get_by_role("table", name="What the adapter changed most").wait_for()
        fits(page)
        hand.press(page.get_by_role("link", name="Runs"))
        page.locator("#runs .run", has_text=name).wait_for()
        fits(page)
    # What was downloaded computes what the run's own adapter does.
    ours, saved = (
        veneer.load(tiny("llama"), place)
        for place in (tmp_path / "runs" / name, tmp_path / "saved" / name)
    )
    assert torch.equal(logits(ours), logits(saved))
    assert not torch.equal(logits(ours), logits(tiny("llama")))
