"""A full disk, on small file systems in memory: one line, nothing left, the next call finishes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import CONVERTER, LINEAGE, ROOT, copy_checkout, run_program, run_snakemake
from loopback_hub import serve
from merge_adapter import merge_adapter
from pockettune.common import disk, program
from pockettune.common.checksums import sha256
from pockettune.common.errors import DiskFullError
from pockettune.data.prompts import write_examples
from pockettune.data.records import write_records
from pockettune.evaluation.intervals import compare_changes
from pockettune.evaluation.verdict import judge
from pockettune.gguf.files import describe_file
from pockettune.gguf.importance import Inputs, write_importance
from pockettune.training import checkpoints
from test_hub import NAME, model_settings
from test_merge import make_adapter
from test_teacher import SETTINGS, TEXTS
from test_train import make_example, settings, write_tokens
from tokenize_dataset import tokenize_dataset
from train_adapter import train_adapter

SMALL, LARGE = 400 * 1024, 8 * 1024 * 1024  # bytes; the tiny model is of 2.6 MB, Q4_K_M of 0.8 MB

Result = subprocess.CompletedProcess[str]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of SMALL bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """Take all but `left` bytes of a file system."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - left))
    return filler


def run_patched(patch: str, name: str, *arguments: str | Path) -> Result:
    """Run a program of scripts/ after a line of Python."""
    module = name.removesuffix(".py")
    code = f"import {module} as it; from pockettune.common import disk; {patch}; it.main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_unchecked(name: str, *arguments: str | Path) -> Result:
    """Run a program for which the check finds room that something else takes afterwards."""
    return run_patched("disk.require_space = lambda *_: None", name, *arguments)


