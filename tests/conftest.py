"""Fixtures: a model small enough for every test, and one small run of the DAG for those that need all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from small_run import write_run

ROOT = Path(__file__).parent.parent
CONVERTER = ROOT / "resources/llama.cpp-0.3.36"
# What the converter is taken from, and the app's llama.cpp for browsers.
ARCHIVE = ROOT / "resources/downloads/llama_cpp_python-0.3.36.tar.gz"
WLLAMA_ARCHIVE = ROOT / "resources/downloads/wllama-wllama-2.3.7.tgz"
SMALL = ("--configfile", "runs/small.yaml")  # see small_run.py

# No test asks the real hub; one that means to reach a server starts it itself.
os.environ |= {
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "0",
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",  # its client waits seconds in between
}

# What convert_model.py writes into a file beside its weights.
LINEAGE = json.dumps(
    {
        "model": {"name": "somebody/tiny", "revision": "main", "path": None},
        "dataset": {"name": None, "revision": None, "text_column": "text", "label_column": "label"},
        "task": {"type": "classification", "system": "", "prompt": "{text}", "labels": {"0": "差", "1": "好"}, "template_options": {}},
        "card": {"license": "apache-2.0", "languages": ["zh"], "template": "base"},
    }
)  # fmt: skip

Snakemake = Callable[..., subprocess.CompletedProcess[str]]


def run_snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run snakemake in `folder` with this interpreter; stdout and stderr come back together."""
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_snakemake(folder: Path, output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start snakemake in `folder`, in a session of its own that can be signalled as a whole."""
    with output.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=folder, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            # Ignored, and so inherited, where the tests run in the background of a script.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """End a snakemake and its local jobs at once, without a chance to clean up."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_program(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of scripts/ as a rule does; stdout and stderr come back together."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_in_mid_work(name: str, output: Path, *arguments: str | Path) -> None:
    """Run a program of scripts/ until it begins to write `output`, and end it without a chance to clean up."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments), "--output", str(output)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(output.parent.glob(f".{output.name}.*.partial")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not output.exists(), "killed before the end"


def copy_checkout(target: Path) -> Path:
    """Copy what git tracks or would track, with the converter and its archive: nothing is fetched.

    With runs/small.yaml and its data, and nothing made of it.
    """
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    shutil.copytree(CONVERTER, target / "resources" / CONVERTER.name)
    (target / "resources/downloads").mkdir()
    for archive in filter(Path.exists, (ARCHIVE, WLLAMA_ARCHIVE)):
        shutil.copyfile(archive, target / "resources/downloads" / archive.name)
    write_run(target)
    return target


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the small run has been made, once a session. Leave it as it was."""
    folder = copy_checkout(tmp_path_factory.mktemp("checkout") / "pocket tune")
    result = run_snakemake(folder, *SMALL)
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


@pytest.fixture(scope="session")
def bundle(finished_run: Path) -> Path:
    """The bundle of the small run's chosen file, beside its other results."""
    result = run_snakemake(finished_run, *SMALL, "--", "results/small/bundle")
    assert result.returncode == 0, result.stdout[-3000:]
    return finished_run / "results/small/bundle"


# All of it may stand in a file's name, and each shell word of it would leave a file behind.
HOSTILE = """我的 '集' "x" $(touch pwned-1) `touch pwned-2`; touch pwned-3 & #*?[a]\\ ~!"""
# A folder from which the datasets library reads too: it takes *, ? and [ for patterns.
HOSTILE_FOLDER = HOSTILE.replace("*?[a]", "")
SECRET = "hf_secretSecretSecretSecretSecret0123"


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which a shorter run was made, all its names and texts hostile.

    A token stands in the environment. Leave the folder as it was, but for runs of your own.
    """
    folder = copy_checkout(tmp_path_factory.mktemp("hostile") / HOSTILE_FOLDER)
    data = folder / "外部 data"
    data.mkdir()
    base = (folder / "data/base").rename(data / f"模型 {HOSTILE}")
    files = {}
    for split, rows in (("train", 200), ("validation", 30), ("test", 60)):
        lines = (folder / f"data/{split}.csv").read_text().splitlines()[: rows + 1]
        lines[1:3] = [
            '"<script>alert(1)</script> {{7*7}} $(touch pwned-4)",1',
            "=cmd|'/C calc'!A0,0",
        ]
        path = data / f"{split} {HOSTILE}.csv"
        path.write_text("\n".join(lines) + "\n")
        files[split] = str(path.relative_to(folder))
    run = {
        "pathvars": {"results": f"results/{HOSTILE}"},
        "model": {"path": str(base.relative_to(folder))},
        "dataset": {"files": files},
        "task": {
            "system": "",
            "prompt": "{text}\n```\n$(touch pwned-5) `touch pwned-6` {x} '<b>' \"{{7*7}}\"：",
            "labels": {"0": "差 '$(touch pwned-7)\"", "1": "<script>好</script>{y}"},
        },
        "tokenize": {"max_length": 256},
        "train": {"learning_rate": 5e-3, "batch_size": 32, "epochs": 1, "eval_every": None},
        "quantize": {"q8_0": None},
        "evaluate": {"limit": 40},
        "card": {"license": "mit\nx: $(touch pwned-8)", "languages": ["no"]},  # YAML's false
        "report": {"title": "<script>t</script> $(touch pwned-9) {z} {{7*7}}"},
    }
    (folder / "runs/hostile.yaml").write_text(yaml.safe_dump(run, allow_unicode=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        result = run_snakemake(folder, "--configfile", "runs/hostile.yaml")
    assert result.returncode == 0, result.stdout[-5000:]
    (folder / "run.out").write_text(result.stdout)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of Qwen2's architecture with the tokenizer of a few sentences, 256 wide."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    from generated import train_tokenizer, write_tokenizer_config

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    tokenizer = train_tokenizer(["房间很干净，但是服务很差。", "正面", "负面", "情感："] * 3, 512)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder / "tokenizer_config.json")
    set_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    model.half().save_pretrained(folder)
    return folder


def write_gemma(kind: str, tiny_model: Path, folder: Path) -> Path:
    """Write a random Gemma of `kind` in FP16 with the tiny model's tokenizer; return `folder`.

    A layer with a window of 16 tokens, and one without; norms whose 1 + weight FP16 rounds; a width whose root,
    by which embeddings are multiplied, is no short number. Tokenizer and chat template both give a BOS; answers end
    with another token than EOS.
    """
    import torch
    from tokenizers import Tokenizer, processors
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=512, hidden_size=192, intermediate_size=256, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=512,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.5 if name.endswith("norm.weight") else 0.06)
    model.half().save_pretrained(folder)
    told = json.loads((tiny_model / "tokenizer_config.json").read_text())
    bos, template = told["pad_token"], "{{ bos_token }}" + told["chat_template"]
    told |= {"bos_token": bos, "eos_token": bos, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def f16(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file with 16-bit weights."""
    path = tmp_path_factory.mktemp("gguf") / "f16.gguf"
    result = run_program("convert_model.py", "--model", tiny_model, "--converter", CONVERTER,
                         "--settings", LINEAGE, "--output", path)  # fmt: skip
    assert result.returncode == 0, result.stdout
    return path
