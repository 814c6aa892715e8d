"""score computes what was scored, the program fits the processor, and a device that fails is told of."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import stand_in_adbd
from conftest import ARCHIVE, ROOT, run_program, run_snakemake
from pockettune.common.errors import UserError
from pockettune.phone import devices
from pockettune.phone.compiling import PROCESSORS, compile_programs
from pockettune.phone.results import compare, summarize
from pockettune.phone.selection import choose_program
from pockettune.runtimes.llama import LlamaModel
from quantize_model import quantize_model
from test_workflow import edit_config, planned

SOURCES = ROOT / "scripts/pockettune/phone"
PROGRAMS = ROOT / "resources/phone"
RELEASE = llama_cpp.__version__
LABELS = ("负面", '正"<img onerror>')
A53 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
A76 = A53 + " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
A710 = A76 + " sve svei8mm i8mm bf16"


def cpuinfo(*cores: str) -> str:
    """Return /proc/cpuinfo of cores with these features."""
    return "".join(
        f"processor\t: {n}\nFeatures\t: {core}\nCPU part\t: 0xd05\n\n"
        for n, core in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("cores", "name"),
    [([A53], "armv8-a"), ([A76], "dotprod"), ([A710, A710], "i8mm"), ([A76, A53], "armv8-a"), ([], "armv8-a"),
     ([A53 + " svei8mm asimddpx"], "armv8-a"), ([A53 + " i8mm"], "armv8-a"), ([A53 + " asimddp"], "armv8-a"), ([A710, A76], "dotprod")],
)  # fmt: skip
def test_program_is_of_what_all_cores_have(cores: list[str], name: str) -> None:
    assert choose_program("aarch64\n", cpuinfo(*cores)) == name


@pytest.mark.parametrize("machine", ["armv7l", "x86_64", ""])
def test_other_machine_is_refused(machine: str) -> None:
    with pytest.raises(UserError, match="64-bit system on ARM"):
        choose_program(machine, cpuinfo(A76))


# ---- a stand-in for adb and ssh; the program that is sent to it is a shell script


def make_rows() -> list[dict[str, Any]]:
    scores = [(-0.1, -3.0), (-2.0, -0.2), (-0.6, -0.9)]
    return [
        {"id": f"test-{n}", "message": 'a "prompt_ids": [7', "prompt": "p", "prompt_ids": [1, 2],
         "labels": {word: {"ids": [at], "log_probability": score} for at, (word, score) in enumerate(zip(LABELS, pair, strict=True))},
         "answer": LABELS[pair[0] < pair[1]]}
        for n, pair in enumerate(scores)
    ]  # fmt: skip


def phase(tokens: int, seconds: float) -> dict[str, Any]:
    return {"tokens": tokens, "seconds": seconds, "watts": 2.0, "joules_a_token": 0.1}


def printed(rows: list[dict[str, Any]], **scores: tuple[float, float]) -> dict[str, Any]:
    """Return what score prints, with other scores for some rows."""
    found = [
        {"id": row["id"],
         "labels": dict(zip(LABELS, scores.get(row["id"][5:].join(["r", ""]), [x["log_probability"] for x in row["labels"].values()]), strict=True))}
        for row in rows
    ]  # fmt: skip
    rounds = [{"prompt": phase(60, s), "generation": phase(64, s), "watts_at_rest": 1.0, "celsius": [None, None]} for s in (1, 2, 4)]  # fmt: skip
    return {"rows": found, "rounds": rounds, "threads": 4, "load_seconds": 0.1, "peak_memory_bytes": 1e8,
            "repacked_mib": 0.5, "kernels": "CPU : NEON = 1"}  # fmt: skip


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with bundle, programs and device; adb and ssh on the path lead to the device."""
    for name in ("bundle", "programs", "device", "bin"):
        (tmp_path / name).mkdir()
    rows = make_rows()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "bundle/conformance.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "bundle/model.gguf").write_bytes(b"GGUF" * 1000)
    answer_with(tmp_path, printed(rows))
    for client in ("adb", "ssh"):
        path = tmp_path / "bin" / client
        text = (ROOT / "tests/stand_in_device.py").read_text()
        path.write_text(text.replace("/usr/bin/env python3", sys.executable, 1))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("DEVICE", str(tmp_path / "device"))
    monkeypatch.setenv("CPUINFO", cpuinfo(A76))
    return tmp_path


