"""scripts/check_machine.py: what it says of machines, networks and configs that are well or not."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT, SECRET, copy_checkout, run_snakemake
from loopback_hub import COMMIT, LoopbackHub, _Handler, serve
from pockettune.common import limits
from pockettune.common.disk import used_bytes
from pockettune.machine import (
    checks,
    estimate,
    hardware,
    models,
    network,
    probe,
    quantized,
    report,
    rows,
    shape,
    slurm,
    software,
    storage,
)
from pockettune.machine import run as runs
from pockettune.machine.findings import Finding, Once, TooLateError, side_by_side
from pockettune.machine.run import Run
from pockettune.runtimes import processor

NAME = "somebody/tiny"
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "num_hidden_layers": 24,
    "tie_word_embeddings": True,
}
OF_QWEN = shape.Shape(shape.tensors_of(QWEN) or (), "config.json")
# No connection is made; what asks for one hears that there is no network.
NO_NETWORK = """
import errno, socket
def refuse(*_, **__): raise OSError(errno.ENETUNREACH, "Network is unreachable")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""


def make_run(**changes: Any) -> Run:
    """Return a run of config.yaml with some keys changed, which asks nothing of this machine."""
    from snakemake.utils import update_config

    config = runs.load_config(ROOT, [])
    update_config(config, changes)
    run = Run(ROOT, config, end=time.monotonic() + 60)
    run.facts |= {
        "torch": Once(lambda: probe.Answer({"torch": "2.13.0", "cuda_build": None, "device": "cpu", "gpus": [],
                                            "cpu": {"architecture": "x86_64", "avx2": True, "avx512_bf16": True},
                                            "bitsandbytes": {"matmul": 0.0, "storage": 0.09, "gradient": 0.0}})),
        "shape": Once(lambda: OF_QWEN),
        "rows": Once(lambda: None),
        "replies": Once(lambda: network.ask_all(run)),
    }  # fmt: skip
    return run


def doctor(*arguments: str | Path, folder: Path = ROOT, **environment: str) -> tuple[int, str]:
    """Run the program; return exit status and output. It may take as long as a busy machine needs."""
    done = subprocess.run(
        [sys.executable, folder / "scripts/check_machine.py", "--seconds", "120", *arguments],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


# --- The whole program ---


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("doctor") / "pocket tune")


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python finds no network."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    return {"PYTHONPATH": str(tmp_path)}


def test_demo_needs_no_network_and_nothing_is_written(
    checkout: Path, offline: dict[str, str]
) -> None:
    before = listing(checkout)
    status, output = doctor(
        "--json", "--configfile", checkout / "runs/demo.yaml", folder=checkout, **offline
    )
    document = json.loads(output)
    assert listing(checkout) == before
    assert (status, document["state"]) in ((0, "ok"), (0, "warning")), output
    told = {finding["name"] for finding in document["findings"]}
    assert told >= {*checks.OF_THE_MACHINE, *checks.OF_THE_RUN}
    assert document["configfiles"] == ["config.yaml", "runs/demo.yaml"]
    assert all(
        set(f) == {"name", "state", "detail", "remedy", "bytes"} for f in document["findings"]
    )
    assert str(checkout) not in output


def test_real_job_without_a_network_cannot_work(checkout: Path, offline: dict[str, str]) -> None:
    status, output = doctor(folder=checkout, **offline)
    assert status == 1
    assert "Network is unreachable" in output and "model.path, dataset.files" in output
    sources = yaml.safe_load((ROOT / "config.yaml").read_text())["hub"]["sources"]
    for source in sources:
        assert f"problem  source {source}" in output
    told = f"The run cannot work as it is: {len(sources)} problems"
    assert output.splitlines()[-1].startswith(told)


def test_missing_packages_are_named_by_the_standard_library_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "scripts/check_machine.py"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr == ""
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("problem  packages"))
    assert "missing: snakemake, snakemake-executor-plugin-slurm, torch, " in line
    assert "pytest" not in line, "to run the workflow it is not needed"
    assert "not looked at: that needs the packages" in done.stdout


