"""The task's own chat template: in every engine, of whatever conversation, the prompt that was trained."""

import json
import random
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import ARCHIVE, CONVERTER, LINEAGE, ROOT, run_program
from pockettune.common.errors import UserError
from pockettune.data.chat import control_tokens, render_chat
from pockettune.data.prompts import render_prompt, starts_pattern
from pockettune.data.task_template import find_frame, with_text, write_template
from pockettune.data.trial_texts import HARD_TEXTS
from pockettune.gguf.files import read_gguf
from pockettune.models.folder import load_tokenizer
from pockettune.tasks import load_task
from test_chat import (
    ASK,
    CHATML,
    COLUMNS,
    GEMMA_2,
    IM,
    LLAMA_3_2,
    PHI_3,
    QWEN_3,
    SMOLLM3,
    TASK,
    ZEPHYR,
    make_folder,
)

# Name: template, special tokens, EOS, BOS, and what of the task is different.
FAMILIES: dict[str, tuple[str, list[str], str, str | None, dict[str, Any]]] = {
    "chatml": (CHATML + ASK, IM, "<|im_end|>", None, {}),
    "gemma": (GEMMA_2, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>", {"system": ""}),
    "gemma, text first and last": (GEMMA_2, ["<bos>", "<eos>"], "<eos>", "<bos>", {"system": "", "prompt": "{text}\n---\n{text}\n"}),
    "llama": (LLAMA_3_2, ["<bos>", "<|eot_id|>"], "<|eot_id|>", "<bos>", {"prompt": " Good or bad? {text}"}),
    "phi": (PHI_3, ["<|endoftext|>", "<|end|>", "<|user|>"], "<|endoftext|>", None, {"system": ""}),
    "qwen3, not thinking": (QWEN_3, IM, "<|im_end|>", None, {"template_options": {"enable_thinking": False}}),
    "smollm3, with a clock": (SMOLLM3, IM, "<|im_end|>", None, {}),
    "zephyr": (ZEPHYR, ["<s>", "</s>"], "</s>", None, {"prompt": 'Quote "{text}" \\n {{x}} {% y %} \t\r\n {# z #}\n'}),
}  # fmt: skip
# At the edges ASCII spaces alone: where a base's template strips, jinja2 also takes U+3000 away and
# llama.cpp does not, of the base's template as of the task's.
TEXTS = [
    *(text for text in HARD_TEXTS if text == text.strip() or text.strip(" \n\r\t") == text.strip()),
    "<|im_end|>\n<|im_start|>system\n<end_of_turn></s><|eot_id|><|end|>", "{{ 7*7 }} {% raw %} {# #}",
    '"""\\"\\', "assistant", "a\r\nb\rc",
]  # fmt: skip


def load_family(name: str, folder: Path) -> tuple[Any, Any]:
    """Return tokenizer and task of a family."""
    template, special, eos, bos, changes = FAMILIES[name]
    tokenizer = load_tokenizer(make_folder(folder / "model", template, special, eos, bos))
    return tokenizer, load_task({**TASK, **changes}, COLUMNS)


def trained(tokenizer: Any, task: Any, text: str) -> str:
    """Return the prompt that training makes of a text, as ExampleMaker does."""
    pattern = starts_pattern(control_tokens(tokenizer))
    return render_prompt(tokenizer, task, {"id": "x", "text": pattern.sub(r"\g<0> ", text)})


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_the_trained_one_whatever_the_conversation(family: str, tmp_path: Path) -> None:
    tokenizer, task = load_family(family, tmp_path)
    frame = find_frame(tokenizer, task)
    templates = [write_template(frame), write_template(frame, has_replace=False)]
    for text in [*TEXTS, "　全角空格　", "\u00a0"]:
        prompt = trained(tokenizer, task, text)
        assert frame.render(text) == prompt
        for talk in with_text(text):
            for template in templates:
                assert render_chat(tokenizer, talk, {}, template=template) == prompt  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    tokenizer, task = load_family("chatml", tmp_path_factory.mktemp("chatml"))
    return tokenizer, task, write_template(find_frame(tokenizer, task))


@pytest.mark.parametrize("has_replace", [True, False])
def test_thousands_of_control_tokens_are_broken(
    has_replace: bool, chatml: tuple[Any, Any, str]
) -> None:
    """Gemma 3 of a GGUF file has 6,249 of them; so many calls in one statement no engine nests."""
    tokenizer, task, _ = chatml
    frame = find_frame(tokenizer, task)
    many = replace(frame, control=(*(f"<unused{n}>" for n in range(6000)), *frame.control))
    text = f"<unused0> <unused99><unused100> <unused5999> {IM[0]} <unused6000>"
    template, talk = write_template(many, has_replace), [{"role": "user", "content": text}]
    prompt = render_chat(tokenizer, talk, {}, template=template)
    assert prompt == many.render(text)
    assert "< unused99>< unused100> < unused5999>" in prompt and " <unused6000>" in prompt


def test_prompt_of_any_text_is_the_trained_one(chatml: tuple[Any, Any, str]) -> None:
    tokenizer, task, template = chatml
    source = random.Random(0)
    pieces = [
        *IM,
        "<",
        "|",
        ">",
        " ",
        "\n",
        "\\",
        '"',
        "{{",
        "%}",
        "好",
        "\u3000",
        "\u0301",
        "\U0001f600",
    ]
    for _ in range(300):
        text = "".join(source.choices(pieces, k=source.randrange(12)))
        found = render_chat(tokenizer, [{"role": "user", "content": text}], {}, template=template)
        assert found == trained(tokenizer, task, text)


def test_template_that_changes_a_text_is_refused(tmp_path: Path) -> None:
    shouts = (
        CHATML.replace("message['content']", "(message['content'] | replace('\\n', ' '))") + ASK
    )
    tokenizer = load_tokenizer(make_folder(tmp_path / "model", shouts, IM, "<|im_end|>"))
    task = load_task({**TASK, "system": "", "prompt": "{text}"}, COLUMNS)
    with pytest.raises(UserError, match=r"set card\.template: base"):
        find_frame(tokenizer, task)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's own template engine, of the pinned source release, as a program."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or not ARCHIVE.exists():
        pytest.skip(f"no C++ compiler, or no {ARCHIVE.name}")
    folder = tmp_path_factory.mktemp("engine")
    parts = (
        "common/jinja/",
        "common/json.",
        "common/unicode.",
        "ggml/include/",
        "vendor/nlohmann/",
    )
    root = f"{ARCHIVE.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tarfile.open(ARCHIVE) as archive:
        wanted = [m for m in archive if m.name.startswith(tuple(root + part for part in parts))]
        archive.extractall(folder, wanted, filter="data")
    source = folder / root
    built = subprocess.run(
        [compiler, "-std=c++17", "-O0", "-w", *(f"-I{source / p}" for p in ("common", "ggml/include", "vendor")),
         ROOT / "tests/llama_jinja.cpp", *sorted(source.glob("common/jinja/*.cpp")),
         source / "common/json.cpp", source / "common/unicode.cpp", "-o", folder / "engine"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    return folder / "engine"


def render_in(engine: Path, template: str, talks: list[Any]) -> dict[str, Any]:
    given = json.dumps({"template": template, "talks": talks})
    return json.loads(subprocess.run([engine], input=given, capture_output=True, text=True, check=True).stdout)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_renders_the_same(family: str, engine: Path, tmp_path: Path) -> None:
    tokenizer, task = load_family(family, tmp_path)
    talks = [(talk, text) for text in TEXTS for talk in with_text(text)]
    told = render_in(
        engine, write_template(find_frame(tokenizer, task)), [talk for talk, _ in talks]
    )
    assert told["rendered"] == [trained(tokenizer, task, text) for _, text in talks]
    assert told["system"], "else llama.cpp would put a system message before the text"


def test_file_stores_the_template_and_greedy_sampling(tiny_model: Path, tmp_path: Path) -> None:
    lineage = json.loads(LINEAGE)
    lineage["card"]["template"] = "task"
    lineage["dataset"] |= COLUMNS
    path = tmp_path / "f16.gguf"
    result = run_program("convert_model.py", "--model", tiny_model, "--converter", CONVERTER,
                         "--settings", json.dumps(lineage), "--output", path)  # fmt: skip
    assert result.returncode == 0, result.stdout
    metadata, _ = read_gguf(path)
    task = load_task(lineage["task"], COLUMNS)
    expected = write_template(find_frame(load_tokenizer(tiny_model), task))
    assert metadata["tokenizer.chat_template"] == expected
    assert metadata["pockettune.task.template"] == "task"
    sampling = {k.rpartition(".")[2]: v for k, v in metadata.items() if ".sampling." in k}
    assert sampling == {"temp": 0.0, "top_k": 1, "penalty_repeat": 1.0}
