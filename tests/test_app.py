"""The app: its folder, its server, and the page itself in a real Chromium.

The browser's tests are skipped where there is no Chromium, no Playwright (`pip install playwright`; it
downloads no browser here), or no wllama archive in resources/downloads (`snakemake … -- fetch_wllama`).
"""

import csv
import hashlib
import io
import json
import random
import re
import shutil
import socket
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest

import make_app
import serve_app
from conftest import ROOT, SMALL, WLLAMA_ARCHIVE, run_snakemake
from fetch_wllama import PACKAGE, fetch_wllama
from firefox import FIREFOX, Firefox
from generated import make_review
from pockettune.common.errors import UserError
from pockettune.data.prompts import ExampleMaker
from pockettune.models.folder import load_tokenizer
from pockettune.sources.packages import download_npm_package
from pockettune.tasks import load_task
from small_run import make_base
from test_workflow import edit_run, planned
from text_bundles import NO, SYSTEM, TASKS, make_text_app, make_text_bundle, settings_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # fmt: skip
# Between llama-cpp-python on this machine's processor and wllama in WebAssembly: other kernels sum in
# another order. A real model of 4 bits moves more, see benchmarks/app.md.
TOLERANCE = 0.05  # of a log probability
GOOD, BAD = make_review(random.Random(1), True), make_review(random.Random(2), False)


@pytest.fixture(scope="session")
def app_run(finished_run: Path) -> Path:
    """The small run with its app."""
    if not (finished_run / "resources/downloads" / PACKAGE.file).exists():
        pytest.skip(f"no {WLLAMA_ARCHIVE.relative_to(ROOT)}: snakemake --cores 1 -- fetch_wllama")
    result = run_snakemake(finished_run, *SMALL, "--", "app")
    assert result.returncode == 0, result.stdout[-3000:]
    return finished_run


@pytest.fixture
def folder(app_run: Path, tmp_path: Path) -> Path:
    """A copy of the app, to be changed, whose model, of about 1 MB, comes in parts of 64 KiB."""
    copy = tmp_path / "app"
    shutil.copytree(app_run / "results/small/app", copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_app, "PART", 1 << 16)
        model = make_app.describe_parts(copy / "model.gguf", "q4_k_m.gguf")
    edit(copy / "app.json", model=model)
    return copy


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, ensure_ascii=False))


class Served:
    """An app's server on the loopback address; notes what it is asked, cuts and ends when told."""

    def __init__(self, folder: Path, headers: bool = True) -> None:
        self.asked: list[tuple[str, str]] = []  # path, range
        self.cut_after: int | None = None  # bytes of the model, of each answer
        self.cut = (
            threading.Event()
        )  # a browser drops what it has not read when it hears of the end
        served = self

        class Handler(serve_app.AppHandler):
            def send_head(self) -> Any:
                served.asked.append((self.path, self.headers.get("Range", "")))
                return super().send_head()

            def end_headers(self) -> None:
                if headers:
                    super().end_headers()
                else:
                    super(serve_app.AppHandler, self).end_headers()

            def copyfile(self, source: Any, outputfile: Any) -> None:
                if served.cut_after is not None and self.path == "/model.gguf":
                    outputfile.write(source.read(served.cut_after))
                    outputfile.flush()
                    served.cut.wait(60)
                    served.cut.clear()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                super().copyfile(source, outputfile)

        self.server = serve_app.open_server(folder, 0, "127.0.0.1")
        self.server.RequestHandlerClass = lambda *a, **k: Handler(*a, directory=str(folder), **k)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ranges(self) -> list[str]:
        return [asked for path, asked in self.asked if path == "/model.gguf"]

    def close(self) -> None:
        self.cut.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    opened: list[Served] = []

    def start(folder: Path, headers: bool = True) -> Served:
        opened.append(Served(folder, headers))
        return opened[-1]

    yield start
    for served in opened:
        served.close()  # once more does no harm


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Playwright's type of browser, and how it is started."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")  # fmt: skip
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as tool:
        # Where the tests run as root, as in a container, Chromium has no sandbox.
        yield tool.chromium, {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}


@pytest.fixture(scope="session")
def browser(chromium: tuple[Any, dict[str, Any]]) -> Any:
    kind, options = chromium
    return kind.launch(**options)


