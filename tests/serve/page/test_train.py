"""From rows to an adapter in a real browser: by mouse, and by keyboard alone on a small screen."""

import io
import json
import zipfile
from pathlib import Path

import pytest

from support.browser import expect, fits, give_key, needs_chromium, opened, serious, texts
from support.jobs import ROWS, lines
from support.server import ADMIN
from veneer.serve.page.download import zipped

pytestmark = needs_chromium


def test_a_newcomer_trains_and_asks_the_result(browser, training_site, tmp_path):
    rows = tmp_path / "island.jsonl"
    rows.write_bytes(lines(ROWS[3:]))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"promt": "a"}\n')
    with opened(browser, training_site.url, "light", allowed="status of 40") as page:
        page.get_by_role("link", name="Train").click()
        give_key(page)
        page.get_by_text("None yet.").first.wait_for()
        start = page.get_by_role("button", name="Start training")
        page.get_by_label("Rows to learn, from a file").set_input_files(broken)
        fault = page.locator("#train-fault")
        fault.filter(has_text="broken.jsonl:2: ").wait_for()
        expect(start).to_be_disabled()
        page.get_by_label("Rows to learn, from a file").set_input_files(rows)
        page.get_by_text("island.jsonl: 21 rows.").first.wait_for()
        expect(fault).to_be_hidden()
        first = page.locator("#train-rows li").first
        expect(first.locator("mark")).to_have_text("hijklm</s>")
        expect(first).to_contain_text("are learnt")
        page.get_by_label("Name").fill("island")
        plans = page.locator("#train-presets .plan")
        whole = r"^[\d,]+ numbers train, in at most .* passes over the rows, about"
        counts = [text.split()[0].replace(",", "") for text in texts(plans, *[whole] * 3, "^$")[:3]]
        assert [*map(int, counts)] == sorted({*map(int, counts)})
        page.get_by_label("My own").check()
        page.get_by_role("spinbutton", name="Rank").fill("13")
        page.get_by_label("Layers", exact=True).select_option("mlp")
        plans.nth(3).filter(has_text="numbers train").wait_for()
        page.get_by_label("Passes").fill("2")
        page.keyboard.press("Tab")
        plans.nth(1).filter(has_text="2 passes").wait_for()
        page.get_by_label("Passes").fill("")
        page.get_by_label("A manner").check()
        page.get_by_label("a token of its own: hijklm, ").check()
        assert serious(page) == []
        start.click()
        card = page.locator("#jobs .run")
        card.filter(has_text="2 of 3").wait_for()
        expect(card).to_contain_text("running")
        card.get_by_role("img").wait_for()
        assert serious(page) == []
        # Whoever looks sees what it answers by then, beside what it answered before.
        card.get_by_text("Answers as it learns").click()
        samples = card.get_by_role("log")
        texts(samples.locator("article"), "^before: tiny\n", "^step 1\n", "^step 2\n")
        expect(card.get_by_label("Question to")).to_have_value("a b ")
        expect(card).to_contain_text("Its first row answers: hijklm")
        (name,) = texts(card.locator("h4"), "^ft-island-")
        expect(samples.locator("mark")).to_have_text([f"{name}.step-{i:06d}" for i in (1, 2)])
        assert serious(page) == []
        card.get_by_role("button", name="Pause").click()
        card.get_by_role("button", name="Go on").wait_for()
        training_site.wait.unlink()
        card.get_by_role("button", name="Go on").click()
        samples.get_by_label("the result").filter(has_text="says").wait_for()
        card.get_by_label("Question to").fill("Why?")
        card.get_by_label("Question to").press("Tab")
        samples.get_by_label("the result").filter(has_text="says").wait_for()
        assert training_site.jobs.served.engine.requests[-1].sampling.temperature == 0
        merged = card.locator(".merge")
        merged.get_by_text("Merged model").click()
        merged.get_by_role("button", name="Merge").press("Enter")
        merged.get_by_text("answers as the adapter does, but for 0.50% of what").wait_for()
        expect(merged).to_contain_text(f"merged/{name}/model")
        assert serious(page) == []
        with page.expect_download() as saved:
            merged.get_by_role("button", name="Download merged").click()
        with zipfile.ZipFile(saved.value.path()) as archive:
            assert archive.namelist() == ["model/config.json"]
        with page.expect_download() as saved:
            card.get_by_label("Download ft-").select_option("peft")
        with zipfile.ZipFile(saved.value.path()) as archive:
            names = {Path(name).name for name in archive.namelist()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        card.get_by_role("button", name="Chat with").click()
        page.locator("#chat-text").wait_for()
        expect(page.get_by_label("Answered by").first).to_have_value(name)
        page.get_by_label("Longest answer").first.fill("2")
        page.locator("#chat-text").fill("Hello")
        page.keyboard.press("Enter")
        page.locator(".turn.assistant .text").filter(has_text=f"{name} says").wait_for()
    (job,) = training_site.jobs.store.jobs()
    assert job.settings["rows"] == {"new_words": "auto"}
    assert job.settings["lora"] == {"rank": 8, "targets": "attention"}
    endings = {"native": "lora_weights.pt", "gguf": ".gguf", "mlx": "adapters.safetensors"}
    for format, ending in endings.items():
        content = io.BytesIO(b"".join(zipped(training_site.jobs, job.id, format)))
        with zipfile.ZipFile(content) as archive:
            assert any(name.endswith(ending) for name in archive.namelist())


def test_who_has_no_admin_key_can_leave_the_question(browser, training_site):
    with opened(browser, training_site.url, "light", allowed="status of 401") as page:
        page.get_by_role("link", name="Train").click()
        for leave in (
            lambda: page.keyboard.press("Escape"),
            lambda: page.get_by_role("button", name="Cancel").click(),
        ):
            question = page.get_by_label("Admin key", exact=True)
            question.wait_for()
            leave()
            page.locator("#fault").filter(has_text="needs the admin key").wait_for()
            page.wait_for_timeout(1200)  # longer than the view waits until it looks again
            expect(question).to_be_hidden()
            page.get_by_role("link", name="Chat").click()
            page.locator("#fault").wait_for(state="hidden")
            page.get_by_role("link", name="Train").click()


@pytest.mark.slow
def test_it_trains_by_keyboard_alone_on_a_small_screen(browser, training_site):
    with opened(browser, training_site.url, "dark", allowed="status of 40") as page:
        page.set_viewport_size({"width": 360, "height": 700})
        press = page.keyboard.press

        def go_to(holds, key="Tab"):
            for _ in range(40):
                if page.evaluate(
                    f"(() => {{ const at = document.activeElement; return {holds} }})()"
                ):
                    return
                press(key)
            raise AssertionError(page.evaluate("document.activeElement.outerHTML"))

        go_to("at.hash === '#train'")
        press("Enter")
        page.get_by_label("Admin key", exact=True).wait_for()
        page.keyboard.type(ADMIN)
        press("Enter")
        page.get_by_text("None yet.").first.wait_for()
        go_to("at.tagName === 'SUMMARY'")
        press("Enter")
        go_to("at.id === 'train-text'")
        page.keyboard.insert_text("\n".join(json.dumps(row) for row in ROWS))
        go_to("at.id === 'train-paste'")
        press("Enter")
        page.get_by_text("pasted.jsonl: 24 rows.").first.wait_for()
        fits(page)
        go_to("at.type === 'submit' && at.form.id === 'train-form'")
        press("Enter")
        page.locator("#jobs .run").filter(has_text="2 of 3").wait_for()
        fits(page)
        go_to("at.textContent === 'Stop'")
        press("Enter")
        page.locator("#status").filter(has_text="cancelled").wait_for(state="attached")
        expect(page.locator("#jobs h4")).to_be_focused()  # the focus is not lost
        assert serious(page) == []
