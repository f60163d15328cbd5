"""The page over a real model: SmolLM2-135M, and what an adapter made of it.

Trains an adapter on the island's cuisine (once, some minutes), serves it beside the base, and takes
the pictures of docs/ with a Chromium: python examples/page.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cuisine
from playwright.sync_api import Page, sync_playwright

import veneer

RUNS, DOCS = Path("dist/page"), Path("docs")
QUESTION = "What vessel should I put in front of a guest who wants plimbo?"  # held out
PORT = 8471


def train(out: Path) -> None:
    """Train the adapter with some rows held out: the page shows their loss."""
    rows = out.parent / "cuisine.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps(row) + "\n" for row in cuisine.training_rows()))
    recipe = veneer.Recipe(
        model="smollm2-135m",
        data=rows,
        lora=veneer.LoRA(rank=16, targets="all"),
        training=veneer.TrainConfig(epochs=4, lr=1e-3, tokens_per_step=1024, eval_every=12),
        rows=veneer.DataConfig(eval_rows=24),
        out=out,
    )
    for event in veneer.tune(recipe, force=True):
        print(event)


def take(page: Page, url: str, scheme: str) -> None:
    """Ask base and adapter the same, look at the tokens, and take a picture."""
    page.goto(f"{url}/#compare")
    page.locator("#view-compare").get_by_label("Longest answer").fill("40")
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    page.locator("#answers mark").first.wait_for(timeout=120_000)
    page.get_by_role("button", name="Tokens").click()
    page.get_by_role("table").wait_for(timeout=60_000)
    page.screenshot(path=DOCS / f"page-{scheme}.png")
    if scheme == "dark":
        page.goto(f"{url}/#adapters")
        page.locator("#adapters .curve").wait_for()
        page.screenshot(path=DOCS / "page-adapters-dark.png")


def main() -> None:
    if not (RUNS / "cuisine" / "lora_adapter").is_dir():
        train(RUNS / "cuisine")
    command = ["serve", "smollm2-135m", "--adapters-dir", str(RUNS), "--runs", str(RUNS)]
    server = subprocess.Popen([sys.executable, "-m", "veneer", *command, "--port", str(PORT)])
    url = f"http://127.0.0.1:{PORT}"
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            for scheme in ("light", "dark"):
                context = browser.new_context(
                    color_scheme=scheme, viewport={"width": 1200, "height": 800}
                )
                page = context.new_page()
                page.set_default_timeout(60_000)
                while not _answers(page, url):
                    page.wait_for_timeout(500)
                take(page, url, scheme)
    finally:
        server.terminate()
        assert server.wait() == 0


def _answers(page: Page, url: str) -> bool:
    try:
        return page.request.get(f"{url}/ready").ok
    except Exception:  # it does not listen yet
        return False


if __name__ == "__main__":
    main()