def test_bad_config_and_missing_file_are_told(tmp_path: Path) -> None:
    run = make_run(train={"rank": 0})
    (finding,) = runs.check_settings(run)
    assert finding.state == "problem" and "train.rank" in finding.detail
    run = make_run(dataset={"files": {"all": "nowhere.csv"}})
    (finding,) = runs.check_settings(run)
    assert finding.state == "problem" and "dataset.files.all" in finding.detail
    (tmp_path / "broken.yaml").write_text("a: [")
    _, findings = checks.describe_run([tmp_path / "broken.yaml"], None, 0.0)
    assert [f.state for f in findings] == ["problem"] and "broken.yaml" in findings[0].detail


def test_what_is_slow_or_breaks_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Run) -> list[Finding]:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(
        checks, "OF_THE_MACHINE", {"slow": lambda _: time.sleep(30), "broken": fail}
    )
    begun = time.monotonic()
    found = checks.examine(Run(ROOT, end=time.monotonic() + 0.2), [])
    assert time.monotonic() - begun < 20
    assert states(found) == {"slow": "warning", "broken": "warning"}
    assert "--seconds" in found[0].remedy and "ZeroDivisionError: oh" in found[1].detail


def test_user_and_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("LOGNAME", "mimi")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/mimi"))
    text = f"{ROOT}/results of mimi in /home/mimi/x, {SECRET}, https://a:b@c.d/"
    assert report.hide_user(text) == "./results of user in ~/x, ***, https://***@c.d/"


def test_folders_are_those_of_the_rules() -> None:
    for arguments in ([], ["--configfile", "runs/demo.yaml"]):
        run = Run(ROOT, runs.load_config(ROOT, [ROOT / name for name in arguments[1:]]))
        planned = run_snakemake(ROOT, "--dry-run", "--nolock", "--forceall", *arguments).stdout
        for path in (run.base, run.converter, run.results / "f16.gguf"):
            assert re.search(rf"{re.escape(str(path.relative_to(ROOT)))}(?![\w.-])", planned)


def test_models_of_one_name_and_two_owners_have_two_folders() -> None:
    config = runs.load_config(ROOT, [])
    folders = []
    for owner in ("Qwen", "unsloth"):
        config["model"]["name"] = f"{owner}/X"
        folders.append(Run(ROOT, config).base)
    assert folders[0] != folders[1]
    assert folders[0].name == folders[1].name, "an adapter of one may be meant for its copy"


# --- Libraries that do not work ---

BROKEN = {
    "raises": ("raise ImportError('libbitsandbytes.so: no such file')", "libbitsandbytes.so"),
    "aborts": ("import os; os.abort()", "ended by SIGABRT"),
    "multiplies wrongly": (
        "from . import functional\n"
        "def matmul_4bit(a, b, state): return a @ b.float() * 1.5\n",
        "matmul off by 0.5",
    ),
}  # fmt: skip
FUNCTIONAL = """
def quantize_4bit(weight, **_): return weight, None
def dequantize_4bit(packed, state): return packed
"""


