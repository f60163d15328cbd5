"""The page in a real browser: chat, compare, adapters, a live run; and what axe finds."""

import json
import math
import re

import pytest
import yaml

from support.browser import expect, fits, needs_chromium, opened, serious, texts
from support.server import API, running, scripted
from support.tiny_models import tiny
from support.waiting import eventually
from veneer.serve.config import Keys
from veneer.serve.engine.base_weights import BaseWeights
from veneer.serve.page import runs as runs_module

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
    served = scripted(two, pace=0.005)
    with pytest.MonkeyPatch.context() as patch, running(served, runs=runs) as server:
        patch.setattr(
            runs_module, "QUIET_SECONDS", math.inf
        )  # its run goes on, however slow we are
        served.library.add("words", two["law"], refusal="It adds 3 new tokens; merge it.")
        served.weights = BaseWeights(tiny("llama"))
        server.served, server.training = served, Training(runs / "letters")
        server.training.go(3)
        yield server


@pytest.fixture
def page(browser, site):
    with opened(browser, site.url, "light") as page:
        yield page


def ask(page, text, form="chat"):
    page.locator(f"#{form}-text").fill(text)
    page.locator(f"#{form}-text").press("Enter")


def test_chat(page, site, monkeypatch):
    who, instructions = (page.get_by_label(t).first for t in ("Answered by", "Instructions"))
    who.select_option("law")
    expect(instructions).to_have_value("Be just.")  # what it was trained with
    who.select_option("cooking")
    expect(instructions).to_have_value("")
    page.get_by_label("Longest answer").first.fill("6")
    instructions.fill("Be short.")
    who.select_option("law")
    who.select_option("cooking")
    ask(page, "What <b>is</b> honey?")
    answer = page.locator(".turn.assistant .text")
    answer.filter(has_text="cooking says word 0 word 1 word 2 word 3").wait_for()
    expect(page.locator(".turn.user .text")).to_have_text("What <b>is</b> honey?")
    tokens = page.get_by_role("button", name="Tokens")
    tokens.press("Enter")
    table = page.get_by_role("table", name="What the adapter changed most")
    expect(table).to_contain_text("times likelier")
    expect(page.get_by_role("button", name="Tokens", expanded=True)).to_be_focused()
    assert serious(page) == []
    # The second question goes with the first and its answer.
    ask(page, "And salt?")
    page.locator(".turn.assistant").nth(1).get_by_role("button", name="Tokens").wait_for()
    sent = site.served.tokenizer.decode(site.served.engine.requests[-1].tokens)
    assert all(text in sent for text in ("Be short.", "honey?", "cooking says word 0", "And salt?"))
    page.get_by_role("button", name="New").click()
    expect(page.locator(".turn")).to_have_count(0)
    # Stopping frees the slot. Its answer would go on for minutes, however long the press takes.
    monkeypatch.setattr(site.served.engine, "pace", 0.1)
    page.get_by_label("Longest answer").first.fill("4000")
    ask(page, "Go on")
    page.locator(".turn.assistant .text").filter(has_text="word").wait_for()
    page.get_by_role("button", name="Stop").click()
    eventually(lambda: site.served.engine.active, lambda active: active == 0)
    # What is begun anew knows nothing of what was being answered.
    ask(page, "Of nobody's business")
    page.locator(".turn.assistant .text").nth(1).filter(has_text="word").wait_for()
    page.get_by_role("button", name="New").click()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    page.get_by_label("Longest answer").first.fill("2")
    ask(page, "Hello")
    page.locator(".turn.assistant .text").filter(has_text="says").wait_for()
    assert "business" not in site.served.tokenizer.decode(site.served.engine.requests[-1].tokens)


