"""Ask the demo's file in a real Chromium: does the page answer as the file was scored?

Needs `snakemake --cores all --configfile runs/demo.yaml -- app`, `pip install playwright` and a Chromium.
Writes benchmarks/app.md and, into --screenshots, the page in both languages and themes.
"""

import argparse
import itertools
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, machine, program, write_page
from serve_app import open_server

APP = ROOT / "results/demo/app"
TEXT = "The battery died after two days, but they sent me a new one at once."
# For each row: whether prompt and token ids are the scored ones, the answer, its log probabilities.
ASK = """async () => {
  const { app } = await import("/app.js");
  const told = [];
  for (const row of app.checks) {
    const { answer, scores, ids, prompt } = await app.model.ask(row.message);
    const alike = prompt === row.prompt && ids.join() === row.prompt_ids.join();
    const scored = app.model.words.map((word) => row.labels[word].log_probability);
    told.push({ alike, same: answer === row.answer, scores, scored });
  }
  return told;
}"""


def load(page: Any, url: str) -> None:
    """Open the page and load the model into it."""
    page.goto(url)
    page.click("#load")
    page.wait_for_selector("#ask:not([hidden])", timeout=600_000)


def ask_rows(browser: Any, url: str) -> dict[str, Any]:
    """Return what the rows gave, what the page asked other hosts for, and what it complained of."""
    page = browser.new_page()
    page.set_default_timeout(3_600_000)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: complaints.append(line.text))
    load(page, url)
    rows = page.evaluate(ASK)
    others = [address for address in asked if not address.startswith((url, f"blob:{url}"))]
    return {"rows": rows, "others": others, "complaints": complaints}


def describe(told: Mapping[str, Any], size: int, browser: str) -> list[str]:
    """Return the lines of the page."""
    rows: Sequence[Mapping[str, Any]] = told["rows"]
    moved = [abs(a - b) for row in rows for a, b in zip(row["scores"], row["scored"], strict=True)]
    apart = [
        abs((row["scores"][0] - row["scores"][1]) - (row["scored"][0] - row["scored"][1]))
        for row in rows
    ]
    margins = [abs(row["scored"][0] - row["scored"][1]) for row in rows]
    return [
        "# The page's answers against the scored ones",
        "",
        f"The demo's q4_k_m.gguf ({size:,} bytes) in {browser}, by wllama, against llama-cpp-python's scores of the"
        f" same file; on {machine()}. Made by `python benchmarks/app.py`.",
        "",
        "| rows | prompt and token ids alike | answers alike | log probability: largest difference | mean |"
        " difference of the two labels': largest | smallest margin of a scored row | requests to other hosts | console |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| {len(rows)} | {sum(row['alike'] for row in rows)} | {sum(row['same'] for row in rows)} | {max(moved):.3f}"
        f" | {sum(moved) / len(moved):.3f} | {max(apart):.3f} | {min(margins):.3f} | {len(told['others'])}"
        f" | {len(told['complaints'])} lines |",
    ]


def take_screenshots(browser: Any, url: str, folder: Path) -> None:
    """Write the answered page in both languages, both themes, at 390 and 1,280 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for locale, scheme in itertools.product(("en-US", "zh-CN"), ("light", "dark")):
        context = browser.new_context(locale=locale, color_scheme=scheme)
        page = context.new_page()
        load(page, url)
        page.fill("#text", TEXT)
        page.click("#answer")
        page.wait_for_selector("#took:not([hidden])", timeout=600_000)
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            page.screenshot(path=folder / f"{locale}-{scheme}-{width}.png", full_page=True)
        context.close()


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screenshots", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    size = program.read_json(APP / "app.json")["model"]["bytes"]
    server = open_server(APP, 0, "127.0.0.1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    with sync_playwright() as tool:
        browser = tool.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        told = ask_rows(browser, url)
        write_page("app", describe(told, size, f"Chromium {browser.version}"))
        if arguments.screenshots:
            take_screenshots(browser, url, arguments.screenshots)


if __name__ == "__main__":
    main()