@pytest.mark.parametrize("fault", BROKEN)
def test_bitsandbytes_that_does_not_work(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, expected = BROKEN[fault]
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    (package / "functional.py").write_text(FUNCTIONAL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = probe.ask("torch", [], time.monotonic() + 120)
    assert answer.facts["device"] in ("cpu", "cuda"), "what was told before the crash counts"
    for quantization, state in (("nf4", "problem"), ("none", "warning")):
        run = make_run(train={"quantization": quantization})
        run.facts["torch"] = Once(lambda: answer)
        (finding,) = hardware.check_bitsandbytes(run)
        assert finding.state == state and expected in finding.detail, finding


def test_bitsandbytes_that_is_slow_is_not_called_broken() -> None:
    run = make_run(train={"quantization": "nf4"})
    run.facts["torch"] = Once(
        lambda: probe.Answer(
            {"device": "cpu", "bitsandbytes": None}, "did not answer in time", late=True
        )
    )
    assert states(hardware.check_bitsandbytes(run)) == {"bitsandbytes": "warning"}


def tell_in_process(
    capsys: pytest.CaptureFixture[str], work: Callable[..., None], *arguments: Any
) -> probe.Answer:
    """Ask a library in this process, in which a test may have changed something."""
    work(*arguments)
    return probe.Answer(probe._read(capsys.readouterr().out))


def test_llama_cpp_of_this_and_of_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    here = tell_in_process(capsys, probe.tell_llama_cpp)
    run.facts["llama_cpp"] = Once(lambda: here)
    (finding,) = hardware.check_llama_cpp(run)
    assert finding.state == "ok" and f"{run.converter_version}, built with " in finding.detail
    if "AVX2" not in finding.detail:
        pytest.skip("the check is of x86 processors")
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse4_2\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    other = tell_in_process(capsys, probe.tell_llama_cpp)
    run.facts["llama_cpp"] = Once(lambda: other)
    (finding,) = hardware.check_llama_cpp(run)
    assert (
        finding.state == "problem"
        and "avx2" in finding.detail
        and "GGML_NATIVE=OFF" in finding.remedy
    )


def test_llama_cpp_that_dies_is_a_problem() -> None:
    run = make_run()
    run.facts["llama_cpp"] = Once(lambda: probe.Answer({"version": "0"}, probe._failure(-4, "")))
    (finding,) = hardware.check_llama_cpp(run)
    assert finding.state == "problem" and "SIGILL" in finding.detail


GPU = {
    "name": "Card",
    "memory": 24_000_000_000,
    "free": 23_000_000_000,
    "capability": "8.6",
    "bf16": True,
}


def test_gpu_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = make_run()
    facts = {"torch": "2.13.0", "cuda_build": "12.8", "device": "cuda", "gpus": [GPU], "cpu": {}}
    run.facts["torch"] = Once(lambda: probe.Answer(facts))
    (finding,) = hardware.check_gpu(run)
    assert finding.state == "ok"
    for part in ("Card, 24 GB (23 free)", "compute capability 8.6", "bf16", "CUDA 12.8"):
        assert part in finding.detail
    # A driver that PyTorch does not use.
    put_program(tmp_path, "nvidia-smi", "echo 'Card, 570.1'")
    run.facts["torch"] = Once(
        lambda: probe.Answer(facts | {"cuda_build": None, "device": "cpu", "gpus": []})
    )
    (finding,) = hardware.check_gpu(run)
    assert (
        finding.state == "warning"
        and "driver 570.1" in finding.detail
        and "a CPU build" in finding.detail
    )
    run = make_run(train={"precision": "fp16"})
    assert states(hardware.check_gpu(run)) == {"gpu": "problem"}


def test_processor_without_bf16_or_avx2() -> None:
    run = make_run()
    known: dict[str, Any] = {"architecture": "x86_64", "avx2": True}
    run.facts["torch"] = Once(lambda: probe.Answer({"cpu": known, "device": "cpu"}))
    (finding,) = hardware.check_processor(run)
    assert finding.state == "ok" and "trains in fp32" in finding.detail
    known["avx2"] = False
    (finding,) = hardware.check_processor(run)
    assert finding.state == "warning" and "no AVX2" in finding.detail


@pytest.mark.parametrize("known", [True, False])
def test_tokenizer_is_asked_of_the_converter(known: bool, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    if not known:
        text = json.loads((folder / "tokenizer.json").read_text())
        text["pre_tokenizer"] = {"type": "Whitespace"}
        (folder / "tokenizer.json").write_text(json.dumps(text))
    run = make_run(model={"path": str(folder)})
    answer = probe.ask("tokenizer", [folder, run.converter], time.monotonic() + 120)
    run.facts["tokenizer"] = Once(lambda: answer)
    (finding,) = models.check_tokenizer(run)
    assert finding.state == ("ok" if known else "problem"), answer
    assert ("knows it as qwen2" if known else "does not know its pre-tokenizer") in finding.detail


# --- Cores, memory, disk ---


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    two = limits.ControlGroup(tmp_path / "two", tmp_path / "two/table")
    write_files(tmp_path / "two", {
        "table": "0::/slurm/job\n", "cpu.max": "max 100000\n", "slurm/cpu.max": "250000 100000\n",
        "slurm/job/cpu.max": "max 100000\n", "slurm/job/memory.max": "8000000000\n",
        "slurm/job/memory.current": "3000000000\n", "slurm/job/memory.stat": "anon 1\ninactive_file 500000000\n",
    })  # fmt: skip
    assert (two.cpu_quota(), two.free_memory()) == (2.5, 5_500_000_000)
    one = limits.ControlGroup(tmp_path / "one", tmp_path / "one/table")
    write_files(tmp_path / "one", {
        "table": "4:memory:/box\n1:cpu,cpuacct:/box\n", "cpu/box/cpu.cfs_quota_us": "150000\n",
        "cpu/box/cpu.cfs_period_us": "100000\n", "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        "memory/memory.usage_in_bytes": "1\n", "memory/box/memory.limit_in_bytes": "4000000000\n",
        "memory/box/memory.usage_in_bytes": "1000000000\n",
    })  # fmt: skip
    assert (one.cpu_quota(), one.free_memory()) == (1.5, 3_000_000_000)
    none = limits.ControlGroup(tmp_path / "none", tmp_path / "none/table")
    assert (none.cpu_quota(), none.free_memory()) == (None, None)


def test_cores_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "count_cores", lambda: limits.Cores(64, 8, 2.5))
    (finding,) = hardware.check_cores(make_run())
    assert finding.state == "warning" and "2 of the machine's 64 usable" in finding.detail
    assert "may run on 8" in finding.detail and "the time of 2.5" in finding.detail
    assert "--cores 2" in finding.remedy
    monkeypatch.setattr(limits, "count_cores", lambda: limits.Cores(8, 8, None))
    assert states(hardware.check_cores(make_run())) == {"cores": "ok"}


@pytest.mark.parametrize(
    ("free", "state"),
    [(2_000_000_000, "problem"), (4_500_000_000, "warning"), (80_000_000_000, "ok")],
)
def test_disk_is_compared_with_the_estimate(
    free: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, free))
    (finding,) = storage.check_disk(make_run())
    assert finding.state == state, finding.detail
    assert finding.items["q4_k_m.gguf"] and finding.items["logits"] is None
    assert ("make room" in finding.remedy) == (state != "ok")


@pytest.mark.parametrize(("free", "state"), [(2_000_000_000, "problem"), (64_000_000_000, "ok")])
def test_memory_is_compared_with_the_estimate(
    free: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda: free)
    (finding,) = storage.check_memory(make_run())
    assert finding.state == state
    run = make_run()
    run.profile = {"executor": "slurm"}
    (finding,) = storage.check_memory(run)
    assert finding.state == ("warning" if state == "problem" else "ok"), "the nodes may have it"


def write_hollow(folder: Path, config: dict[str, Any]) -> Path:
    """Write a base model of a shape whose file is a hole: a header, and a length that fits."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for number, tensor in enumerate(shape.tensors_of(config) or ()):
        name = f"model.layers.{tensor.layer}.{number}.{tensor.name}.weight"
        begin, end = end, end + 2 * tensor.elements
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_jobs_ask_for_memory_by_the_size_of_the_base(tmp_path: Path) -> None:
    run = make_run(model={"path": str(tmp_path / "hollow")})
    assert estimate.request(run, "check_parity") == 0, "nothing is known before the base is here"
    three = {**QWEN, "hidden_size": 2048, "intermediate_size": 11_008, "num_attention_heads": 16,
             "num_hidden_layers": 36}  # fmt: skip
    write_hollow(tmp_path / "hollow", three)
    asked = {
        name: estimate.request(run, name) / 1e9 for name in ("check_parity", "merge", "convert")
    }
    # 3.09 billion parameters: fp32, the mapped file and the GGUF file; a shard; an embedding.
    assert asked["check_parity"] == pytest.approx(1.25 * (8 * 3.086 + 0.6), rel=0.02)
    assert 3 < asked["merge"] < 5, "however many layers there are"
    assert asked["convert"] < 2


def test_memory_that_does_not_hold_fp32_is_counted_in_16_bits() -> None:
    run = make_run()
    peaks = [
        estimate.memory_items(run, OF_QWEN, None, "cpu", "bf16", free)["evaluate (PyTorch)"]
        for free in (64e9, 3e9)
    ]
    assert all(peaks)
    fits, narrow = (float(peak or 0) for peak in peaks)
    assert fits - narrow == pytest.approx(2 * OF_QWEN.parameters - 4 * 151_936 * 896, rel=0.01)


def test_gpu_has_a_line_of_its_own() -> None:
    run = make_run()
    card = GPU | {"free": 4_000_000_000}
    run.facts["torch"] = Once(lambda: probe.Answer({"device": "cuda", "gpus": [card], "cpu": {}}))
    found = {finding.name: finding for finding in storage.check_memory(run)}
    assert found["gpu memory"].state == "problem", "rows of 512 tokens, four at a time"
    assert "the dataset is not here" in found["gpu memory"].detail
    run.settings["train"]["gradient_checkpointing"] = True
    found = {finding.name: finding for finding in storage.check_memory(run)}
    assert found["gpu memory"].state == "ok"


def test_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(storage.check_folders(make_run())) == {"folders": "ok"}
    monkeypatch.setattr(os, "access", lambda path, mode: "resources" in str(path))
    (finding,) = storage.check_folders(make_run())
    assert finding.state == "problem" and "results" in finding.detail


# --- The estimate ---

# Tensors of each recipe, MB, and of untied models with the vocabulary: measured with llama.cpp at
# 0c1e570 on random weights of Qwen2.5-0.5B's shape.
TIED = {"Q8_0": 525.1, "Q6_K": 499.8, "Q5_K_M": 414.1, "Q5_K_S": 406.8, "Q4_K_M": 391.9, "Q5_0": 390.9, "Q4_K_S": 379.5,
        "Q4_1": 368.6, "Q3_K_L": 363.4, "Q3_K_M": 349.5, "IQ4_NL": 348.4, "Q4_0": 346.2, "IQ4_XS": 345.5, "IQ3_M": 336.8,
        "Q2_K": 332.7, "IQ3_S": 332.7, "Q3_K_S": 332.3, "TQ2_0": 314.3}  # fmt: skip
UNTIED = {
    "Q2_K": 415.2,
    "Q3_K_M": 432.0,
    "Q4_0": 428.7,
    "Q4_K_M": 491.4,
    "Q5_0": 490.5,
    "Q5_K_M": 522.2,
    "Q6_K": 650.4,
    "Q8_0": 675.7,
}


@pytest.mark.parametrize("recipe", TIED)
def test_quantized_size_of_a_tied_model(recipe: str) -> None:
    assert quantized.tensor_bytes(OF_QWEN, {"type": recipe}) / 1e6 == pytest.approx(
        TIED[recipe], rel=0.002
    )


@pytest.mark.parametrize("recipe", UNTIED)
def test_quantized_size_of_an_untied_model(recipe: str) -> None:
    untied = shape.Shape(shape.tensors_of(QWEN | {"tie_word_embeddings": False}) or (), "")
    vocabulary = estimate.VOCABULARY * untied.vocabulary
    assert (quantized.tensor_bytes(untied, {"type": recipe}) + vocabulary) / 1e6 == pytest.approx(
        UNTIED[recipe], rel=0.002
    )


def test_every_recipe_of_the_schema_can_be_estimated() -> None:
    schema = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text())
    types = schema["$defs"]["gguf"]["properties"]["type"]["enum"]
    for recipe in types:
        for pure in (False, True):
            size = quantized.tensor_bytes(OF_QWEN, {"type": recipe, "pure": pure})
            assert 200e6 < size < 530e6, recipe


def test_recipes_that_rows_cannot_hold_are_named_before_a_run() -> None:
    run = make_run()
    assert states(models.check_recipes(run)) == {"recipes": "ok"}
    run.settings["quantize"] = {
        "a": {"type": "Q4_K_M", "pure": True},
        "b": {"type": "IQ4_NL", "tensors": {"ffn_down": "Q3_K", "ffn_up": "Q3_K"}},
        "c": {"type": "IQ4_NL", "pure": True, "tensors": {"ffn_down": "Q3_K"}},
    }
    (finding,) = models.check_recipes(run)
    assert finding.state == "problem"
    assert finding.detail == (
        "quantize.a forces Q4_K in rows of 896; quantize.b forces Q3_K in rows of 896"
    )
    run.facts["shape"] = Once(lambda: None)
    assert states(models.check_recipes(run)) == {"recipes": "ok"}


def test_estimate_of_the_true_shape() -> None:
    """Against benchmarks/true_scale.md's files: real bytes."""
    items = estimate.disk_items(make_run(), OF_QWEN, None)
    assert items["f16.gguf"].size == pytest.approx(994_155_072, rel=0.001)
    assert items["q4_k_m.gguf"].size == pytest.approx(397_806_144, rel=0.001)
    assert items["merged"].size == pytest.approx(2 * 494_032_768, rel=0.02)
    assert estimate.trainable(make_run().settings["train"], OF_QWEN) == 4_399_104


def test_shape_of_folder_file_and_config_agree(tiny_model: Path, f16: Path) -> None:
    of_folder, of_file = shape.shape_of_folder(tiny_model), shape.shape_of_gguf(f16)
    of_config = shape.tensors_of(shape.read_config(tiny_model))
    assert (
        of_config
        and sum(t.elements for t in of_config) == of_folder.parameters == of_file.parameters
    )
    for recipe in (None, {"type": "Q4_K_M"}):
        sizes = {
            quantized.tensor_bytes(s, recipe)
            for s in (of_folder, of_file, shape.Shape(of_config, ""))
        }
        assert len(sizes) == 1
    assert shape.tensors_of({"model_type": "mamba"}) is None, "unknown is shown as unknown"


MEASURED = {
    "tokenize": "tokenize", "check_base": "check_base", "train": "train", "merge": "merge", "convert": "convert", "check_parity": "check_parity",
    "evaluate (PyTorch)": "evaluate_merged", "evaluate (llama.cpp)": "evaluate_f16",
}  # fmt: skip


def test_estimate_of_the_small_run(finished_run: Path) -> None:
    """Within a fifth of what it left on the disk, item by item; memory roughly: Snakemake
    looks at a process now and then, and may miss the peak of one that takes seconds.
    """
    run = Run(finished_run, runs.load_config(finished_run, [finished_run / "runs/small.yaml"]))
    of_base, of_data = shape.find_shape_here(run), rows.find_rows(run)
    assert of_base and of_data and of_data.exact
    for name, item in estimate.disk_items(run, of_base, of_data).items():
        if name != "logs and report":
            assert item.there and item.size == pytest.approx(used_bytes(item.path), rel=0.2), name
    trained = json.loads((run.results / "adapter/training.json").read_text())
    peaks = estimate.memory_items(run, of_base, of_data, trained["device"], trained["precision"])
    for name, job in MEASURED.items():
        header, row, *_ = (run.results / f"benchmarks/{job}.tsv").read_text().splitlines()
        measured = dict(zip(header.split("\t"), row.split("\t"), strict=True))["max_rss"]  # MiB
        estimated = peaks[name]
        assert estimated and 0.67 < estimated / (float(measured) * 2**20) < 2, name


# --- Sources ---


class Listening(_Handler):
    """Keeps the headers of every request."""

    heard: str = ""

    def answer(self, send_body: bool) -> None:
        Listening.heard += str(self.headers)
        super().answer(send_body)


@pytest.fixture
def hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(LoopbackHub, "finish_request", lambda self, r, a: Listening(r, a, self))
    monkeypatch.setattr(Listening, "heard", "")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    with serve(tiny_model, NAME) as hub:
        yield hub


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def run_from(*sources: str) -> Run:
    wanted = {"name": NAME, "revision": COMMIT}
    run = make_run(model=wanted, dataset=wanted)
    run.settings["hub"] = {"sources": list(sources)}
    run.facts["shape"] = Once(lambda: shape.find_shape(run))
    return run


@pytest.mark.parametrize("prefix", ["", "modelscope:"])
def test_shape_comes_from_a_hub_and_no_token_goes_there(
    hub: LoopbackHub, prefix: str, tiny_model: Path
) -> None:
    address = hub.address.replace("://", f"://user:{SECRET}@")
    run = run_from(prefix + address)
    findings = network.check_sources(run)
    assert [f.state for f in findings] == ["ok"], findings
    told = run.facts["shape"]()
    assert told.parameters == shape.shape_of_folder(tiny_model).parameters
    assert told.file_bytes == shape.shape_of_folder(tiny_model).file_bytes
    assert "User-Agent: pockettune-doctor" in Listening.heard
    for word in ("Authorization", "Cookie", SECRET):
        assert word not in Listening.heard
    assert SECRET not in f"{findings}"
    assert all(line.startswith("GET ") for line in hub.requests)
    assert not any("model.safetensors" in line for line in hub.requests), "small files only"


def test_first_source_may_be_away_where_a_later_one_answers(hub: LoopbackHub, nobody: str) -> None:
    findings = network.check_sources(run_from(nobody, hub.address))
    assert [f.state for f in findings] == ["warning", "ok"]
    assert "another source has it" in findings[0].remedy and "refused" in findings[0].detail
    findings = network.check_sources(run_from(nobody, f"modelscope:{nobody}"))
    assert [f.state for f in findings] == ["problem", "problem"]


def test_source_without_the_model_is_no_source(hub: LoopbackHub) -> None:
    run = run_from(hub.address)
    run.settings["model"]["name"] = "somebody/else"
    (finding,) = network.check_sources(run)
    assert finding.state == "problem"
    assert (
        "model somebody/else does not have it (HTTP 404); dataset somebody/tiny in"
        in finding.detail
    )


def test_login_page_is_not_taken_for_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "get", lambda _: b"<html>please log in</html>")
    (finding,) = network.check_sources(run_from("huggingface"))
    assert finding.state == "problem" and "login page" in finding.detail


