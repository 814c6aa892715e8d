"""Sources in turn, transfers that are cut or stall, and that nothing else is asked."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import ROOT, run_program
from fetch_model import fetch_model
from loopback_hub import COMMIT, LoopbackHub, serve
from pockettune.common.checksums import sha256
from pockettune.sources import hub as hub_module

NAME = "somebody/tiny"
MODEL = {"name": NAME, "revision": COMMIT, "path": None}
WEIGHTS = "model.safetensors"


@pytest.fixture(params=["huggingface", "modelscope"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def hubs(tiny_model: Path, tmp_path: Path) -> Iterator[list[LoopbackHub]]:
    """Three hubs, each with its own copy of the same model."""
    with ExitStack() as stack:
        copies = [Path(shutil.copytree(tiny_model, tmp_path / f"copy-{n}")) for n in range(3)]
        yield [stack.enter_context(serve(copy, NAME)) for copy in copies]


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let programs reach this machine only; the returned file lists what else they tried."""
    log = tmp_path / "network"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/no_network"))
    monkeypatch.setenv("NO_NETWORK", "loopback")
    monkeypatch.setenv("NO_NETWORK_LOG", str(log))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return log


def fetch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *sources: str,
    stall: float = 30, pins: dict[str, str] | None = None, **model: object,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run fetch_model.py as its rule does."""
    monkeypatch.setenv("POCKETTUNE_MODEL_SHA256", json.dumps(pins or {}))
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", " ".join(sources))
    monkeypatch.setenv("POCKETTUNE_STALL_SECONDS", str(stall))
    return run_program("fetch_model.py", "--settings", json.dumps({"model": MODEL | model}), "--downloads",
                       folder / "downloads", "--output", folder / "model", "--log", folder / "log")  # fmt: skip


def closed(protocol: str) -> str:
    """Return a source where nobody listens."""
    with serve(Path(), NAME) as hub:
        return hub.entry(protocol)


def bytes_asked(hub: LoopbackHub) -> list[int]:
    """Return where each transfer of the weights began."""
    return [int(line.split()[-1]) for line in hub.ranges if line.startswith(WEIGHTS)]


def sizes(folder: Path) -> set[int]:
    """Return how long the files of a folder are in which files come and go."""
    found = set()
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.add(path.stat().st_size)
    return found


def test_first_down_second_damaged_third_good(
    protocol: str, hubs: list[LoopbackHub], guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    _, second, third = hubs
    second.damage.add("config.json")
    down = closed(protocol)
    entries = [down, second.entry("modelscope"), third.entry(protocol)]
    result = fetch(tmp_path, monkeypatch, *entries)
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    told = [line for line in lines if "; trying " in line]
    assert len(told) == 2, lines
    assert told[0].startswith(f"{down}: ") and told[0].endswith(f"; trying {entries[1]}")
    assert told[1].startswith(f"{entries[1]}: config.json was damaged on the way: its checksum is ")
    log = (tmp_path / "log").read_text()
    assert all(line in log for line in told)
    for path in (tmp_path / "model").iterdir():
        assert path.name == "source.json" or sha256(path) == sha256(third.folder / path.name)
    assert not guard.exists(), guard.read_text()


def test_what_a_failed_source_delivered_is_not_fetched_again(
    protocol: str, hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = hubs
    size = (first.folder / WEIGHTS).stat().st_size
    first.cuts[WEIGHTS] = [size // 2, *[0] * 10]
    result = fetch(tmp_path, monkeypatch, first.entry("huggingface"), second.entry(protocol),
                   stall=3)  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert bytes_asked(first) == [0] + [size // 2] * 4, "four times in a row without a byte"
    assert bytes_asked(second) == [size // 2], "the second sends the other half alone"
    assert f"4 times in a row; {size // 2:,} of {size:,} bytes have come" in result.stdout
    assert sha256(tmp_path / "model" / WEIGHTS) == sha256(second.folder / WEIGHTS)


def test_whole_file_of_a_failed_source_is_kept(
    protocol: str, hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = hubs
    first.damage.add("tokenizer.json")  # after the weights
    monkeypatch.setattr(hub_module, "WORKERS", 1)
    entries = first.address, second.entry(protocol)
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", " ".join(entries))
    fetch_model(MODEL, tmp_path / "downloads", tmp_path / "model")
    assert bytes_asked(first) == [0] and bytes_asked(second) == []


def test_wrong_half_of_another_source_does_not_spoil_a_right_one(
    protocol: str, hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = hubs
    content = (first.folder / WEIGHTS).read_bytes()
    half = len(content) // 2
    monkeypatch.setattr(first, "content", lambda file: b"x" * len(content) if file == WEIGHTS
                        else (first.folder / file).read_bytes())  # fmt: skip
    first.cuts[WEIGHTS] = [half, *[0] * 10]
    entries = first.entry(protocol), second.entry(protocol)
    result = fetch(tmp_path, monkeypatch, *entries, stall=3)
    assert result.returncode == 0, result.stdout
    assert bytes_asked(second) == [half, 0]
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == content


@pytest.mark.parametrize("trouble", ["cuts", "stalls"])
def test_interrupted_transfer_goes_on_where_it_stopped(
    trouble: str, protocol: str, hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    hub = hubs[0]
    getattr(hub, trouble)[WEIGHTS] = [100_000, 0, 200_000, None]
    result = fetch(tmp_path, monkeypatch, hub.entry(protocol), stall=2)
    assert result.returncode == 0, result.stdout
    assert bytes_asked(hub) == [0, 100_000, 100_000, 300_000], "no byte twice"
    assert sha256(tmp_path / "model" / WEIGHTS) == sha256(hub.folder / WEIGHTS)


def test_source_that_stalls_has_failed_after_a_few_times(
    protocol: str, hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = hubs
    first.stalls[WEIGHTS] = [0] * 20
    entries = first.entry(protocol), second.entry(protocol)
    result = fetch(tmp_path, monkeypatch, *entries, stall=2)
    assert result.returncode == 0, result.stdout
    assert f"{entries[0]}: {WEIGHTS}: no byte for 2 s, 4 times in a row" in result.stdout
    assert len(bytes_asked(first)) == 4 and bytes_asked(second) == [0]


def test_killed_download_goes_on(
    protocol: str, hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hubs[0]
    hub.stalls[WEIGHTS] = [123_456]
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.entry(protocol))
    command = [sys.executable, str(ROOT / "scripts/fetch_model.py"), "--settings",
               json.dumps({"model": MODEL}), "--downloads", str(tmp_path / "downloads"),
               "--output", str(tmp_path / "model")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    partials = tmp_path / "downloads" / f"models--somebody--tiny@{COMMIT}" / ".partial"
    while 123_456 not in sizes(partials):
        assert process.poll() is None
    process.kill()
    process.wait()
    result = fetch(tmp_path, monkeypatch, hub.entry(protocol))
    assert result.returncode == 0, result.stdout
    assert bytes_asked(hub) == [0, 123_456]


def test_all_sources_failed_is_one_line_with_each_reason(
    hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = hubs
    first.damage.add("config.json")
    second.revisions.clear()
    third.revisions.remove(COMMIT)
    down = closed("huggingface")
    entries = [first.address, second.address, third.entry("modelscope"), down]
    result = fetch(tmp_path, monkeypatch, *entries)
    assert result.returncode == 2
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    places = [line.index(f"{entry}: ") for entry in entries]
    assert places == sorted(places)
    for part in ("config.json was damaged on the way", "404", "it does not know the commit",
                 "Ways on: hub.sources", "model.path", "offline bundle"):  # fmt: skip
        assert part in line
    assert not (tmp_path / "model").exists()


def test_pinned_weights_hold_whichever_answers(
    hubs: list[LoopbackHub], guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another hub's commit may stand for the pinned one where the weights' checksum is known."""
    first, second, third = hubs
    digest = sha256(third.folder / WEIGHTS)
    for hub in (first, second):  # honest about weights that are others
        content = bytearray((hub.folder / WEIGHTS).read_bytes())
        content[-1] ^= 1
        (hub.folder / WEIGHTS).write_bytes(content)
    third.revisions.remove(COMMIT)
    entries = [first.address, second.entry("modelscope"), third.entry("modelscope")]
    result = fetch(tmp_path, monkeypatch, *entries, pins={WEIGHTS: digest})
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("these are not the pinned weights; trying") == 2
    assert "does not know the commit" in result.stdout
    assert bytes_asked(first) == bytes_asked(second) == [], "told before a byte of it is fetched"
    assert sha256(tmp_path / "model" / WEIGHTS) == digest
    assert not guard.exists(), guard.read_text()