def test_compare(page):
    page.get_by_role("link", name="Compare").click()
    expect(page.locator("#title-compare")).to_be_focused()  # hashchange comes later
    names = page.locator("#compare-models label")
    expect(names).to_have_text(["tiny (base)", "cooking", "law"])
    page.locator("#compare-models").get_by_label("law").check()
    page.locator("#view-compare").get_by_label("Longest answer").fill("4")
    ask(page, "Who are you?", "compare")
    page.locator("#status").filter(has_text="3 answers; 3 words differ").wait_for(state="attached")
    cards = page.locator(".answer")
    expect(cards).to_have_count(3)
    for i, name in enumerate(("base", "cooking", "law")):
        expect(cards.nth(i).locator("mark")).to_have_text([name])
    expect(cards.nth(1).locator(".text")).to_have_text("cooking says word 0 word 1")
    expect(cards.nth(0).get_by_role("button")).to_have_count(0)  # the base changed nothing
    cards.nth(2).get_by_role("button", name="Tokens").click()
    cards.nth(2).get_by_role("table").wait_for()
    assert serious(page) == []


def test_adapters(page, two):
    page.get_by_role("link", name="Adapters").click()
    card = page.locator("#adapters .card").filter(has_text="cooking")
    for shown in (
        r"Rank\s+2\b",
        "k_proj, o_proj, q_proj, v_proj",
        r"Size\s+\d+ kB",
        r"Trained over\s+32 bits \(float32\)",
    ):
        expect(card).to_contain_text(re.compile(shown), use_inner_text=True)
    law = page.locator("#adapters .card").filter(has_text="law")
    expect(law).to_contain_text(re.compile(r"System prompt\s+Be just\."), use_inner_text=True)
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
    expect(picture.locator("thead th")).to_have_text(["Block", "q", "k", "v", "o"])
    blocks = tiny("llama").config.num_hidden_layers
    expect(picture.locator("tbody tr")).to_have_count(blocks)
    numbers = map(float, texts(picture.locator("td"), *[r"^[\d.]+$"] * 4 * blocks))
    expect(picture.locator(".heat6").first).to_be_visible()
    sentence = rf"^All changes together are .*; the largest is {max(numbers):g} %"
    expect(card.locator(".layers p")).to_have_text(re.compile(sentence))
    page.set_viewport_size({"width": 360, "height": 700})
    fits(page)
    card.get_by_role("button", name="What cooking changes").press("Enter")
    picture.wait_for(state="hidden")
    # What cannot be served is shown with the reason, and offered nowhere.
    expect(page.locator("#adapters .refused")).to_contain_text("It adds 3 new tokens; merge it.")
    options = page.get_by_label("Answered by").first.locator("option")
    expect(options).to_have_count(3)
    assert serious(page) == []


def test_a_run_is_followed_as_it_goes(page, site):
    page.get_by_role("link", name="Runs").click()
    card = page.locator(".run").filter(has_text="letters.jsonl")
    card.filter(has_text=f"{site.training.done} of 40").wait_for()
    for shown in ("running", "250 tokens/s", "letters.jsonl", r"Time left\s+1 min \d+ s"):
        expect(card).to_contain_text(re.compile(shown), use_inner_text=True)
    site.training.go(2)
    card.filter(has_text=f"{site.training.done} of 40").wait_for()
    label = re.compile("^Loss from 3.000 at step 1.*evaluation loss 0.500")
    expect(card.get_by_role("img", name=label)).to_be_visible()
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
    expect(compared).to_be_hidden()
    page.get_by_label("Compare numbers").check()
    table = compared.get_by_role("table", name="Settings in which they differ")
    cells = "data letters.jsonl numbers.jsonl rank 8 16 seed – 0"
    expect(table.locator("tbody :is(th, td)")).to_have_text(cells.split())
    both = re.compile("letters from 3.000 to .*numbers from 3.000 to 0.750 at step 4")
    expect(compared.get_by_role("img", name=both)).to_be_visible()
    results = compared.get_by_role("table", name="What became of them")
    expect(results).to_contain_text("0.750")
    page.set_viewport_size({"width": 360, "height": 700})
    fits(page)
    page.get_by_label("Compare letters").uncheck()
    compared.wait_for(state="hidden")


def test_it_works_without_a_mouse_and_on_a_small_screen(page):
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#title-adapters")).to_be_focused()
    page.set_viewport_size({"width": 360, "height": 700})
    for name in ("Chat", "Compare", "Train", "Adapters", "Runs"):
        page.get_by_role("link", name=name).click()
        expect(page.locator(f"#title-{name.lower()}")).to_be_focused()
        fits(page)


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
        expect(page.get_by_label("API key")).to_be_hidden()
        page.close()
