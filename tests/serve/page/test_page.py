"""The page in a real browser: chat, compare, adapters, a live run; and what axe finds."""

import json
import re
import time

import pytest
import yaml

from support.browser import needs_chromium, opened, serious
from support.server import API, running, scripted
from support.tiny_models import tiny
from veneer.serve.config import Keys
from veneer.serve.engine.base_weights import BaseWeights

pytestmark = needs_chromium


class Training:
    """A run of `veneer tune`, as its files say."""

    def __init__(self, place):
        self.place, self.done = place, 0
        place.mkdir(parents=True)
        recipe = {"model": "smollm2-135m", "data": "letters.jsonl", "rank": 8}
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.write_progress(None)

    def write_progress(self, ended):
        (self.place / "progress.json").write_text(json.dumps({"steps": 40, "ended": ended}))

    def go(self, steps):
        with (self.place / "metrics.jsonl").open("a") as file:
            for _ in range(steps):
                self.done += 1
                line = {"step": self.done, "loss": 3.0 / self.done, "tokens": 500, "seconds": 2.0}
                file.write(json.dumps(line) + "\n")
            line = {"step": self.done, "eval_loss": 0.5, "perplexity": 1.6}
            file.write(json.dumps(line) + "\n")


@pytest.fixture(scope="module")
def site(two, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    with running(served := scripted(two, pace=0.005), runs=runs) as server:
        served.library.add("words", two["law"], refusal="It adds 3 new tokens; merge it.")
        served.weights = BaseWeights(tiny("llama"))
        server.served, server.training = served, Training(runs / "letters")
        server.training.go(3)
        yield server


@pytest.fixture(params=["light", "dark"])
def page(browser, site, request):
    with opened(browser, site.url, request.param) as page:
        yield page


def ask(page, text, form="chat"):
    page.locator(f"#{form}-text").fill(text)
    page.locator(f"#{form}-text").press("Enter")


def test_chat(page, site):
    who, instructions = (page.get_by_label(t).first for t in ("Answered by", "Instructions"))
    who.select_option("law")
    assert instructions.input_value() == "Be just."  # what it was trained with
    who.select_option("cooking")
    assert instructions.input_value() == ""
    page.get_by_label("Longest answer").first.fill("6")
    instructions.fill("Be short.")
    who.select_option("law")
    who.select_option("cooking")
    ask(page, "What <b>is</b> honey?")
    answer = page.locator(".turn.assistant .text")
    answer.filter(has_text="cooking says word 0 word 1 word 2 word 3").wait_for()
    assert page.locator(".turn.user .text").inner_text() == "What <b>is</b> honey?"
    page.get_by_role("button", name="Tokens").click()
    table = page.get_by_role("table", name="What the adapter changed most")
    assert "times likelier" in table.inner_text()
    assert page.get_by_role("button", name="Tokens").get_attribute("aria-expanded") == "true"
    assert serious(page) == []
    # The second question goes with the first and its answer.
    ask(page, "And salt?")
    page.locator(".turn.assistant .text").nth(1).filter(has_text="word 3").wait_for()
    sent = site.served.tokenizer.decode(site.served.engine.requests[-1].tokens)
    assert all(text in sent for text in ("Be short.", "honey?", "cooking says word 0", "And salt?"))
    page.get_by_role("button", name="New").click()
    assert page.locator(".turn").count() == 0
    # Stopping frees the slot.
    page.get_by_label("Longest answer").first.fill("4000")
    ask(page, "Go on")
    page.locator(".turn.assistant .text").filter(has_text="word").wait_for()
    page.get_by_role("button", name="Stop").click()
    until = time.monotonic() + 20
    while site.served.engine.active and time.monotonic() < until:
        page.wait_for_timeout(20)
    assert site.served.engine.active == 0


def test_compare(page):
    page.get_by_role("link", name="Compare").click()
    page.wait_for_function(
        "document.activeElement.id === 'title-compare'"
    )  # hashchange comes later
    boxes = page.locator("#compare-models input")
    assert [box.get_attribute("value") for box in boxes.all()] == ["tiny", "cooking", "law"]
    page.locator("#compare-models").get_by_label("law").check()
    page.locator("#view-compare").get_by_label("Longest answer").fill("4")
    ask(page, "Who are you?", "compare")
    page.locator("#status").filter(has_text="3 answers; 3 words differ").wait_for(state="attached")
    cards = page.locator(".answer")
    assert [card.locator("mark").all_inner_texts() for card in cards.all()] == [
        ["base"],
        ["cooking"],
        ["law"],
    ]
    assert cards.nth(1).locator(".text").inner_text() == "cooking says word 0 word 1"
    assert cards.nth(0).get_by_role("button").count() == 0  # the base changed nothing
    cards.nth(2).get_by_role("button", name="Tokens").click()
    cards.nth(2).get_by_role("table").wait_for()
    assert serious(page) == []


def test_adapters(page, two):
    page.get_by_role("link", name="Adapters").click()
    card = page.locator("#adapters .card").filter(has_text="cooking")
    card.wait_for()
    shown = card.inner_text()
    assert re.search(r"Rank\s+2\b", shown)
    assert "k_proj, o_proj, q_proj, v_proj" in shown
    assert re.search(r"Size\s+\d+ kB", shown)
    assert re.search(r"Trained over\s+32 bits \(float32\)", shown)
    law = page.locator("#adapters .card").filter(has_text="law").inner_text()
    assert re.search(r"System prompt\s+Be just\.", law)
    # What each layer's change is beside its weight.
    card.get_by_role("button", name="What cooking changes").click()
    picture = card.get_by_role("region", name="What cooking changes, layer by layer")
    picture.wait_for()
    # It stays open while the list is asked for again.
    page.get_by_role("link", name="Chat").click()
    with page.expect_response("**/api/adapters"):
        page.get_by_role("link", name="Adapters").click()
    page.wait_for_timeout(100)  # for its answer to be shown
    picture.wait_for()
    heads = picture.locator("thead th").all_inner_texts()
    assert heads == ["Block", "q", "k", "v", "o"]
    numbers = [float(cell) for cell in picture.locator("td").all_inner_texts()]
    assert len(numbers) == 4 * picture.locator("tbody tr").count()
    assert picture.locator(".heat6").count() >= 1
    sentence = card.locator(".layers p").inner_text()
    assert sentence.startswith("All changes together are")
    assert f"the largest is {max(numbers):g} %" in sentence
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert serious(page) == []
    card.get_by_role("button", name="What cooking changes").press("Enter")
    picture.wait_for(state="hidden")
    # What cannot be served is shown with the reason, and offered nowhere.
    assert "It adds 3 new tokens; merge it." in page.locator("#adapters .refused").inner_text()
    options = page.get_by_label("Answered by").first.locator("option")
    assert options.count() == 3
    assert serious(page) == []


def test_a_run_is_followed_as_it_goes(page, site):
    page.get_by_role("link", name="Runs").click()
    card = page.locator(".run").filter(has_text="letters.jsonl")
    card.filter(has_text=f"{site.training.done} of 40").wait_for()
    shown = card.inner_text()
    assert "running" in shown
    assert "250 tokens/s" in shown
    assert "letters.jsonl" in shown
    assert re.search(r"Time left\s+1 min \d+ s", shown)
    site.training.go(2)
    card.filter(has_text=f"{site.training.done} of 40").wait_for()
    label = card.get_by_role("img").get_attribute("aria-label")
    assert label.startswith("Loss from 3.000 at step 1")
    assert "evaluation loss 0.500" in label
    assert serious(page) == []


def test_two_runs_are_compared(page, site):
    twin = site.training.place.parent / "numbers"
    if not twin.exists():
        other = Training(twin)
        recipe = {"model": "smollm2-135m", "data": "numbers.jsonl", "rank": 16, "seed": 0}
        (twin / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        other.go(4)
    page.get_by_role("link", name="Runs").click()
    compared = page.get_by_role("region", name="Two runs side by side")
    page.get_by_label("Compare letters").check()
    assert not compared.is_visible()
    page.get_by_label("Compare numbers").check()
    table = compared.get_by_role("table", name="Settings in which they differ")
    table.wait_for()
    rows = [row.inner_text().split() for row in table.locator("tbody tr").all()]
    assert rows == [
        ["data", "letters.jsonl", "numbers.jsonl"],
        ["rank", "8", "16"],
        ["seed", "–", "0"],
    ]
    picture = compared.get_by_role("img").get_attribute("aria-label")
    assert "letters from 3.000 to" in picture
    assert "numbers from 3.000 to 0.750 at step 4" in picture
    results = compared.get_by_role("table", name="What became of them")
    assert "0.750" in results.inner_text()
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert serious(page) == []
    page.get_by_label("Compare letters").uncheck()
    compared.wait_for(state="hidden")


def test_it_works_without_a_mouse_and_on_a_small_screen(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#adapters"
    page.set_viewport_size({"width": 360, "height": 700})
    for name in ("Chat", "Compare", "Train", "Adapters", "Runs"):
        page.get_by_role("link", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert serious(page) == []


def test_a_key_is_asked_for_once(browser, two):
    with running(scripted(two), keys=Keys(api=API)) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("API key").fill(API)
        assert serious(page) == []
        page.keyboard.press("Enter")
        page.get_by_label("Answered by").first.locator("option").nth(2).wait_for(state="attached")
        page.reload()
        page.get_by_label("Answered by").first.locator("option").nth(2).wait_for(state="attached")
        assert not page.get_by_label("API key").is_visible()
        page.close()