def test_every_file_of_weights_in_parts_is_pinned(
    hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hubs[0]
    second = hub.folder / "model-2.safetensors"
    shutil.copy(hub.folder / WEIGHTS, second)
    digest = sha256(second)
    result = fetch(tmp_path, monkeypatch, hub.address, pins={WEIGHTS: digest})
    assert result.returncode == 2
    assert f"pins {WEIGHTS}, its weights are model-2.safetensors: {digest}" in result.stdout
    pins = {WEIGHTS: digest, second.name: digest}
    assert fetch(tmp_path, monkeypatch, hub.address, pins=pins).returncode == 0


def test_mirror_with_another_commit_is_left(
    hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hubs[0].revisions.add("f" * 40)
    result = fetch(tmp_path, monkeypatch, hubs[0].address, revision="f" * 40)
    assert (
        result.returncode == 2 and f"it answers with the commit {COMMIT} instead" in result.stdout
    )


def test_files_of_a_failed_source_that_the_next_has_not_are_left_out(
    hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = hubs
    (first.folder / "extra.json").write_text("{}")
    first.cuts[WEIGHTS] = [0] * 20
    entries = first.address, second.address
    result = fetch(tmp_path, monkeypatch, *entries, stall=3)
    assert result.returncode == 0, result.stdout
    assert any(line.startswith("extra.json") for line in first.ranges)
    assert not (tmp_path / "model/extra.json").exists()


def test_second_run_waits_for_the_first(
    hubs: list[LoopbackHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs share resources/downloads: each file is fetched once, and both end well."""
    hub = hubs[0]
    hub.stalls[WEIGHTS] = [1000]
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.address)
    monkeypatch.setenv("POCKETTUNE_STALL_SECONDS", "2")
    tasks = json.dumps({"model": MODEL})
    command = [sys.executable, str(ROOT / "scripts/fetch_model.py"), "--settings", tasks,
               "--downloads", str(tmp_path / "downloads"), "--output"]  # fmt: skip
    runs = [
        subprocess.Popen([*command, str(tmp_path / name)], stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    told = [process.communicate()[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], told
    assert sum("another run is at model" in text for text in told) == 1
    for name in ("one", "two"):
        assert sha256(tmp_path / name / WEIGHTS) == sha256(hub.folder / WEIGHTS)


def test_dataset_comes_from_its_source_alone(
    protocol: str, guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for split in ("train", "validation", "test"):
        (repository / f"{split}.csv").write_text("text,label\n好,1\n差,0\n")
    settings = {
        "dataset": {"name": NAME, "revision": COMMIT, "files": None, "split": None, "subset": None,
                    "splits": None, "unlabelled": "refuse", "bad_rows": "refuse", "text_column": "text", "label_column": "label"},
        "task": {"type": "classification", "system": "", "prompt": "{text}", "labels": {"0": "差", "1": "好"}, "template_options": {}},
    }  # fmt: skip
    with serve(repository, NAME) as hub:
        monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.entry(protocol))
        result = run_program("fetch_dataset.py", "--settings", json.dumps(settings), "--downloads",
                             tmp_path / "downloads", "--audit", tmp_path / "out/audit.json")  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert not guard.exists(), guard.read_text()


@pytest.mark.parametrize(
    ("name", "model", "dataset"),
    [
        ("model.safetensors", True, True),
        ("sub/LICENSE", True, True),
        ("LICENSE.txt", True, True),
        ("LICENSE.py", False, False),
        ("LICENSE.bin", False, False),
        ("data.json", True, True),
        ("data.jsonl.gz", False, True),
        ("data/train.csv.gz", False, True),
        ("texts.zip", False, True),
        ("code.py.gz", False, False),
        ("model.tar.gz", False, False),
        ("a.pkl", False, False),
        ("pytorch_model.bin", False, False),
        ("loader.py", False, False),
    ],
)
def test_which_files_are_fetched(name: str, model: bool, dataset: bool) -> None:
    assert (hub_module.is_safe(name, "model"), hub_module.is_safe(name, "dataset")) == (
        model,
        dataset,
    )
