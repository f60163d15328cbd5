"""Pairs and prompts in a real browser: shown, and learnt from, by mouse and by keyboard."""

import json

import pytest

from support.browser import expect, fits, needs_chromium, opened, serious
from support.jobs import lines, training
from support.random_adapters import tokenizer
from support.server import ADMIN
from support.tiny_models import tiny
from veneer.formats.merged import write_model

pytestmark = needs_chromium

PAIRS = [{"prompt": "a b", "chosen": word, "rejected": "no"} for word in "cde"]
PROMPTS = [{"messages": [{"role": "user", "content": f"Say {x}"}], "answer": x} for x in "abc"]


@pytest.fixture
def site(tmp_path):
    write_model(tiny("llama"), tokenizer(), tmp_path / "base")
    with training(tmp_path / "runs", base=str(tmp_path / "base")) as server:
        yield server


def begin(page):
    page.get_by_role("link", name="Train").click()
    page.get_by_label("Admin key", exact=True).fill(ADMIN)
    page.keyboard.press("Enter")
    page.get_by_text("None yet.").first.wait_for()


def test_pairs_are_shown_and_preferred(browser, site, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(lines(PAIRS))
    with opened(browser, site.url, "light", allowed="status of 40") as page:
        begin(page)
        page.get_by_label("Rows to learn, from a file").set_input_files(file)
        page.get_by_text("pairs.jsonl: 3 pairs.").first.wait_for()
        first = page.locator("#train-rows li").first
        expect(first.locator("mark")).to_have_text("c</s>")
        expect(first.locator("del")).to_have_text("no</s>")
        expect(first).to_contain_text("what is marked is chosen")
        page.locator("#plan-1").filter(has_text="passes over the rows, about").wait_for()
        expect(page.locator("#train-prompts")).to_be_hidden()
        page.get_by_label("How closely it keeps to its start").fill("0.2")
        assert serious(page) == []
        page.get_by_role("button", name="Start training").click()
        page.locator("#jobs .run").wait_for()
    (job,) = site.jobs.store.jobs()
    assert job.settings["objective"] == {"objective": "dpo", "beta": 0.2}
    assert job.settings["lora"] == {"rank": 16, "targets": "all"}


def test_prompts_are_learnt_from_by_keyboard_on_a_small_screen(browser, site):
    with opened(browser, site.url, "dark", allowed="status of 40") as page:
        page.set_viewport_size({"width": 360, "height": 700})
        begin(page)
        page.get_by_text("Or paste rows").press("Enter")
        page.get_by_label("Rows, one a line").focus()
        page.keyboard.insert_text("\n".join(json.dumps({"prompt": "Say a"}) for _ in range(2)))
        page.get_by_role("button", name="Use these rows").press("Enter")
        page.locator("#train-fault").filter(has_text="nothing to compare answers with").wait_for()
        expect(page.get_by_role("button", name="Start training")).to_be_disabled()
        page.get_by_label("Rows, one a line").fill("\n".join(map(json.dumps, PROMPTS)))
        page.get_by_role("button", name="Use these rows").press("Enter")
        page.get_by_text("pasted.jsonl: 3 prompts.").first.wait_for()
        page.get_by_label("An answer is right where it").focus()
        page.keyboard.press("ArrowDown")  # is exactly
        page.keyboard.press("Tab")
        expect(page.locator(":focus")).to_have_value("answer")
        page.keyboard.press("Tab")
        page.keyboard.type("4")
        fits(page)
        page.get_by_role("button", name="Start training").press("Enter")
        card = page.locator("#jobs .run")
        card.wait_for()
        (job,) = site.jobs.store.jobs()
        samples = site.jobs.places.run(job) / "samples.jsonl"
        samples.parent.mkdir(exist_ok=True)  # its worker may not have begun
        line = {"row": "rows.jsonl:1", "prompt": "Say a", "tokens": 1, "advantage": 0}
        drawn = [(1, "old", 0.0), (2, "a", 1.0), (2, "b", None)]
        samples.write_bytes(
            lines([line | {"step": n, "answer": text, "reward": x} for n, text, x in drawn])
            + b'{"half'
        )
        card.get_by_text("Its answers and their rewards").press("Enter")
        card.get_by_text("Step 2", exact=True).wait_for()
        expect(card.locator("table.drawn td")).to_have_text(["a", "1.00", "b", "–"])
        fits(page)
    assert job.settings["on_policy"] == {"group_size": 4}
    grader = {"type": "string_check", "operation": "eq", "name": "right"}
    texts = {"input": "{{ sample.output_text }}", "reference": "{{ item.answer }}"}
    assert job.settings["grader"] == grader | texts
