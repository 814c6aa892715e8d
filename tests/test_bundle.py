"""The bundle: what stands in it is what was scored, and each of its files asks alike."""

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import yaml

from conftest import run_snakemake
from make_bundle import sent
from pockettune.common.checksums import sha256
from pockettune.data.chat import render_chat
from pockettune.data.serving import go_string, write_grammar, write_modelfile
from pockettune.data.task_template import Frame
from pockettune.gguf.files import read_gguf
from pockettune.models.folder import load_tokenizer
from pockettune.runtimes.llama import LlamaModel
from stand_in import serve_file


def read_rows(bundle: Path) -> list[dict[str, Any]]:
    lines = (bundle / "conformance.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_task(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "task.json").read_text(encoding="utf-8"))


def test_bundle_is_the_chosen_file_and_whole(bundle: Path) -> None:
    results = bundle.parent
    chosen = json.loads((results / "best.json").read_text())["chosen"]
    assert read_task(bundle)["file"] == chosen
    assert sha256(bundle / "model.gguf") == sha256(results / f"{chosen}.gguf")
    listed = dict(
        line.split("  ")[::-1] for line in (bundle / "SHA256SUMS").read_text().splitlines()
    )
    files = {path.name for path in bundle.iterdir()} - {"SHA256SUMS", ".snakemake_timestamp"}
    assert set(listed) == files
    assert all(sha256(bundle / name) == digest for name, digest in listed.items())
    assert (bundle / "card.md").read_text() == (results / "card.md").read_text()


def test_rows_are_what_the_file_computes(bundle: Path) -> None:
    rows, task = read_rows(bundle), read_task(bundle)
    assert len(rows) == 50 and list(rows[0]["labels"]) == task["labels"]
    with LlamaModel(bundle / "model.gguf", threads=1) as model:
        assert all(model.tokenize(row["prompt"]) == row["prompt_ids"] for row in rows)
        logits = np.stack(list(model.next_token_logits([row["prompt_ids"] for row in rows])))
    scores = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    for row, found in zip(rows, scores, strict=True):
        told = {word: label["log_probability"] for word, label in row["labels"].items()}
        assert row["answer"] == max(told, key=lambda word: told[word])
        for word, label in row["labels"].items():
            assert abs(found[label["ids"][0]] - told[word]) < 0.05
    tokenizer = load_tokenizer(bundle.parent / "merged")
    template = read_gguf(bundle / "model.gguf")[0]["tokenizer.chat_template"]
    for row in rows:
        asked = [{"role": "user", "content": row["message"]}]
        assert render_chat(tokenizer, asked, {}, template=template) == row["prompt"]
        assert task["head"] + row["message"].join(task["parts"]) + task["tail"] == row["prompt"]


# --- the files for servers ---


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Return commands and values as Ollama's parser reads them (parser/parser.go at 00dc3af)."""
    commands, place = [], 0
    while place < len(text):
        if text[place] in " \t\r\n":
            place += 1
        elif text[place] == "#":
            place = text.index("\n", place)
        else:
            name = re.compile(r"[A-Za-z]+ (?:(?<=PARAMETER )\w+ )?").match(text, place)
            assert name, f"no command at {text[place : place + 20]!r}"
            # A value ends at the first white space behind which its quotes are closed.
            end = name.end()
            while end < len(text) and not (
                text[end] in " \t\r\n" and closed(text[name.end() : end])
            ):
                end += 1
            kept = "".join(c for c in text[name.end() : end] if c.isprintable() or c in "\t\r\n")
            commands.append((name[0].strip(), unquote(kept.strip())))
            # What follows on the line would begin another command.
            place = end
    return commands


def closed(value: str) -> bool:
    value = value.strip()
    if value.startswith('"""'):
        return len(value) >= 6 and value.endswith('"""')
    return not value.startswith('"') or (len(value) >= 2 and value.endswith('"'))


def unquote(value: str) -> str:
    quotes = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
    return value[len(quotes) : len(value) - len(quotes)]


def fill(template: str, text: str) -> str:
    """Return what Go's text/template makes of the Modelfile's template and a last message."""
    start = "{{ range $i, $message := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}"
    end = "{{ end }}{{ end }}"
    assert template.startswith(start) and template.endswith(end)
    action = re.compile(r'\{\{ (?:("(?:[^"\\]|\\.)*")|(\$message\.Content)) \}\}')
    inner = template.removeprefix(start).removesuffix(end)
    assert action.sub("", inner) == "", "nothing but strings and the message"
    return action.sub(lambda found: text if found[2] else read_go_string(found[1]), inner)


def read_go_string(written: str) -> str:
    """Return the text of a string of Go; its escapes, of which JSON lacks the long one."""
    long = re.compile(r"\\U([0-9a-f]{8})")
    return json.loads(long.sub(lambda found: json.dumps(chr(int(found[1], 16)))[1:-1], written))


def test_modelfile_asks_as_was_trained(bundle: Path) -> None:
    commands = parse_modelfile((bundle / "Modelfile").read_text(encoding="utf-8"))
    told = dict(commands)
    assert [name for name, _ in commands[:2]] == ["FROM", "TEMPLATE"]
    assert told["FROM"] == "./model.gguf" and told["PARAMETER temperature"] == "0"
    assert told["PARAMETER stop"] == read_task(bundle)["stop"]
    assert int(told["PARAMETER num_predict"]) == read_task(bundle)["max_tokens"]
    for row in read_rows(bundle):
        assert fill(told["TEMPLATE"], row["message"]) == row["prompt"]


HOSTILE_PARTS = (
    '"""',
    '"quoted" \\ {{ .System }} {{- end }}',
    "　全角　\u200b\U000e0001",
    "# x\nFROM y\n",
)


@pytest.mark.parametrize("part", HOSTILE_PARTS)
def test_modelfile_of_a_hostile_prompt(part: str) -> None:
    frame = Frame("<s>" + part, (part, part, part), part, "", ())
    text = write_modelfile("model.gguf", frame, "<s>", "</s>", 6, 256)
    template = dict(parse_modelfile(text))["TEMPLATE"]
    assert fill(template, "好") == part + part + "好" + part + "好" + part + part
    assert read_go_string(go_string(part)) == part


def test_modelfile_adds_no_prompt_where_the_program_does() -> None:
    frame = Frame("<s>助手", ("评论：", "\n情感："), "<e>", "", ())
    for template, expected in (("task", "<s>助手评论：好\n情感：<e>"), ("base", "<s>助手好<e>")):
        text = write_modelfile("model.gguf", sent(frame, {"template": template}), "", "<e>", 6, 256)
        assert fill(dict(parse_modelfile(text))["TEMPLATE"], "好") == expected


def test_grammar_and_preset_are_read(bundle: Path) -> None:
    for grammar in (
        (bundle / "labels.gbnf").read_text(encoding="utf-8"),
        write_grammar(['"\\', "a\nb", "好"]),
    ):
        llama_cpp.LlamaGrammar.from_string(grammar, verbose=False)
    lines = (bundle / "llama-server.ini").read_text().splitlines()
    preset = configparser.ConfigParser()
    preset.read_string("\n".join(line for line in lines if not line.startswith("version")))
    assert preset["model"]["model"] == "model.gguf" and preset["model"]["temp"] == "0"


def snippet(bundle: Path, language: str) -> str:
    page = (bundle / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)[0]


def test_snippets_of_the_readme_ask_rightly(bundle: Path) -> None:
    row = read_rows(bundle)[0]
    with serve_file(bundle / "model.gguf") as (address, server):
        names: dict[str, Any] = {}
        exec(snippet(bundle, "python"), names)
        assert names["ask"](row["message"], address) == row["answer"]
        if node := shutil.which("node"):
            call = f"ask({json.dumps(row['message'])}, {json.dumps(address)}).then(console.log)"
            code = f"{snippet(bundle, 'javascript')}\n{call}"
            said = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True)
            assert said.stdout.strip() == row["answer"]
        assert all(body["temperature"] == 0 for body in server.asked)
    page = (bundle / "README.md").read_text(encoding="utf-8")
    request = json.loads(re.search(r"\n    (\{.*?\n    \})\n", page, re.DOTALL)[1])  # type: ignore[index]
    assert request["messages"] == [{"role": "user", "content": row["message"]}]


def test_unknown_file_is_refused(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"bundle": {"file": "q4_k"}}))
    result = run_snakemake(finished_run, "--dry-run", "--configfile", "runs/small.yaml", str(run))
    assert result.returncode == 2
    assert "error: config: bundle.file is 'q4_k'; did you mean q4_k_m?" in result.stdout