def the_error(text: str) -> str:
    """Return the only line that tells an error."""
    lines = [line for line in text.splitlines() if "error:" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    assert "Traceback" not in text, text
    return lines[0].removeprefix("error: ")


def numbers(line: str) -> list[int]:
    """Return the numbers of bytes that an error names, in its order."""
    return [int(n.replace(",", "")) for n in re.findall(r"\(([\d,]+) bytes\)", line)]


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def sources(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, and all that is made of it where there is room."""
    folder = tmp_path_factory.mktemp("sources")
    merge_adapter(tiny_model, make_adapter(tiny_model, folder / "adapter"), folder / "merged")
    for name, options in steps(tiny_model, folder).items():
        if name != "merge_adapter.py":
            output = folder / OUTPUTS[name]
            result = run_program(name, *options, "--output", output)
            assert result.returncode == 0, result.stdout
    return folder


OUTPUTS = {"fetch_model.py": "model", "shrink_model.py": "base", "merge_adapter.py": "merged", "convert_model.py": "f16.gguf",
           "quantize_model.py": "q4_k_m.gguf"}  # fmt: skip


def steps(model: Path, folder: Path) -> dict[str, list[str | Path]]:
    """Return each program's options but --output and --log."""
    origin = {"name": None, "revision": None, "path": str(model)}
    return {
        "fetch_model.py": ["--settings", json.dumps({"model": origin}), "--downloads", folder / "x"],
        "shrink_model.py": ["--base", folder / "model", "--keep", "1"],
        "merge_adapter.py": ["--base", model, "--adapter", folder / "adapter"],
        "convert_model.py": ["--model", folder / "merged", "--converter", CONVERTER,
                             "--settings", LINEAGE],
        "quantize_model.py": ["--settings", '{"type": "Q4_K_M"}', "--threads", "1",
                              "--source", folder / "f16.gguf"],
    }  # fmt: skip


@pytest.mark.parametrize("run", [run_program, run_unchecked], ids=["refused", "full in mid-work"])
@pytest.mark.parametrize("name", list(OUTPUTS))
def test_full_disk_is_one_line_and_with_room_the_same_call_finishes(
    name: str, run: Callable[..., Result], small: Path, tiny_model: Path, sources: Path
) -> None:
    output = small / OUTPUTS[name]
    options = [*steps(tiny_model, sources)[name], "--output", output, "--log", small / "logs/log"]
    result = run(name, *options)
    assert result.returncode == 2
    line = the_error(result.stdout)
    if run is run_program:
        assert line.startswith(f"{output} needs ")
        assert line.endswith(f" are free in {small}: make room and run again")
        needed, free = numbers(line)
        assert free == SMALL
    else:
        assert line.startswith(f"disk full while writing {output}: ")
        assert line.endswith(f" free in {small}: make room and run again")
        needed, written, free = numbers(line)
        assert written + free <= SMALL < needed  # safetensors removes its half itself
    assert contents(small) == ["logs"], "nothing half-written is left"

    resize(small, LARGE)
    result = run_program(name, *options)
    assert result.returncode == 0, result.stdout
    made = tiny_model if name == "fetch_model.py" else sources / OUTPUTS[name]
    if output.is_dir():
        assert sha256(output / "model.safetensors") == sha256(made / "model.safetensors")
        assert (output / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    else:
        assert sha256(output) == sha256(made)
    size = disk.used_bytes(output)
    assert 0.98 * size < needed <= size, "never more than it takes"
    manifest = [f"{output.name}.sha256"] if output.is_dir() else []
    assert contents(small) == sorted(["logs", output.name, *manifest])


def test_quantizing_is_refused_by_what_the_recipe_makes(small: Path, sources: Path) -> None:
    """To the byte, but for what llama.cpp adds to the metadata: a disk short by that it notices itself."""
    output, exact = small / "q4_k_m.gguf", (sources / "q4_k_m.gguf").stat().st_size
    options = [*steps(sources, sources)["quantize_model.py"], "--output", output]
    for short in range(1, 5):
        resize(small, (exact // 4096 + 1 - short) * 4096)
        result = run_program("quantize_model.py", *options)
        assert result.returncode == 2
        assert numbers(the_error(result.stdout))[0] == pytest.approx(exact, abs=200)
        assert contents(small) == []
    resize(small, (exact // 4096 + 1) * 4096)
    assert run_program("quantize_model.py", *options).returncode == 0
    assert describe_file(output) == describe_file(sources / "q4_k_m.gguf")


@pytest.mark.parametrize(
    ("source", "run"),
    [("huggingface", run_program), ("huggingface", run_unchecked), ("modelscope", run_unchecked)],
    ids=["refused", "full in mid-work", "ModelScope, full in mid-work"],
)
def test_download_goes_on_when_there_is_room(
    source: str,
    run: Callable[..., Result],
    small: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve(tiny_model, NAME) as hub:
        monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", f"{hub.entry(source)} {hub.address}")
        options = ("--settings", json.dumps({"model": model_settings()}),
                   "--downloads", small / "downloads", "--output", small / "model",
                   "--log", small.with_name("log"))  # fmt: skip
        result = run("fetch_model.py", *options)
        assert result.returncode == 2
        assert "; trying " not in result.stdout, "another source would need as much room"
        line = the_error(result.stdout)
        known = disk.used_bytes(tiny_model)
        if run is run_unchecked:
            assert "disk full while writing" in line and " needed, " in line
            assert numbers(line)[0] == known > SMALL > numbers(line)[-1]
        else:
            assert numbers(line) == [known, SMALL]
        assert not (small / "model").exists()
        # Room for one copy: the files are not stored twice.
        resize(small, known + 60_000)
        result = run_program("fetch_model.py", *options)
        assert result.returncode == 0, result.stdout
    assert [name for name in contents(small / "downloads") if not name.endswith(".lock")] == []
    assert sha256(small / "model/model.safetensors") == sha256(tiny_model / "model.safetensors")


@pytest.mark.parametrize("check", ["pass", "disk.require_space = lambda *_: None"],
                         ids=["refused", "full in mid-work"])  # fmt: skip
def test_report(check: str, small: Path, tmp_path: Path) -> None:
    page, html, card = tmp_path / "page", small / "report.html", small / "card.md"
    page.write_text("{{ text }}")
    files = ("metrics", "flips", "parity", "speed", "audit", "tokens", "adapter", "base",
             "benchmarks")  # fmt: skip
    options: list[str | Path] = ["--settings", "{}", "--templates", page, page, "--html", html, "--card", card,
               *[option for name in files for option in (f"--{name}", "x")]]  # fmt: skip
    content = "it.gather = lambda *_: {'text': '好' * 30_000}"
    filler = fill(small, left=50_000)
    result = run_patched(f"{content}; {check}", "write_report.py", *options)
    assert result.returncode == 2
    line = the_error(result.stdout)
    assert f"{html} needs " in line if check == "pass" else f"writing {html}: " in line
    assert numbers(line)[0] == 90_000
    assert contents(small) == ["filler"]
    filler.unlink()
    result = run_patched(content, "write_report.py", *options)
    assert result.returncode == 0, result.stdout
    assert html.read_text() == card.read_text() == "好" * 30_000


def scoring_options(model: Path, folder: Path) -> list[str | Path]:
    """Write a dataset and texts without a label; return the options of score_teacher.py."""
    splits = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    for path in splits.values():
        rows = [{"id": f"{path.stem}-{n}", "text": TEXTS[n], "label": label}
                for n, label in enumerate(("正面", "负面"))]  # fmt: skip
        write_records(path, rows)
    tokenize_dataset(SETTINGS, model, splits, folder / "tokens")
    texts = folder / "more.txt"
    texts.write_text("".join(f"{text}{n}\n" for n in range(20) for text in TEXTS))
    return ["--settings", json.dumps(SETTINGS), "--base", model, "--teacher", model, "--threads", "1",
            "--tokens", folder / "tokens", "--splits", *splits.values(), "--texts", texts]  # fmt: skip


def trimming_options(model: Path, folder: Path) -> list[str | Path]:
    """Write a dataset and its tokens; return the options of trim_vocabulary.py."""
    scoring_options(model, folder)
    settings = {**SETTINGS, "vocabulary": {"keep": "task", "scripts": [], "frequent": 0}}
    splits = [x for split in ("train", "test") for x in (f"--{split}", folder / f"{split}.jsonl")]
    return ["--settings", json.dumps(settings), "--model", model, "--tokens", folder / "tokens", *splits]  # fmt: skip


def choosing_options(sources: Path, folder: Path) -> list[str | Path]:
    """Write what choose_file.py and write_leaderboard.py read of one file; return the former's options."""
    stage = {"size_bytes": 1, "metric": "accuracy", "score": 0.9, "interval": [0.8, 1.0], "n": 9, "stored": {},
             "against_f16": compare_changes(0, 0, 9), "verdict": judge(compare_changes(0, 0, 9), 0.005)}  # fmt: skip
    rate = {"mean": 1.0}
    speed = folder / "speed/q4_k_m.json"
    program.write_json(
        folder / "metrics.json", {"stages": {"f16": {"score": 0.9}, "q4_k_m": stage}}
    )
    program.write_json(speed, {"prompt": rate, "generation": rate, "resident_bytes": 1})
    return ["--settings", '{"choose": null, "evaluate": {"margin": 0.005}}', "--speed", speed,
            "--metrics", folder / "metrics.json", "--files", sources / "q4_k_m.gguf"]  # fmt: skip


def leaderboard_options(sources: Path, folder: Path) -> list[str | Path]:
    names = [f"rank-{n}" for n in range(9)]
    for name in names:
        choosing_options(sources, folder / name)
    members = [{"name": name, "changed": {"train.rank": name}, "current": True} for name in names]
    program.write_json(folder / "members.json", members)
    return ["--members", folder / "members.json", "--template", ROOT / "report/leaderboard.html.j2"]


# What a run may have besides, by what it leaves when it is through.
BESIDES = {
    "score_teacher.py": ["teacher", "teacher.sha256"],
    "measure_importance.py": ["importance.gguf"],
    "trim_vocabulary.py": ["trimmed", "trimmed.sha256", "vocabulary.json"],
    "choose_file.py": ["best.gguf", "best.json"],
    "write_leaderboard.py": ["leaderboard.csv", "leaderboard.html"],
}


@pytest.mark.parametrize("name", list(BESIDES))
def test_what_not_every_run_makes(
    name: str, small: Path, tiny_model: Path, sources: Path, tmp_path: Path
) -> None:
    outputs = [small / output for output in BESIDES[name]]
    writers: dict[str, Callable[[], list[str | Path]]] = {
        "score_teacher.py": lambda: [*scoring_options(tiny_model, tmp_path), "--output", outputs[0]],
        "measure_importance.py": lambda: [
            "--model", sources / "merged", "--tokens", write_tokens(tmp_path / "tokens"),
            "--threads", "1", "--output", outputs[0],
        ],
        "trim_vocabulary.py": lambda: [
            *trimming_options(tiny_model, tmp_path), "--output", outputs[0], "--vocabulary", outputs[2],
        ],
        "choose_file.py": lambda: [
            *choosing_options(sources, tmp_path), "--gguf", outputs[0], "--json", outputs[1],
        ],
        "write_leaderboard.py": lambda: [
            *leaderboard_options(sources, tmp_path), "--csv", outputs[0], "--html", outputs[1],
        ],
    }  # fmt: skip
    options = writers[name]()
    filler = fill(small, left=8192)
    result = run_unchecked(name, *options)
    assert result.returncode == 2
    assert the_error(result.stdout).startswith(f"disk full while writing {outputs[0]}: ")
    assert contents(small) == ["filler"]
    if name == "choose_file.py":
        line = the_error(run_program(name, *options).stdout)
        assert line.startswith(f"{outputs[0]} needs ")
        size = numbers(line)[0]
        assert size == (sources / "q4_k_m.gguf").stat().st_size
        filler.unlink()
        resize(small, LARGE)
        # Room for the file, and none for why it is that one.
        filler = fill(small, left=4096 * (size // 4096 + 1))
        assert "disk full" in the_error(run_program(name, *options).stdout)
        assert contents(small) == ["filler"]
    filler.unlink()
    resize(small, LARGE)
    result = run_program(name, *options)
    assert result.returncode == 0, result.stdout
    assert contents(small) == BESIDES[name]


@pytest.mark.parametrize("check", ["pass", "disk.require_space = lambda *_: None"],
                         ids=["refused", "full in mid-work"])  # fmt: skip
def test_answers_over_the_whole_vocabulary(
    check: str, small: Path, sources: Path, tmp_path: Path
) -> None:
    """500 rows of 512 tokens, 16-bit: 512 kB. Mapped memory ended the process there in silence."""
    reference, tokens = small / "f16.npy", write_tokens(tmp_path / "tokens")
    write_examples(
        tokens / "test.arrow", [replace(make_example(n), prompt="情感：") for n in range(500)]
    )
    scored = {**settings(), "evaluate": {"split": "test", "limit": None, "greedy_rows": 0}}
    options = ("--settings", json.dumps(scored), "--tokens", tokens, "--threads", "1",
               "--model", sources / "f16.gguf", "--write-reference", reference, "--reference",
               "--metrics", tmp_path / "f16.json", "--predictions", tmp_path / "x.parquet")  # fmt: skip
    patch = f"it.main = lambda: it.stages.run('', it.open_gguf); {check}"
    result = run_patched(patch, "evaluate_gguf.py", *options)
    assert result.returncode == 2, result.stdout
    line = the_error(result.stdout)
    assert f"{reference} needs " in line if check == "pass" else f"writing {reference}: " in line
    assert numbers(line)[0] == 512_000
    assert contents(small) == [] and not (tmp_path / "f16.json").exists()
    resize(small, LARGE)
    result = run_patched(patch, "evaluate_gguf.py", *options)
    assert result.returncode == 0, result.stdout
    assert np.load(reference).shape == (500, 512)


# --- training ---


def test_former_checkpoint_outlives_a_full_disk(small: Path) -> None:
    checkpoints.save_checkpoint(small, {"weights": torch.ones(10)})
    with pytest.raises(DiskFullError, match=r"disk full while writing .*checkpoint\.pt: "):
        checkpoints.save_checkpoint(small, {"weights": torch.ones(200_000)})
    saved = checkpoints.load_checkpoint(small, "cpu")
    assert saved is not None and torch.equal(saved["weights"], torch.ones(10))
    assert contents(small) == [checkpoints.FILE]


def test_training_goes_on_without_checkpoints(
    small: Path, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(small, left=20_000)
    tokens, output = write_tokens(tmp_path / "tokens"), tmp_path / "adapter"
    with caplog.at_level("INFO", logger="pockettune"):
        train_adapter(settings(epochs=1), tiny_model, tokens, 1, small, output, save_every=0)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 4, "one an update"
    assert all("going on without a new checkpoint: disk full while writing" in t for t in told)
    assert (output / "adapter_model.safetensors").exists()


def test_stopping_without_room_for_a_checkpoint_is_an_error(
    small: Path, tiny_model: Path, tmp_path: Path
) -> None:
    fill(small, left=20_000)
    process = subprocess.Popen(
        [
            sys.executable, ROOT / "scripts/train_adapter.py",
            "--settings", json.dumps(settings(epochs=40)), "--base", tiny_model,
            "--tokens", write_tokens(tmp_path / "tokens"), "--threads", "1", "--scratch", small,
            "--save-every", "0", "--output", tmp_path / "adapter",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    next(line for line in process.stdout if "going on without a new checkpoint" in line)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate()
    assert process.returncode == 2
    assert the_error(rest).startswith("disk full while writing")
    assert "goes on from there" not in rest


def test_adapter_is_refused_before_training(small: Path, tiny_model: Path, tmp_path: Path) -> None:
    filler, output = fill(small, left=20_000), small / "adapter"
    tokens, scratch = write_tokens(tmp_path / "tokens"), tmp_path / "scratch"
    with pytest.raises(DiskFullError, match="adapter needs"):
        train_adapter(settings(epochs=1), tiny_model, tokens, 1, scratch, output)
    filler.unlink()
    train_adapter(settings(epochs=1), tiny_model, tokens, 1, scratch, output)
    assert disk.used_bytes(output) > 20_000


# --- what libraries raise ---


def save_tensors(path: Path) -> None:
    save_file({"x": torch.ones(200_000)}, path)


def save_text(path: Path) -> None:
    path.write_text("x" * 800_000)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": save_text,
    "safetensors": save_tensors,
    "torch": lambda path: torch.save({"x": torch.ones(200_000)}, path),
    "numpy": lambda path: np.ones(200_000).tofile(path),
    "gguf": lambda path: write_importance(path, {"x": Inputs(np.ones(200_000), 1)}, [[1]]),
    "arrow": lambda path: write_examples(path, (make_example(n) for n in range(20_000))),
}


@pytest.mark.parametrize("writer", list(WRITERS))
def test_every_librarys_error_is_understood(writer: str, small: Path) -> None:
    (small / "output").write_text("before")
    with (
        pytest.raises(
            DiskFullError, match=r"disk full while writing .*output: .* written, .* free"
        ),
        program.staged(small / "output") as partial,
    ):
        WRITERS[writer](partial)
    assert (small / "output").read_text() == "before"
    assert contents(small) == ["output"]


def test_other_errors_on_a_full_disk_stay_what_they_are(small: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="5 requested"), program.staged(tmp_path / "roomy"):
        raise OSError("5 requested and 2 written")
    fill(small)
    with pytest.raises(RuntimeError, match="a bug"), program.staged(small / "x"):
        raise RuntimeError("a bug")
    with pytest.raises(FileNotFoundError), program.staged(small / "x"):
        (tmp_path / "absent").read_text()


def test_log_on_a_full_disk_is_lost_in_silence(small: Path, tmp_path: Path, sources: Path) -> None:
    fill(small)
    options = steps(sources, sources)["quantize_model.py"]
    result = run_program("quantize_model.py", *options, "--output", tmp_path / "q4_k_m.gguf",
                         "--log", small / "log")  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert len(result.stdout.splitlines()) == 1, result.stdout


# --- as a rule ---


def test_rule_fails_in_one_line_and_finishes_with_room(
    small: Path, tiny_model: Path, tmp_path: Path
) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    (checkout / "resources/models").symlink_to(small)
    run = {"model": {"path": str(tiny_model)}}
    (checkout / "runs/small.yaml").write_text(json.dumps(run))
    command = ("--configfile", "runs/small.yaml", "--until", "fetch_model", "--", "results/tokens")
    result = run_snakemake(checkout, *command)
    assert result.returncode != 0
    lines = {line for line in result.stdout.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1 and " needs 2.6 MB" in lines.pop(), result.stdout
    assert contents(small) == []
    resize(small, LARGE)
    result = run_snakemake(checkout, *command)
    assert result.returncode == 0, result.stdout
    model, manifest = sorted(small.iterdir())
    assert f"{sha256(model / 'config.json')}  config.json" in manifest.read_text().splitlines()
    assert sha256(model / "model.safetensors") == sha256(tiny_model / "model.safetensors")