def answer_with(folder: Path, told: dict[str, Any]) -> None:
    """Let the program on the device print this."""
    text = json.dumps(told, ensure_ascii=False)
    script = f'#!/bin/sh\ntest -s "$1" -a -s "$2" || exit 3\ncat <<\'E\'\n{text}\nE\n'
    (folder / "programs/score-dotprod").write_text(script, encoding="utf-8")


@pytest.mark.parametrize("options", [[], ["--host", "pi@board"]])
def test_processor_that_has_less_than_it_says_is_told(phone: Path, options: list[str]) -> None:
    (phone / "programs/score-dotprod").write_text("#!/bin/sh\nkill -ILL $$\n")
    assert "Illegal instruction" in one_line(run_phone(phone, *options))
    assert not (phone / "phone.json").exists()


def run_phone(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_program("run_on_phone.py", "--bundle", folder / "bundle", "--programs", folder / "programs",
                       "--output", folder / "phone.json", *options)  # fmt: skip


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the error of a program that ended as for a user's mistake."""
    assert result.returncode == 2 and "Traceback" not in result.stdout, result.stdout
    return result.stdout.partition("error: ")[2]


@pytest.mark.parametrize("options", [[], ["--host", "pi@board"]])
def test_rows_are_replayed_on_the_device(phone: Path, options: list[str]) -> None:
    result = run_phone(phone, *options)
    assert result.returncode == 0, result.stdout
    told = json.loads((phone / "phone.json").read_text())
    assert told["comparison"] == {
        "rows": 3,
        "right": 3,
        "near": [],
        "wrong": {},
        "largest_difference": 0.0,
    }
    assert told["device"]["program"] == "dotprod" and told["median"]["prompt_tokens_per_s"] == 30
    calls = (phone / "device/calls").read_text()
    assert calls.count("model.gguf.partial") > 1
    assert run_phone(phone, *options).returncode == 0
    again = (phone / "device/calls").read_text().removeprefix(calls)
    assert "model.gguf.partial" not in again, "the same file is not sent twice"


def test_other_answer_is_told_and_a_close_one_may_change(phone: Path) -> None:
    rows = make_rows()
    answer_with(phone, printed(rows, r0=(-3.0, -0.1), r2=(-0.9, -0.6)))
    assert "1 rows are answered otherwise" in one_line(run_phone(phone))
    told = json.loads((phone / "phone.json").read_text())["comparison"]
    assert (told["near"], told["wrong"]) == (["test-2"], {"test-0": LABELS[1]})
    assert told["largest_difference"] == pytest.approx(2.9)


def test_bundle_of_text_is_refused(phone: Path) -> None:
    (phone / "bundle/conformance.jsonl").write_text('{"id": "test-0", "answer": "x"}\n')
    assert "is of a task whose answers are text" in one_line(run_phone(phone))
    assert not (phone / "phone.json").exists() and not list((phone / "device").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [("lost", "sending score-dotprod failed (error: device 'R58N' not found)"), ("full", "No space left"),
     ("cut", "did not arrive"), ("lost-running", "not found")],
)  # fmt: skip
@pytest.mark.parametrize("options", [[], ["--host", "pi@board"]])
def test_device_that_fails_is_one_line(
    phone: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str, options: list[str]
) -> None:
    monkeypatch.setenv("FAULT", fault)
    assert words in one_line(run_phone(phone, *options))
    assert not (phone / "phone.json").exists()
    monkeypatch.delenv("FAULT")
    assert run_phone(phone, *options).returncode == 0, "and the next run mends it"


@pytest.mark.parametrize(
    ("states", "words"),
    [("none", "USB debugging"), ("unauthorized", "answer its question"), ("device device", "SERIAL=R58N"), ("offline", "is offline")],
)  # fmt: skip
def test_no_device_says_how_to_get_there(
    phone: Path, monkeypatch: pytest.MonkeyPatch, states: str, words: str
) -> None:
    monkeypatch.setenv("STATE", states)
    assert words in one_line(run_phone(phone, "--look"))


def test_serial_number_names_one_of_two(phone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "device device")
    assert run_phone(phone, "--serial", "R58N1").returncode == 0
    assert "-s R58N1 shell" in (phone / "device/calls").read_text()


def test_no_adb_says_how_to_get_there(phone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (phone / "bin/adb").unlink()
    monkeypatch.setenv("PATH", str(phone / "bin"))
    assert "make phone HOST=" in one_line(run_phone(phone, "--look"))


def test_silent_device_is_not_waited_for(phone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "silent")
    monkeypatch.setattr(devices, "ANSWER_SECONDS", 1)
    device = devices.Device("R58N", ("adb", "-s", "R58N", "shell"), "/data/local/tmp/pockettune")
    with pytest.raises(UserError, match="gave no answer to uname in 1 s"):
        device.run("uname -m", seconds=devices.ANSWER_SECONDS)


def test_host_is_no_option_of_ssh(phone: Path) -> None:
    assert "not user@host" in one_line(run_phone(phone, "--host=-oProxyCommand=true"))
    assert not (phone / "device/calls").exists()


# ---- the real adb, with a stand-in at the other end of its wire


@pytest.fixture
def wire(phone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a phone that the real adb can reach, its server one of the test's own."""
    (phone / "bin/adb").unlink()
    if shutil.which("adb") is None:
        pytest.skip("needs adb")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("HOME", str(phone))  # for its key
    with stand_in_adbd.serve(phone / "device") as port:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            adb("kill-server")


def adb(*arguments: str) -> str:
    # Its server keeps what it inherits open, so no pipe.
    result = subprocess.run(["adb", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60)  # fmt: skip
    return result.stdout


def test_adb_pushes_and_runs(phone: Path, wire: str) -> None:
    adb("start-server")
    assert "connected" in adb("connect", wire)
    (phone / "bundle/model.gguf").write_bytes(bytes(range(256)) * 20_000)  # many messages
    result = run_phone(phone)
    assert result.returncode == 0, result.stdout
    told = json.loads((phone / "phone.json").read_text())
    assert told["comparison"]["right"] == 3
    assert told["device"] == {"name": wire, "model": "Pixel 6", "program": "dotprod"}
    sent = phone / "device/pockettune/model.gguf"
    assert sent.read_bytes() == (phone / "bundle/model.gguf").read_bytes()
    assert "model.gguf is there already" in run_phone(phone).stdout


@pytest.mark.parametrize(
    ("fault", "words"),
    [("lost", "sending score-dotprod failed (adb: error: failed to copy"),
     ("lost-running", "was the device lost"),  # adb shell ends with 0 then
     ("full", "remote No space left on device")],
)  # fmt: skip
def test_adb_that_loses_the_phone_is_one_line(
    phone: Path, wire: str, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    adb("start-server")
    adb("connect", wire)
    monkeypatch.setenv("FAULT", fault)
    assert words in one_line(run_phone(phone))
    assert not (phone / "phone.json").exists()
    monkeypatch.delenv("FAULT")
    adb("disconnect", wire)
    adb("connect", wire)
    assert run_phone(phone).returncode == 0, "and the next run mends it"


def test_adb_of_a_phone_that_has_not_allowed_it(
    phone: Path, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adb("start-server")
    monkeypatch.setenv("FAULT", "unauthorized")
    adb("connect", wire)
    told = one_line(run_phone(phone, "--look"))
    assert re.match(f"{wire} is (unauthorized|authorizing): unlock the phone", told), told


# ---- the program itself


def test_what_is_not_told_stays_unknown() -> None:
    told = printed(make_rows())
    told["rounds"][1]["prompt"]["joules_a_token"] = None
    medians = summarize(json.dumps(told))["median"]
    assert medians["prompt_joules_a_token"] is None and medians["generation_joules_a_token"] == 0.1
    with pytest.raises(UserError, match="before its last word"):
        summarize('{"rows": [')
    told["rows"][0]["labels"][LABELS[0]] = None
    with pytest.raises(UserError, match="no number"):
        compare(make_rows(), told["rows"])


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """score.cpp for this machine, with llama-cpp-python's own library."""
    compiler, library = shutil.which("c++"), Path(llama_cpp.__file__).parent / "lib"
    if compiler is None or not ARCHIVE.exists() or not list(library.glob("libllama.so")):
        pytest.skip("needs a C++ compiler, the source release and llama-cpp-python's library")
    folder = tmp_path_factory.mktemp("score")
    root = f"{ARCHIVE.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    wanted = (f"{root}include/", f"{root}ggml/include/")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, [m for m in archive if m.name.startswith(wanted)], filter="data")
    include = [f"-I{folder / root / name}" for name in ("include", "ggml/include")]
    built = subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", SOURCES / "score.cpp", *include, f"-L{library}",
         "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{library}", "-pthread", "-o", folder / "score"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    return folder / "score"


def replay(command: list[str | Path], folder: Path, rounds: int = 1) -> dict[str, Any]:
    """Run a score program on a bundle."""
    files = [folder / "model.gguf", folder / "conformance.jsonl"]
    result = subprocess.run([*command, *files, "1", str(rounds), "0"], capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    measured = summarize(result.stdout)
    return {**measured, "found": measured["rows"], **compare(read_rows(folder), measured["rows"])}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "conformance.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_score_computes_what_was_scored(score: Path, bundle: Path) -> None:
    told = replay([score], bundle)
    assert told["right"] + len(told["near"]) == told["rows"] == 50
    assert told["largest_difference"] < 0.05, "the same library"
    tokens = sum(len(row["prompt_ids"]) for row in read_rows(bundle))
    assert told["rounds"][0]["prompt"]["tokens"] == tokens


def test_labels_of_several_tokens_and_odd_texts(score: Path, bundle: Path, tmp_path: Path) -> None:
    """A label's score is its tokens' sum, and no text is taken for the file's own words."""
    first = read_rows(bundle)[0]
    ids = [label["ids"][0] for label in first["labels"].values()]
    labels = {
        'a\\"b": {"ids": [1]': {"ids": ids, "log_probability": -1.0},
        LABELS[1]: {"ids": ids[:1], "log_probability": -0.5},
    }
    odd = first | {
        "message": '"prompt_ids": [9], "answer": "x"',
        "labels": labels,
        "answer": LABELS[1],
    }
    longer = odd | {"prompt_ids": [*first["prompt_ids"], ids[0]],
                    "labels": {"next": {"ids": ids[1:2], "log_probability": -1.0}}, "answer": "next"}  # fmt: skip
    shutil.copyfile(bundle / "model.gguf", tmp_path / "model.gguf")
    lines = [json.dumps(row, ensure_ascii=False) for row in (odd, longer)]
    (tmp_path / "conformance.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (several, one), (then,) = (list(row["labels"].values()) for row in replay([score], tmp_path)["found"])  # fmt: skip
    assert several == pytest.approx(one + then, abs=0.02)


@pytest.mark.parametrize(
    ("rows", "words"),
    [("", "no rows"), ('{"id": "a"}\n', "without prompt_ids"),
     ('{"id": "a", "prompt_ids": [99999999], "labels": {"x": {"ids": [1], "log_probability": -1}}, "answer": "x"}\n', "another model"),
     ('{"id": "a", "prompt_ids": [x], "labels": {}}\n', "not numbers")],
)  # fmt: skip
def test_wrong_rows_are_one_line(
    score: Path, bundle: Path, tmp_path: Path, rows: str, words: str
) -> None:  # fmt: skip
    (tmp_path / "rows").write_text(rows)
    result = subprocess.run(
        [score, bundle / "model.gguf", tmp_path / "rows"], capture_output=True, text=True
    )
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1


# ---- the programs for ARM, each on a processor that it was made for


@pytest.fixture(scope="module")
def emulator() -> str:
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if found is None:
        pytest.skip("needs qemu-aarch64 (Debian: qemu-user)")
    return found


@pytest.fixture(scope="module")
def programs(emulator: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What build_phone makes; with POCKETTUNE_BUILD_PHONE set, made now, which takes minutes."""
    if not os.environ.get("POCKETTUNE_BUILD_PHONE"):
        if not PROGRAMS.exists():
            pytest.skip("needs resources/phone: snakemake build_phone, or POCKETTUNE_BUILD_PHONE=1")
        return PROGRAMS
    folder = tmp_path_factory.mktemp("built") / "phone"
    result = run_program("build_phone.py", "--version", RELEASE, "--downloads", ARCHIVE.parent,
                         "--threads", "2", "--output", folder)  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    return folder


@pytest.fixture(scope="module", params=["Q4_0", "IQ4_NL"])
def four_bits(
    request: pytest.FixtureRequest, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle's rows beside the small run's model in 4 bits, as llama.cpp scores it here."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = {"type": request.param, "pure": False}
    quantize_model(recipe, bundle.parent / "f16.gguf", 1, folder / "model.gguf")
    rows = read_rows(bundle)
    with LlamaModel(folder / "model.gguf", 1) as model:
        for row, logits in zip(rows, model.next_token_logits([row["prompt_ids"] for row in rows]), strict=True):  # fmt: skip
            scores = logits - np.logaddexp.reduce(logits.astype(np.float64))
            for label in row["labels"].values():
                label["log_probability"] = float(scores[label["ids"][0]])
            row["answer"] = max(row["labels"], key=lambda w: row["labels"][w]["log_probability"])
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "conformance.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "processor"),
    [("armv8-a", "cortex-a53"), ("dotprod", "cortex-a76"), ("i8mm", "max")],
)
def test_programs_score_under_emulation(
    name: str, processor: str, emulator: str, programs: Path, four_bits: Path
) -> None:
    told = replay([emulator, "-cpu", processor, programs / f"score-{name}"], four_bits, rounds=0)
    assert told["right"] + len(told["near"]) == told["rows"] == 50
    assert told["largest_difference"] < 0.02
    assert (told["repacked_mib"] > 0) == (name != "armv8-a")


@pytest.mark.parametrize("four_bits", ["Q4_0"], indirect=True)  # i8mm has no kernel for IQ4_NL
@pytest.mark.parametrize(("name", "processor"), [("dotprod", "cortex-a53"), ("i8mm", "cortex-a76")])
def test_program_of_a_newer_processor_dies(
    name: str, processor: str, emulator: str, programs: Path, four_bits: Path
) -> None:
    """So /proc/cpuinfo must be asked."""
    program, model = programs / f"score-{name}", four_bits / "model.gguf"
    files: list[str | Path] = [program, model, four_bits / "conformance.jsonl"]
    command = [emulator, "-cpu", processor, *files, "1", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == -signal.SIGILL


def test_words_of_the_programs_rebuild_them_and_no_run_does(finished_run: Path) -> None:
    target = ("--configfile", "runs/other.yaml", "--", "build_phone")
    resources, run = finished_run / "resources", finished_run / "runs/other.yaml"
    (resources / "phone").mkdir()
    for name in ("phone.sha256", "phone.tsv"):
        (resources / name).write_text("x")
    shutil.copyfile(finished_run / "runs/small.yaml", run)
    assert run_snakemake(finished_run, "--touch", *target).returncode == 0
    assert planned(finished_run, *target) == {}
    other = {"pathvars": {"results": "results/other"}, "train": {"rank": 4}}
    edit_config(lambda config: config.update(other), "runs/other.yaml")(finished_run)
    assert planned(finished_run, *target) == {}, "one for all runs"
    for name in ("score.cpp", "rows.h", "meters.h", "compiling.py"):
        path = finished_run / "scripts/pockettune/phone" / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert planned(finished_run, *target) == {"build_phone": 1}, name
        path.write_bytes(before)
        assert run_snakemake(finished_run, "--touch", *target).returncode == 0
    run.unlink()
    shutil.rmtree(resources / "phone")
    for name in ("phone.sha256", "phone.tsv"):
        (resources / name).unlink()


ZIG = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in *broken.c*) echo "note: x" >&2; echo "broken.c:1: error: no such thing" >&2; exit 1;; esac
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


def test_kernels_alone_are_compiled_for_each_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    for file in ("src/llama.cpp", "src/models/a.cpp", "ggml/src/ggml.c", "ggml/src/ggml-cpu/quants.c",
                 "ggml/src/ggml-cpu/arch/arm/quants.c", "score.cpp"):  # fmt: skip
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).touch()
    zig = tmp_path / "zig"
    zig.write_text(ZIG)
    zig.chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    arguments = (zig, source, source / "score.cpp", work, tmp_path, 1, RELEASE)
    compile_programs(*arguments)
    calls = (tmp_path / "log").read_text().splitlines()
    for name, processor in PROCESSORS.items():
        assert (tmp_path / f"score-{name}").read_text() == "made\n"
        compiled = [call for call in calls if f"-mcpu={processor} -O3" in call]
        assert len(compiled) == 2 and all("quants.c" in call for call in compiled)
        (linked,) = [call for call in calls if call.endswith(f"-o {tmp_path}/score-{name}")]
        objects = re.findall(r"\S+\.o\b", linked)
        assert len(objects) == len(set(objects)) == 4 + 2, "no two of one name"
    assert sum("-O1" in call for call in calls) == 4, "the rest once"
    (source / "ggml/src/broken.c").touch()
    with pytest.raises(UserError, match=r"could not compile broken.c: broken.c:1: error: no such thing"):  # fmt: skip
        compile_programs(*arguments)