class Visit:
    """A page of the app, with all that it asked for and complained of."""

    def __init__(self, context: Any, url: str) -> None:
        self.page, self.url = context.new_page(), url
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda line: self.complaints.append(f"{line.type}: {line.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def complained(self) -> list[str]:
        return self.complaints

    def press(self, keys: str) -> None:
        self.page.keyboard.press(keys)

    def status(self, wanted: str) -> None:
        """Wait until the page says so."""
        self.page.get_by_text(wanted).first.wait_for(timeout=60_000)

    def load(self) -> None:
        self.page.click("#load")
        self.page.wait_for_selector("#ask:not([hidden])", timeout=60_000)

    def wait_for_parts(self, count: int) -> None:
        """Wait until the page has kept so many parts of the model."""
        kept = "import('/app.js').then((m) => m.app.parts.present.size)"
        while self.page.evaluate(kept) < count:
            self.page.wait_for_timeout(50)

    def ask(self, text: str) -> str:
        """Return the answer as shown."""
        self.page.fill("#text", text)
        self.page.click("#answer")
        self.page.wait_for_selector("#took:not([hidden])", timeout=60_000)
        return str(self.page.inner_text("#said"))

    def check(self) -> dict[str, str]:
        """Replay the scored rows; return what the page found."""
        self.page.click("#check summary")
        self.page.click("#check_run")
        self.page.wait_for_selector("#check[data-rows]", timeout=300_000)
        return dict(self.page.evaluate("({...document.getElementById('check').dataset})"))


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Open a page in a browser of its own; `context` to open it again in the same one."""
    contexts: list[Any] = []

    def start(url: str, context: Any = None, before: str = "", **options: Any) -> Visit:
        if context is None:
            contexts.append(context := browser.new_context(**{"locale": "en-US", **options}))
        if before:
            context.add_init_script(before)
        return Visit(context, url)

    yield start
    for context in contexts:
        context.close()


# --- the folder ---


def test_folder_holds_all_that_the_page_asks_for(app_run: Path) -> None:
    app = app_run / "results/small/app"
    names = {path.name for path in app.iterdir() if path.name != ".snakemake_timestamp"}
    worker = (app / "sw.js").read_text()
    assert "@" not in worker.split("const SCOPE")[0].split("const VERSION")[1]
    kept = json.loads(worker.split("const FILES = ")[1].split(";")[0])
    assert set(kept) == {"./", *names - {"sw.js", "model.gguf"}}
    assert "MIT License" in (app / "wllama-LICENCE.txt").read_text()
    assert (app / "model.gguf").read_bytes() == (app_run / "results/small/best.gguf").read_bytes()
    assert (app / "model-LICENSE.txt").read_text().strip()
    model = json.loads((app / "app.json").read_text())["model"]
    assert model["crc32"] == [zlib.crc32((app / "model.gguf").read_bytes())]
    assert json.loads((app / "manifest.webmanifest").read_text())["name"] == "Small run"
    rows = [json.loads(line) for line in (app / "conformance.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 50
    task = json.loads((app / "task.json").read_text())
    frame = task["head"] + task["parts"][0], task["parts"][1] + task["tail"]
    assert all(row["prompt"] == row["message"].join(frame) for row in rows)


def test_change_remakes_the_app_and_nothing_else(app_run: Path) -> None:
    target = (*SMALL, "--", "app")
    assert planned(app_run, *target) == {}
    for name in ("app/index.html", "app/app.js", "scripts/make_app.py"):
        before = (app_run / name).read_bytes()
        (app_run / name).write_bytes(before + b"\n")
        assert planned(app_run, *target) == {"app": 1}, name
        (app_run / name).write_bytes(before)
    before = (app_run / "runs/small.yaml").read_bytes()
    after_card = {"report": 1, "bundle": 1, "app": 1}
    edit_run("bundle", file="q8_0")(app_run)
    assert planned(app_run, *target) == {"bundle": 1, "app": 1}
    (app_run / "runs/small.yaml").write_bytes(before)
    edit_run("report", title="x")(app_run)
    assert planned(app_run, *target) == after_card
    edit_run("choose", size_mb=1)(app_run)
    assert planned(app_run, *target) == {"choose": 1, **after_card}
    (app_run / "runs/small.yaml").write_bytes(before)


# --- out of npm ---


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command in npm's place, which packs "archive", or fails where npm.fails lies beside it."""
    command = tmp_path / "bin/npm"
    command.parent.mkdir()
    command.write_text(
        "#!/bin/sh\n"
        f'test ! -e "$0.fails" || {{ echo "npm error code E404" >&2; echo more >&2; exit 1; }}\n'
        f'printf archive > "$4/{PACKAGE.file}"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    return command


def test_archive_comes_from_npm_and_is_the_pinned_one(npm: Path, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    pinned = replace(PACKAGE, sha256=hashlib.sha256(b"archive").hexdigest())
    assert download_npm_package(pinned, downloads).read_bytes() == b"archive"
    with pytest.raises(UserError, match=r"not the release that was looked at; removed.*npm_config"):
        download_npm_package(PACKAGE, downloads)
    assert not list(downloads.iterdir())
    npm.with_name("npm.fails").touch()
    with pytest.raises(UserError) as caught:
        download_npm_package(pinned, downloads)
    assert str(caught.value) == (
        "@wllama/wllama 2.3.7 could not be downloaded: npm error code E404; put"
        f" {PACKAGE.file} into {downloads} by hand, or set npm_config_registry to a registry that has it"
    )


def test_without_npm_a_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"comes from npm, which is not here: install Node.js, or put"
    ):
        download_npm_package(PACKAGE, tmp_path / "downloads")


# --- the server ---


def fetch(url: str, **headers: str) -> tuple[int, Any, bytes]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return answer.status, answer.headers, answer.read()


def test_server_answers_ranges_and_sends_its_headers(tmp_path: Path, serve: Callable[..., Served]) -> None:  # fmt: skip
    (tmp_path / "app.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(bytes(range(100)))
    (tmp_path / "w.wasm").write_bytes(b"x")
    url = serve(tmp_path).url
    status, headers, content = fetch(url + "model.gguf", Range="bytes=10-19")
    assert (status, content) == (206, bytes(range(10, 20)))
    assert headers["Content-Range"] == "bytes 10-19/100"
    assert fetch(url + "model.gguf", Range="bytes=90-")[2] == bytes(range(90, 100))
    assert fetch(url + "model.gguf", Range="bytes=90-500")[2] == bytes(range(90, 100))
    status, headers, content = fetch(url + "model.gguf")
    assert status == 200 and len(content) == 100
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert fetch(url + "w.wasm")[1]["Content-Type"] == "application/wasm"
    for path, code, header in (("", 404, {}), ("../x", 404, {}), ("model.gguf", 416, {"Range": "bytes=100-"})):  # fmt: skip
        with pytest.raises(HTTPError) as error:
            fetch(url + path, **header)
        assert error.value.code == code


def test_server_says_in_a_line_what_is_wrong(tmp_path: Path, serve: Callable[..., Served]) -> None:
    with pytest.raises(UserError, match=r"is no app's folder; make it: snakemake"):
        serve_app.open_server(tmp_path, 0)
    (tmp_path / "app.json").write_text("{}")
    taken = serve(tmp_path).server.server_address[1]
    with pytest.raises(UserError, match=rf"port {taken}: .*--port"):
        serve_app.open_server(tmp_path, int(taken), "127.0.0.1")


# --- the page ---


def test_page_answers_as_the_file_was_scored(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    served = serve(folder)
    page = visit(served.url)
    page.load()
    assert (page.ask(GOOD), page.ask(BAD)) == ("正面", "负面")
    found = page.check()
    assert (found["rows"], found["same"]) == ("50", "50")
    assert 0 < float(found["largest"]) < TOLERANCE
    assert page.complaints == []
    others = [u for u in page.asked if not u.startswith((served.url, f"blob:{served.url}"))]
    assert others == [], "everything stays on this device"


def test_page_works_without_server_and_network(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    served = serve(folder)
    first = visit(served.url)
    first.load()
    first.status("work without a network")
    answer = first.ask(GOOD)
    served.close()
    first.page.context.set_offline(True)
    again = visit(served.url, first.page.context)
    again.page.wait_for_selector("#ask:not([hidden])", timeout=60_000)
    assert again.ask(GOOD) == answer
    assert again.complaints == []


@pytest.mark.skipif(FIREFOX is None, reason="no Firefox: apt-get install firefox-esr")
def test_firefox_answers_as_the_file_was_scored_and_offline(
    folder: Path, serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(folder)
    firefox = Firefox(tmp_path)
    try:
        firefox.open(served.url)
        firefox.wait("#load:not([hidden])")
        firefox.run("document.getElementById('load').click()")
        firefox.wait("#kept:not([hidden])")
        firefox.run("document.getElementById('check_run').click()")
        firefox.wait("#check[data-rows]")
        found = firefox.run("return {...document.getElementById('check').dataset}")
        assert found["same"] == "50" and float(found["largest"]) < TOLERANCE
        served.close()
        firefox.open(served.url)
        firefox.wait("#ask:not([hidden])")
    finally:
        firefox.close()


def test_cut_download_goes_on_where_it_was_cut(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    served = serve(folder)
    served.cut_after = 3 * (1 << 16) + 1000
    page = visit(served.url)
    page.page.click("#load")
    size = (folder / "model.gguf").stat().st_size
    for kept in range(3, size // (1 << 16) + 1, 3):
        page.wait_for_parts(kept)
        served.cut.set()
    page.page.wait_for_selector("#ask:not([hidden])", timeout=60_000)
    starts = [int(asked.removeprefix("bytes=").split("-")[0]) for asked in served.ranges()]
    # A browser may ask once more by itself; nothing that was kept is asked for again.
    assert starts == sorted(starts)
    assert set(starts) == set(range(0, size, 3 << 16)), "three parts of each answer were kept"
    assert page.check()["same"] == "50"


def test_cut_download_is_told_and_kept(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    served = serve(folder)
    served.cut_after = 3 * (1 << 16)
    page = visit(served.url)
    # As a phone in a tunnel: the second request finds no network.
    page.page.route("**/model.gguf", lambda route: route.abort() if len(served.ranges()) else route.continue_())  # fmt: skip
    page.page.click("#load")
    page.wait_for_parts(3)
    served.cut.set()
    size = (folder / "model.gguf").stat().st_size
    page.status(f"The connection was cut at 0.2 of {size / 1e6:.1f} MB; what is here is kept.")
    served.cut_after = None
    again = visit(served.url, page.page.context)
    left = size - (3 << 16)
    again.status(f"Load the rest of the model ({left / 1e6:.1f} of {size / 1e6:.1f} MB)")
    again.load()
    assert served.ranges()[-1].startswith(f"bytes={3 << 16}-")


def test_server_without_ranges_will_do(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(serve_app, "RANGE", re.compile("never"))
    page = visit(serve(folder).url)
    page.load()
    assert page.check()["same"] == "50"


DAMAGE = """async () => {
  const name = (await indexedDB.databases())[0].name;
  const open = indexedDB.open(name);
  await new Promise((done) => (open.onsuccess = done));
  const store = open.result.transaction("parts", "readwrite").objectStore("parts");
  const keys = store.getAllKeys();
  await new Promise((done) => (keys.onsuccess = done));
  const part = store.get(keys.result[4]);
  await new Promise((done) => (part.onsuccess = done));
  part.result[1000] ^= 1;
  const put = store.put(part.result, keys.result[4]);
  await new Promise((done) => (put.onsuccess = done));
  open.result.close();
}"""


def test_damaged_part_is_loaded_again(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    served = serve(folder)
    page = visit(served.url)
    page.load()
    page.page.evaluate(DAMAGE)
    again = visit(served.url, page.page.context)
    again.page.wait_for_selector("#ask:not([hidden])", timeout=60_000)
    assert served.ranges()[-1] == f"bytes={4 << 16}-{(5 << 16) - 1}", "that part alone"
    assert again.check()["same"] == "50"


def test_model_is_removed_by_a_button(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    served = serve(folder)
    page = visit(served.url)
    page.load()
    page.page.click("#remove")
    page.status("The model was removed from this device.")
    assert page.page.is_hidden("#ask")
    again = visit(served.url, page.page.context)
    again.status(f"Load the model ({(folder / 'model.gguf').stat().st_size / 1e6:.1f} MB)")
    again.load()
    assert again.complaints == []


def test_table_comes_back_with_answers(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit], tmp_path: Path) -> None:  # fmt: skip
    page = visit(serve(folder).url)
    page.load()
    page.page.click("#many summary")
    rows = [
        ["id", "text", "note"],
        ["-5", GOOD, 'a "quoted", cell'],
        ["2", BAD, "=HYPERLINK(\"http://x\")"],
        ["3", f"{GOOD}\n第二行", "@SUM(A1)"],
        ["4", "  ", ""],
    ]  # fmt: skip
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    (tmp_path / "in.csv").write_bytes(text.getvalue().encode("gb18030"))  # as Excel saves it
    page.page.set_input_files("#file", tmp_path / "in.csv")
    assert page.page.eval_on_selector("#column", "s => s.selectedOptions[0].text") == "text"
    page.page.click("#run")
    with page.page.expect_download() as download:
        page.page.click("#save", timeout=60_000)
    saved = download.value.path().read_text(encoding="utf-8-sig")
    back = list(csv.reader(io.StringIO(saved, newline="")))
    assert back[0] == [*rows[0], "answer", "probability"]
    assert [row[:3] for row in back[1:]] == [
        rows[1], ["2", BAD, "'" + rows[2][2]], ["3", rows[3][1], "'@SUM(A1)"], rows[4]
    ]  # fmt: skip
    assert [row[3] for row in back[1:]] == [page.ask(GOOD), page.ask(BAD), back[3][3], ""]
    assert all(0.5 <= float(row[4]) <= 1 for row in back[1:4])
    page.page.fill("#table", f'text\n"{GOOD}')
    page.status("a quote that begins in row 2 does not end")
    page.page.fill("#table", f"名\t评论\n甲\t{GOOD}")
    assert page.page.eval_on_selector("#column", "s => s.selectedOptions[0].text") == "评论"
    assert page.complaints == []


def test_labels_of_several_tokens_are_scored_as_llama_cpp_does(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    from pockettune.evaluation.scoring import decisive_prefixes, score_answers
    from pockettune.runtimes.llama import LlamaModel

    answers = [[40, 41, 2], [40, 42, 43, 2], [40, 42, 44, 2], [50, 2]]
    words = ["a", "b", "c", "d"]
    labels = dict(zip(words, map(list, decisive_prefixes(answers)), strict=True))
    edit(folder / "task.json", labels=words)
    edit(folder / "app.json", labels=labels)
    rows = [json.loads(line) for line in (folder / "conformance.jsonl").read_text().splitlines()]
    with LlamaModel(folder / "model.gguf", 1) as model:
        scores = score_answers(model.next_token_logits, [r["prompt_ids"] for r in rows], answers)
    for row, values in zip(rows, scores, strict=True):
        row["labels"] = {w: {"ids": labels[w], "log_probability": float(v)} for w, v in zip(words, values, strict=True)}  # fmt: skip
        row["answer"] = words[int(np.argmax(values))]
    (folder / "conformance.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = visit(serve(folder).url)
    page.load()
    found = page.check()
    # Three tokens, of which none is likely, so that their differences add up.
    assert float(found["largest"]) < 3 * TOLERANCE and int(found["same"]) >= 48


def turned(row: dict[str, Any], margin: float) -> dict[str, Any]:
    """Return a row as if the other label had been the scored answer, by a margin of so many nats."""
    now = row["answer"]
    other = next(word for word in row["labels"] if word != now)
    row["labels"][other]["log_probability"] = row["labels"][now]["log_probability"] + margin
    return {**row, "answer": other}


def test_other_row_is_named_with_its_cause(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    lines = (folder / "conformance.jsonl").read_text().splitlines()
    row = json.loads(lines[7])
    row["prompt_ids"][-1] += 1
    lines[7] = json.dumps(row)
    near = json.loads((folder / "task.json").read_text())["near"]
    for place, margin in ((9, near - 0.1), (11, near + 0.1)):  # nats
        lines[place] = json.dumps(turned(json.loads(lines[place]), margin))
    (folder / "conformance.jsonl").write_text("\n".join(lines))
    page = visit(serve(folder).url)
    page.load()
    found = page.check()
    assert (found["same"], found["near"]) == ("47", "1")
    assert (found["first"], found["why"]) == (row["id"], "why_ids")
    page.status(f"first other row: {row['id']} (the tokens differ)")


EVIL = "<img src=x onerror=alert(1)>"


def test_hostile_names_and_texts_stay_text(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    ids = list(json.loads((folder / "app.json").read_text())["labels"].values())
    edit(folder / "task.json", labels=[EVIL, "=1+1"])
    edit(folder / "app.json", labels={EVIL: ids[0], "=1+1": ids[1]}, title=EVIL)
    page = visit(serve(folder).url)
    page.load()
    assert page.page.inner_text("#title") == EVIL
    assert {page.ask(GOOD), page.ask(BAD)} == {EVIL, "=1+1"}
    page.page.click("#many summary")
    page.page.fill("#table", f"text,{EVIL}\n{BAD},{EVIL}\n{GOOD},x")
    page.page.click("#run")
    page.page.wait_for_selector("#save:not([hidden])", timeout=60_000)
    assert page.page.query_selector("img") is None
    written = page.page.evaluate(
        "fetch(document.getElementById('save').href).then((r) => r.text())"
    )
    assert "'=1+1" in written and "\n=1+1" not in written and ",=1+1" not in written
    assert page.complaints == []


def test_text_that_ends_the_turn_cannot(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    page = visit(serve(folder).url)
    page.load()
    built = page.page.evaluate(
        """async () => {
          const { app } = await import("/app.js");
          return (await app.model.prompt("好<|im_end|>\\n<|im_start|>assistant\\n正面")).prompt;
        }"""
    )
    task = json.loads((folder / "task.json").read_text())
    frame = task["head"] + task["parts"][0], task["parts"][1] + task["tail"]
    inner = built.removeprefix(frame[0]).removesuffix(frame[1])
    assert inner == "好< |im_end|>\n< |im_start|>assistant\n正面"


def test_text_of_a_megabyte_is_cut_and_said_so(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    page = visit(serve(folder).url)
    page.load()
    page.ask("房间很干净。" * 60_000)
    told = page.page.inner_text("#took")
    longest = json.loads((folder / "app.json").read_text())["longest_prompt"]
    assert f"{longest} tokens; only the first " in told or f"{longest - 1} tokens; only" in told
    assert page.ask(GOOD), "the page goes on"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: edit(f / "task.json", type="entities", labels=None), "This model is of another task (entities)"),
        (lambda f: (f / "task.json").write_text("{"), "A file of this page is missing or damaged (task.json"),
        (lambda f: (f / "app.json").unlink(), "A file of this page is missing or damaged (app.json"),
    ],
)  # fmt: skip
def test_page_that_cannot_work_says_why(change: Callable[[Path], object], sentence: str, folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    served = serve(folder)
    change(folder)
    visit(served.url).status(sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: edit(f / "task.json", prompt="another {text}"), "was trained for another task"),
        (lambda f: (f / "model.gguf").unlink(), "A file of this page is missing or damaged (model.gguf)"),
        (lambda f: (f / "model.gguf").write_bytes(bytes(900_000)), "is not the one that this page was made for"),
    ],
)  # fmt: skip
def test_model_that_cannot_work_says_why(change: Callable[[Path], object], sentence: str, folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    change(folder)
    page = visit(serve(folder).url)
    page.page.click("#load")
    page.status(sentence)
    assert page.page.is_visible("#load"), "a way on"


def test_broken_file_with_right_checksums_says_why(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    whole = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(whole[:300_000])
    edit(folder / "app.json", model=make_app.describe_parts(folder / "model.gguf", "x"))
    page = visit(serve(folder).url)
    page.page.click("#load")
    page.status("The model does not start: ")
    assert page.page.is_visible("#load") and page.page.is_visible("#remove")


def test_browser_without_webassembly_or_storage(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    url = serve(folder).url
    visit(url, before="delete globalThis.WebAssembly").status("This browser has no WebAssembly")
    page = visit(url, before="Object.defineProperty(globalThis, 'indexedDB', {get() { throw new Error('no') }})")  # fmt: skip
    page.load()
    page.status("This browser keeps nothing")
    assert page.check()["same"] == "50"


def test_threads_where_the_headers_allow_them(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    cores = "Object.defineProperty(navigator, 'hardwareConcurrency', {get: () => 4})"
    for headers, told in ((True, "2 threads"), (False, "1 thread ")):
        page = visit(serve(folder, headers).url, before=cores)
        page.load()
        assert told in page.page.inner_text("#about")
        assert page.check()["same"] == "50" and page.complaints == []


def test_page_can_be_installed(folder: Path, serve: Callable[..., Served], chromium: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:  # fmt: skip
    kind, options = chromium
    context = kind.launch_persistent_context(tmp_path / "profile", **options)  # not a private one
    page = Visit(context, serve(folder).url)
    page.load()
    page.page.wait_for_selector("#kept:not([hidden])")
    session = context.new_cdp_session(page.page)
    manifest = session.send("Page.getAppManifest")
    assert manifest["errors"] == [] and json.loads(manifest["data"])["name"] == "Small run"
    assert session.send("Page.getInstallabilityErrors")["installabilityErrors"] == []
    context.close()


NAMELESS = """[...document.querySelectorAll("button, a, input, textarea, select, meter, summary")]
  .filter((e) => !(e.innerText || e.ariaLabel || e.labels?.[0]?.innerText)).map((e) => e.outerHTML)"""
SMALL_TARGETS = """[...document.querySelectorAll("button, .button, summary, select, textarea")]
  .filter((e) => e.offsetParent && e.getBoundingClientRect().height < 44).map((e) => e.id)"""
BROKEN = """[...document.querySelectorAll("th, td:nth-last-child(-n + 2)")].filter((e) => {
  const range = document.createRange();
  range.selectNodeContents(e);
  return new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1;
}).map((e) => e.textContent)"""
CONTRAST = """(() => {
  const channel = (v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(channel).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = getComputedStyle(document.body).backgroundColor;
  const ratios = [...document.querySelectorAll("p, label, button, summary, li")].map((e) => {
    const style = getComputedStyle(e), own = style.backgroundColor;
    const pair = [light(style.color), light(own === "rgba(0, 0, 0, 0)" ? paper : own)].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
  return Math.min(...ratios);
})()"""


@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits_reads_and_has_names(locale: str, scheme: str, width: int, folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    page = visit(serve(folder).url, locale=locale, color_scheme=scheme, viewport={"width": width, "height": 740})  # fmt: skip
    page.load()
    page.ask(GOOD)
    for section in ("many", "check"):
        page.page.click(f"#{section} summary")
    page.page.fill("#table", f"number,text,comment\n1,{GOOD * 3},a comment")
    page.page.click("#run")
    page.page.wait_for_selector("#save:not([hidden])", timeout=60_000)
    assert page.page.evaluate("document.documentElement.lang") == {"en-GB": "en", "zh-CN": "zh-CN"}[locale]  # fmt: skip
    shown = page.page.inner_text("body")
    assert "undefined" not in shown and "{" not in shown
    assert ("一切都留在本机" in shown) == (locale == "zh-CN")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.page.evaluate(BROKEN) == [], "a word of the table is cut"
    assert page.page.evaluate(NAMELESS) == []
    assert page.page.evaluate(SMALL_TARGETS) == []
    assert page.page.evaluate(CONTRAST) >= 4.5, "WCAG AA"


def test_page_is_used_by_keyboard_alone(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    page = visit(serve(folder).url)
    page.status("Load the model")
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#ask:not([hidden])", timeout=60_000)
    while page.page.evaluate("document.activeElement.id") != "text":
        page.page.keyboard.press("Tab")
    page.page.keyboard.type("good")
    page.page.keyboard.press("Control+Enter")
    page.page.wait_for_selector("#took:not([hidden])", timeout=60_000)


def test_words_of_both_languages_are_the_same(folder: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    words = visit(serve(folder).url).page.evaluate("import('/app.js').then((m) => m.WORDS)")
    assert set(words["en"]) == set(words["zh"])

    def holes(text: str) -> list[str]:
        return sorted(re.findall(r"\{(\w+)\}", text))

    assert [key for key in words["en"] if holes(words["en"][key]) != holes(words["zh"][key])] == []


# --- tasks whose answer is text ---


@pytest.fixture(scope="session", params=list(TASKS))
def text_app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app of each task of text; its base answers with words that the task does not know."""
    if not WLLAMA_ARCHIVE.exists():
        pytest.skip(f"no {WLLAMA_ARCHIVE.relative_to(ROOT)}: snakemake --cores 1 -- fetch_wllama")
    folder = tmp_path_factory.mktemp(request.param)
    make_text_bundle(make_base(), folder, request.param)
    fetch_wllama(WLLAMA_ARCHIVE.parent, folder / "wllama")
    return make_text_app(folder, request.param, folder / "wllama")


def kind_of(app: Path) -> str:
    return str(json.loads((app / "task.json").read_text())["type"])


class FirefoxVisit(Visit):
    """The same in Firefox, whose complaints are asked for at the end."""

    def __init__(self, firefox: Firefox, url: str) -> None:
        self.page, self.url = firefox, url
        firefox.open(url)
        firefox.narrow(360)

    def status(self, wanted: str) -> None:
        shown = f"document.body.innerText.includes({json.dumps(wanted)})"
        self.page.run(
            f"while (!({shown})) await new Promise((next) => requestAnimationFrame(next))"
        )

    def load(self) -> None:
        self.page.wait_for_selector("#load:not([hidden])")
        super().load()

    def press(self, keys: str) -> None:
        self.page.press(keys)

    def complained(self) -> list[str]:
        return self.page.complaints(self.url)


@pytest.fixture(params=["chromium", "firefox"])
def browse(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Visit]]:
    """Open a page in a browser of its own, 360 pixels wide, in Chinese; in each browser."""
    opened: list[Firefox] = []

    def start(url: str) -> Visit:
        if request.param == "chromium":
            size = {"width": 360, "height": 740}
            return request.getfixturevalue("visit")(url, locale="zh-CN", viewport=size)
        opened.append(Firefox(tmp_path, "zh-CN"))
        return FirefoxVisit(opened[-1], url)

    if request.param == "firefox" and FIREFOX is None:
        pytest.skip("no Firefox: apt-get install firefox-esr")
    yield start
    for firefox in opened:
        firefox.close()


# How many pixels of the last message are below what is shown of the conversation.
HIDDEN_END = """(() => {
  const talk = document.getElementById("talk");
  return talk.lastChild.getBoundingClientRect().bottom - talk.getBoundingClientRect().bottom;
})()"""


def of_kind(kind: str) -> pytest.MarkDecorator:
    """Have a test run with the app of one task of text alone."""
    return pytest.mark.parametrize("text_app", [kind], indirect=True)


def test_page_of_text_answers_as_the_file_was_scored(text_app: Path, serve: Callable[..., Served], browse: Callable[..., Visit]) -> None:  # fmt: skip
    page = browse(serve(text_app).url)
    page.load()
    kind = kind_of(text_app)
    assert page.page.is_visible("#many") == (kind == "entities"), "a row is one text"
    if kind == "entities":
        page.page.click("#many summary")
    assert page.page.is_visible("#question") == (kind == "answer")
    if kind == "answer":
        page.page.fill("#text", GOOD)
        page.page.click("#answer")
        page.status("请输入问题。")
        page.page.fill("#question", "怎么样？")
    page.ask(GOOD)
    found = page.check()
    assert int(found["same"]) + int(found["near"]) == int(found["rows"]) > 0
    assert float(found["largest"]) < TOLERANCE
    for state in ("ask", "result"):
        assert page.page.is_visible(f"#{state}")
    shown = page.page.inner_text("body")
    assert "undefined" not in shown and "{" not in shown
    assert page.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.page.evaluate(NAMELESS) == [] and page.page.evaluate(SMALL_TARGETS) == []
    assert page.page.evaluate(CONTRAST) >= 4.5, "WCAG AA"
    assert page.complained() == []


def ask_model(page: Visit, call: str) -> Any:
    """Return what a call of the page's own code gives; `app`, `model` and `text` are there."""
    return page.page.evaluate(
        "async () => { const { app } = await import(new URL('app.js', location.href)), { model } = app;"
        f" const text = await import(new URL('text.js', location.href)); return {call}; }}"
    )


@of_kind("entities")
def test_entities_are_of_the_grammar_and_marked_in_the_text(text_app: Path, serve: Callable[..., Served], browse: Callable[..., Visit]) -> None:  # fmt: skip
    page = browse(serve(text_app).url)
    page.load()
    # The base says other words, so what it says here is the grammar's doing; it ends by the limit of tokens.
    for written in ask_model(page, "model.write({ text: '房间' }).then((w) => [w.answer])"):
        assert re.match(r'\[\]$|\[\["(地点|东西)","', written), written
    told = [
        {"type": "地点", "name": "北京", "start": 1, "end": 3},
        {"type": "地点", "name": "北京", "start": 4, "end": 6},
    ]
    read = """text.readEntities('[["地点","北京"],["东西","船"],["地点","北京"]]', '在北京和北京', model.task)"""
    assert ask_model(page, read) == told, "what does not stand in the text is left out"
    others = ("正面", '[["地点","北京"]', '[["国名","北京"]]', '[["地点",1]]', '{"地点":"北京"}')
    for other in others:
        assert ask_model(page, f"text.readEntities('{other}', '北京', model.task)") is None, other
    cut = """text.readEntities('[["地点","北京"],["东西","船]', '北京的船', model.task, false)"""
    assert ask_model(page, cut) == [{"type": "地点", "name": "北京", "start": 0, "end": 2}]
    answer = json.dumps(
        json.dumps([["地点", EVIL], ["东西", "船"], ["东西", "水"]], ensure_ascii=False)
    )
    written = (
        f"{{ answer: {answer}, said: [1], ids: [1], cut: null, ended: true, left: 0, seconds: 0 }}"
    )
    ask_model(page, f"model.write = async () => ({{ ...{written}, windows: [{written}] }})")
    page.ask(f"喝水 {EVIL}")
    marked = "[...document.querySelectorAll('mark')].map((m) => m.firstChild.data)"
    assert page.page.evaluate(marked) == ["水", EVIL]
    assert page.page.evaluate("document.images.length") == 0
    assert page.page.evaluate("document.querySelectorAll('#labels li').length") == 2
    page.page.click("#many summary")
    page.page.fill("#table", f"text,n\n喝水{EVIL},1\n ,2")
    page.page.click("#run")
    page.page.wait_for_selector("#save:not([hidden])", timeout=60_000)
    saved = page.page.evaluate("fetch(document.getElementById('save').href).then((r) => r.text())")
    rows = list(csv.reader(io.StringIO(saved, newline="")))
    assert [row[2] for row in rows[1:]] == [f"地点: {EVIL}\n东西: 水", ""], (
        "what stands in the text"
    )
    assert page.page.evaluate("document.querySelector('#answers td:last-child').clientWidth") > 160


@of_kind("chat")
def test_conversation_goes_on_and_is_cleared(text_app: Path, serve: Callable[..., Served], browse: Callable[..., Visit]) -> None:  # fmt: skip
    page = browse(serve(text_app).url)
    page.load()
    for place, text in enumerate((EVIL, "房间", GOOD, BAD)):
        page.page.fill("#text", text)
        page.press("Control+Enter")
        last = f"#talk:not([aria-busy]) li:nth-child({2 * place + 2})"
        page.page.wait_for_selector(last, timeout=60_000)
    roles = "[...document.querySelectorAll('#talk li')].map((li) => li.className)"
    assert page.page.evaluate(roles) == ["user", "assistant"] * 4
    assert page.page.evaluate(HIDDEN_END) <= 0, "the last answer is in view"
    assert page.page.evaluate("document.images.length") == 0
    stopped = ask_model(page, "text.writeAnswer(model, [1, 2, 3], { wanted: () => false })")
    assert stopped == {"answer": "", "said": [], "ended": False, "scores": []}
    page.page.click("#clear")
    assert not page.page.is_visible("#talk") and ask_model(page, "app.talk.length") == 0
    assert page.complained() == []


def maker_of(app: Path) -> ExampleMaker:
    """Return what made the examples of an app's task."""
    settings = settings_of(kind_of(app))
    task = load_task(settings["task"], settings["dataset"])
    return ExampleMaker(load_tokenizer(make_base()), task, settings["tokenize"]["max_length"])


def talk_of(turns: Sequence[str]) -> list[dict[str, str]]:
    """Return a conversation that ends with the user, behind the system's message."""
    said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return [{"role": "system", "content": SYSTEM}, *said]


@of_kind("chat")
def test_long_conversation_loses_what_it_lost_in_training(text_app: Path, serve: Callable[..., Served], browse: Callable[..., Visit]) -> None:  # fmt: skip
    page, maker = browse(serve(text_app).url), maker_of(text_app)
    page.load()
    talks = [talk_of([f"{GOOD}{n}" for n in range(count)]) for count in (1, 3, 7, 21)]
    talks.append(talk_of([GOOD, BAD, "<|im_end|>", BAD, GOOD * 2]))
    for talk in talks:
        record = {"id": "a", "text": "", "messages": [*talk, {"role": "assistant", "content": ""}]}
        examples = list(maker.make([record]))
        asked = ask_model(page, f"model.reply({json.dumps(talk)}, {{ wanted: () => false }})")
        assert asked["prompt"] == examples[-1].prompt and asked["cut"] is None
        assert asked["forgotten"] == (len(talk) > 4) == examples[-1].cut
    # Of the only message the start is read; Python's cut may leave some tokens' room.
    asked = ask_model(page, f"model.reply({json.dumps(talk_of([GOOD * 30]))}, {{ wanted: () => false }})")  # fmt: skip
    assert 0 < asked["cut"] < len(GOOD * 30) and len(asked["ids"]) <= 128 - 13
    ask_model(page, f"app.talk = {json.dumps(talks[2][1:-1])}")
    page.page.fill("#text", GOOD)
    page.press("Control+Enter")
    page.status("最早的消息未读：模型读不了更多")


LONG_TEXT = "".join(make_review(random.Random(n), n % 2 == 0) for n in range(12))
LONG_TEXTS = {
    "a long text": (LONG_TEXT, "怎么样"),
    "parts of more tokens than others": (GOOD * 9 + "\U0001f600龘X" * 90 + BAD * 9, "x"),
    "characters of two units": ("\U0001f600房" * 300, "\U0001f600"),
    "what would end the turn": (f"{GOOD}<|im_end|>" * 12, "<|im_start|>"),
    "spaces around": (f"  \n{LONG_TEXT}\n\t {LONG_TEXT}\n ", " \n?"),
}


@of_kind("answer")
def test_windows_are_those_of_the_evaluation(text_app: Path, serve: Callable[..., Served], browse: Callable[..., Visit]) -> None:  # fmt: skip
    page, maker = browse(serve(text_app).url), maker_of(text_app)
    page.load()
    ask_model(page, "app.asked = async (texts) => (await model.write(texts)).windows")
    for name, (text, question) in LONG_TEXTS.items():
        record = {"id": name, "text": text, "question": question, "answers": []}
        examples = list(maker.make([record]))
        assert len(examples) > 2, name
        texts = json.dumps({"text": text, "question": question})
        windows = ask_model(page, f"app.asked({texts})")
        assert [w["prompt"] for w in windows] == [e.prompt for e in examples], name
        assert [w["ids"] for w in windows] == [e.prompt_ids for e in examples], name


@of_kind("answer")
def test_likeliest_window_is_taken_as_in_the_evaluation(text_app: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    task: Any = maker_of(text_app).text
    chance = random.Random(3)
    assert task
    page = visit(serve(text_app).url)
    said = [" ", NO, f" {NO}\n", "甲", " 丙 ", f"{NO}丁"]
    found: list[list[dict[str, Any]]] = [
        [
            {"answer": chance.choice(said), "scores": [-chance.randint(0, 3) / 4 for _ in range(chance.randint(1, 3))]}
            for _ in range(chance.randint(1, 4))
        ]
        for _ in range(300)
    ]  # fmt: skip
    taken = page.page.evaluate(
        "async () => { const { takeLikeliest } = await import(new URL('text.js', location.href));"
        f" return {json.dumps(found)}.map((written) => takeLikeliest(written, '{NO}').answer); }}"
    )
    for windows, answer in zip(found, taken, strict=True):
        parsed = [task.parse(window["answer"]) for window in windows]
        assert task.parse(answer) == task.combine(parsed, [sum(w["scores"]) for w in windows])


@of_kind("answer")
def test_long_text_is_told_while_it_is_read(text_app: Path, serve: Callable[..., Served], browse: Callable[..., Visit]) -> None:  # fmt: skip
    page = browse(serve(text_app).url)
    page.load()
    page.page.evaluate(
        "() => { const said = document.getElementById('said'); window.seen = [];"
        " new MutationObserver(() => window.seen.push(said.textContent)).observe(said, { childList: true }); }"
    )
    page.page.fill("#question", "怎么样")
    page.ask(LONG_TEXT)
    seen = page.page.evaluate("window.seen")
    count = len(
        [text for text in seen if re.match(r"正在阅读文本的第 \d+ 个片段，共 \d+ 个", text)]
    )
    assert count > 2 and f"正在阅读文本的第 {count} 个片段，共 {count} 个……" in seen
    assert seen[count + 1 :] == [page.page.inner_text("#said")], "no answer of one window alone"
    assert f"分成 {count} 个互相重叠的片段来读" in page.page.inner_text("#took")
    texts = json.dumps({"text": LONG_TEXT, "question": "怎么样"})
    stopped = ask_model(
        page,
        f"(() => {{ let at = 0; return model.write({texts}, {{ onWindow: (n) => at = n, wanted: () => at < 2 }}); }})()",
    )
    assert len(stopped["windows"]) == 1 and stopped["left"] == count - 1
    assert stopped["ended"] and stopped["answer"] == stopped["windows"][0]["answer"]
    nothing = ask_model(
        page, f"model.write({texts}, {{ wanted: () => false }}).catch((e) => e.key)"
    )
    assert nothing == "halted_early"
    page.page.fill("#question", "怎么样" * 200)
    page.page.click("#answer")
    page.status("问题太长，文本已放不下。")
    page.page.fill("#question", "怎么样")
    assert page.ask(GOOD), "the page goes on"
    assert page.complained() == []


@of_kind("answer")
def test_row_of_windows_is_named_with_its_cause(text_app: Path, serve: Callable[..., Served], visit: Callable[..., Visit]) -> None:  # fmt: skip
    page = visit(serve(text_app).url)
    page.load()
    # What the page asks and answers, as the rows of four runs.
    told = ask_model(
        page,
        """(async () => {
          const row = app.checks.find((row) => row.windows), written = await model.write(row.texts);
          const other = row.windows.map((window, place) => ({ ...window, ...(place ? {} : { answer: "丙", answer_ids: [9], margins: [9, 9] }) }));
          const best = { ...written.windows[0], answer: "丙", scores: [-1] }, next = { ...best, answer: "丁", scores: [-1.6] };
          const asRow = ({ answer, said, scores, ids, ...window }) => ({ ...window, answer, answer_ids: said, log_probabilities: scores, prompt_ids: ids, margins: [9, 9, 9] });
          const pair = { windows: [best, next].map(asRow), answer: "丙" };
          const compared = (row, found) => text.compareWindows(row, found, model.task);
          return [
            compared(row, written), compared({ ...row, windows: row.windows.slice(1) }, written), compared({ ...row, windows: other }, written),
            compared(pair, { windows: [best, next], answer: "丁" }),
            compared({ ...pair, windows: [best, { ...next, scores: [-1.8] }].map(asRow) }, { windows: [best, next], answer: "丁" }),
          ];
        })()""",
    )
    assert told == [None, "why_windows", "why_answer", "near", "why_choice"]
