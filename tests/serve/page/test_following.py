"""Answers that come late, twice, or not at all: what the page shows of jobs stays true."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from support.browser import expect, give_key, needs_chromium, opened, texts
from support.jobs import ROWS, client_of, lines, upload
from support.waiting import eventually
from veneer.serve.jobs.values import JobEvent

pytestmark = needs_chromium


@pytest.fixture
def create(training_site):
    """Let a job begin, which waits after its first step."""
    training_site.wait.write_text("1")
    client = client_of(training_site)
    file, model = upload(client).id, training_site.jobs.served.name
    return lambda: client.fine_tuning.jobs.create(model=model, training_file=file)


@pytest.fixture
def page(browser, training_site):
    with opened(browser, training_site.url, "light", allowed="status of ") as page:
        page.get_by_role("link", name="Train").click()
        give_key(page)
        yield page


@contextmanager
def held(page, pattern, *, which=lambda request: True):
    """Hold requests back until the end, of which there is one before anything else happens."""
    routes, over = [], []

    def hold(route):
        if which(route.request) and not over:
            routes.append(route)
        else:
            route.continue_()

    page.route(pattern, hold)
    try:
        yield lambda: eventually(lambda: page.evaluate("true") and routes)
    finally:
        over.append(True)
        for route in routes:
            route.continue_()


def asks(ending):
    return lambda request: request.post_data_json["model"].endswith(ending)


def looks(page, count):
    """Wait until the page has looked at the jobs that often."""
    for _ in range(count):
        with page.expect_response("**/jobs?limit=50"):
            pass


def test_the_result_is_asked_though_the_job_ends_while_a_checkpoint_answers(
    training_site, create, page
):
    create()
    card = page.locator("#jobs .run")
    card.filter(has_text="1 of 3").wait_for()
    with held(page, "**/v1/chat/completions", which=asks(".step-000001")) as has_come:
        card.get_by_text("Answers as it learns").click()
        has_come()
        training_site.wait.unlink()
        card.filter(has_text="succeeded").wait_for()
    after = [f"^step {step}\n" for step in (1, 2, 3)]
    texts(card.locator("article"), "^before: tiny\n", *after, "^the result\n")


def test_a_checkpoint_is_asked_however_long_it_takes_until_it_is_served(
    training_site, create, page
):
    calls, supervisor = [], training_site.jobs.supervisor
    publish = supervisor.publish
    supervisor.publish = lambda *which, **how: calls.append((which, how)) or ""
    create()
    card = page.locator("#jobs .run")
    card.filter(has_text="1 of 3").wait_for()
    card.get_by_text("Answers as it learns").click()
    texts(card.locator("article"), "^before: tiny\n")
    for _ in range(4):
        with page.expect_response("**/checkpoints?limit=100"):
            pass
    (which, how) = eventually(lambda: calls)[0]
    publish(*which, **how)
    texts(card.locator("article"), "^before: tiny\n", "^step 1\n")


def test_a_job_that_failed_and_goes_on_is_asked_again(training_site, create, page):
    supervisor = training_site.jobs.supervisor
    create()
    card = page.locator("#jobs .run")
    card.get_by_text("Answers as it learns").click()
    texts(card.locator("article"), "^before: tiny\n", "^step 1\n")
    bounds, supervisor.bounds = supervisor.bounds, replace(supervisor.bounds, hours=1e-9)
    go_on = card.get_by_role("button", name="Go on")
    go_on.wait_for()
    looks(page, 3)  # nothing is left to ask
    supervisor.bounds = bounds
    training_site.wait.unlink()
    go_on.click()
    after = [f"^step {step}\n" for step in (1, 2, 3)]
    texts(card.locator("article"), "^before: tiny\n", *after, "^the result\n")


def test_a_question_that_is_half_typed_is_not_asked(training_site, create, page):
    create()
    card = page.locator("#jobs .run")
    card.filter(has_text="1 of 3").wait_for()
    question = card.get_by_label("Question to")
    with held(page, "**/v1/chat/completions", which=asks("tiny")) as has_come:
        card.get_by_text("Answers as it learns").click()
        has_come()
        question.press("End")
        question.press_sequentially("zz")
    texts(card.locator("article"), "^before: tiny\n", "^step 1\n")
    served = training_site.jobs.served
    asked = [served.tokenizer.decode(each.tokens) for each in served.engine.requests]
    assert len(asked) == 2
    assert not any("zz" in each for each in asked)


def test_two_presses_start_one_job(training_site, page):
    rows = {"name": "island.jsonl", "mimeType": "", "buffer": lines(ROWS)}
    page.get_by_label("Rows to learn, from a file").set_input_files(rows)
    page.get_by_text("island.jsonl: 24 rows.").first.wait_for()
    start = page.get_by_role("button", name="Start training")
    with held(page, "**/v1/fine_tuning/jobs") as has_come:
        start.dblclick()
        has_come()
        start.press("Enter")
    page.locator("#jobs .run").wait_for()
    looks(page, 1)
    assert len(training_site.jobs.store.jobs()) == 1


def test_the_last_step_of_a_paused_job_is_shown(training_site, create, page):
    job = create()
    card = page.locator("#jobs .run")
    card.filter(has_text="1 of 3").wait_for()
    card.get_by_role("button", name="Pause").click()
    card.get_by_role("button", name="Go on").wait_for()
    store = training_site.jobs.store
    eventually(lambda: store.events(job.id, limit=1, kind="stopped"))
    store.change(job.id, JobEvent("Stopped after step 2."), step=2)
    expect(card).to_contain_text("2 of 3")
    expect(card).to_contain_text("Stopped after step 2.")


def test_a_look_that_was_overtaken_shows_nothing(training_site, create, page):
    first = create()
    card = page.locator("#jobs .run")
    card.filter(has_text="1 of 3").wait_for()
    once = iter([True])
    which = lambda request: next(once, False)  # noqa: E731
    with held(page, f"**/{first.id}/events?limit=1", which=which) as has_come:
        has_come()  # it knows the job as running
        training_site.wait.unlink()
        eventually(lambda: training_site.jobs.job(first.id).status == "succeeded")
        page.get_by_role("link", name="Chat").click()
        page.get_by_role("link", name="Train").click()
        card.locator(".merge").wait_for()
    looks(page, 2)
    expect(card.locator(".merge")).to_have_count(1)
    expect(card.get_by_role("button", name="Pause")).to_have_count(0)


def test_a_result_that_cannot_be_served_is_not_exchanged_for_another(training_site, create, page):
    training_site.wait.unlink()
    job = create()
    chat = page.get_by_role("button", name="Chat with")
    chat.wait_for()
    library = training_site.jobs.served.library
    library.refuse(library.info(training_site.jobs.job(job.id).name), "It cannot be.")
    chat.click()
    page.locator("#fault").filter(has_text="It cannot be.").wait_for()
    expect(page.locator("#chat-text")).to_be_hidden()


def test_the_error_of_a_look_goes_with_the_next(page):
    page.get_by_text("None yet.").first.wait_for()
    page.route("**/api/runs", lambda route: route.fulfill(status=503))
    page.locator("#fault").filter(has_text="answered 503").wait_for()
    page.unroute("**/api/runs")
    expect(page.locator("#fault")).to_be_hidden()