def test_source_that_never_answers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (finding,) = network.check_sources(run_from(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert finding.state == "problem" and "no answer in" in finding.detail


def test_nothing_is_asked_where_all_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "get", lambda address: pytest.fail(f"asked {address}"))
    run = make_run(model={"path": "resources/demo/base"}, dataset={"files": {"all": "a.csv"}})
    assert states(network.check_sources(run)) == {"sources": "ok"}


def test_bundle_for_machines_without_a_network(tmp_path: Path, nobody: str) -> None:
    run = run_from(nobody)
    run.root = tmp_path
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    assert states(network.check_sources(run)).popitem()[1] == "problem"
    write_files(tmp_path, {"resources/offline/anything": ""})
    (finding,) = network.check_sources(run)
    assert finding.state == "warning" and "resources/offline is here" in finding.remedy


def test_where_pip_looks() -> None:
    said = "global.index-url='https://a/simple'\ndownload.index-url='https://b/simple'\nglobal.find-links='/w'\n"
    assert network.package_places(said, {}) == ["https://b/simple", "/w"]
    assert network.package_places(f"{said}:env:.index-url='https://c'\n", {}) == ["https://c", "/w"]
    assert network.package_places("", {}) == [network.default_index()]
    assert network.default_index().startswith("https://")
    assert network.package_places("global.no-index='true'\nglobal.find-links='/w'\n", {}) == ["/w"]


def test_package_index_that_has_no_converter(
    tmp_path: Path, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    assert states(network.check_package_index(run)) == {"package index": "ok"}, "it is here"
    run.root = tmp_path
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    monkeypatch.setattr(network, "package_places", lambda *_: [nobody, str(tmp_path)])
    (finding,) = network.check_package_index(run)
    assert finding.state == "problem" and "resources/downloads" in finding.remedy
    write_files(tmp_path, {"llama_cpp_python-0.3.36.tar.gz": ""})
    (finding,) = network.check_package_index(run)
    assert finding.state == "ok"


# --- Packages, compiler, conda, SLURM ---


def put_program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_packages_at_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {pin.name: pin.version for pin in software.read_pins(ROOT / "requirements.txt")}
    monkeypatch.setattr(software, "installed_version", versions.get)
    assert states(software.check_packages(make_run())) == {"packages": "ok"}
    versions["torch"] = "1.0"
    (finding,) = software.check_packages(make_run())
    assert finding.state == "warning" and "torch 1.0 (pinned 2.13.0)" in finding.detail
    del versions["torch"]
    run = make_run()
    assert states(software.check_packages(run)) == {"packages": "problem"}
    run.profile = {"software-deployment-method": "conda"}
    assert states(software.check_packages(run)) == {"packages": "ok"}, "conda brings it"


def test_compiler_is_needed_where_llama_cpp_is_to_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert states(software.check_compiler(make_run())) == {"compiler": "ok"}
    monkeypatch.setattr(software, "installed_version", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(software.check_compiler(make_run())) == {"compiler": "problem"}
    put_program(tmp_path, "g++", "")
    assert states(software.check_compiler(make_run())) == {"compiler": "ok"}


@pytest.mark.parametrize(
    ("script", "state", "word"),
    [
        (None, "problem", "not on the path"),
        ("echo conda 23.1.0", "problem", "24.7.1"),
        ('case "$*" in *show*) echo channel_priority: flexible;; *) echo conda 25.3.1;; esac', "warning", "flexible"),
        ('case "$*" in *show*) echo channel_priority: strict;; *) echo conda 25.3.1;; esac', "ok", "25.3.1"),
    ],
)  # fmt: skip
def test_conda(
    script: str | None, state: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}")
    run = make_run()
    assert states(software.check_conda(run)) == {"conda": "ok"}, "it is not asked for"
    run.profile = {"software-deployment-method": "conda"}
    if script:
        put_program(tmp_path, "conda", script)
    (finding,) = software.check_conda(run)
    assert finding.state == state and word in finding.detail


SLURM = {"sinfo": "echo cpu; echo gpu", "squeue": "true", "sacct": "true"}
DISABLED = "echo Slurm accounting storage is disabled >&2; exit 1"


@pytest.mark.parametrize(
    ("changed", "state", "word"),
    [
        ({}, "ok", "partitions cpu, gpu"),
        ({"sinfo": "echo cpu"}, "problem", "no partition gpu (of train)"),
        ({"sinfo": "echo slurm_load_partitions: Unable to contact slurm controller >&2; exit 1"}, "problem", "Unable to contact"),
        ({"squeue": "exit 1"}, "problem", "squeue: exit status 1"),
        ({"sacct": DISABLED}, "problem", "accounting storage is disabled"),
    ],
)  # fmt: skip
def test_slurm(
    changed: dict[str, str], state: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = make_run()
    assert states(slurm.check_slurm(run)) == {"slurm": "ok"}, "there is none, and none is asked for"
    run.profile = runs.load_profile(ROOT / "profiles/slurm")
    assert states(slurm.check_slurm(run)) == {"slurm": "problem"}, "there is none"
    for name, script in (SLURM | changed).items():
        put_program(tmp_path, name, script)
    (finding,) = slurm.check_slurm(run)
    assert finding.state == state and word in finding.detail
    if "sacct" in changed:
        assert "slurm-status-command" in finding.remedy
        run.profile = {**run.profile, "slurm-status-command": "squeue"}
        assert states(slurm.check_slurm(run)) == {"slurm": "ok"}


def test_calls_that_are_late_are_left_behind() -> None:
    found = dict(
        side_by_side({"a": lambda: 1, "b": lambda: time.sleep(60)}, time.monotonic() + 0.2)
    )
    assert found["a"] == 1 and isinstance(found["b"], TooLateError)
