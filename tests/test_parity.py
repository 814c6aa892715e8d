"""The parity gate: an honest conversion passes, and each sabotage is told by its name."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from check_parity import check_parity
from conftest import CONVERTER, LINEAGE, run_program
from merge_adapter import merge_adapter
from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.prompts import ExampleMaker, write_examples
from pockettune.data.records import read_records, write_records
from pockettune.data.trial_texts import HARD_TEXTS
from pockettune.models.folder import load_tokenizer
from pockettune.parity.computed import check_merge, check_stops, compare_logits
from pockettune.parity.stored import check_special_tokens
from pockettune.tasks import load_task
from test_merge import make_adapter

TASK = {"type": "classification", "system": "助手", "prompt": "评论：{text}\n情感：", "labels": {"0": "负面", "1": "正面"}, "template_options": {}}  # fmt: skip
COLUMNS = {"text_column": "text", "label_column": "label"}
NAMES = ["token_ids", "vocabulary", "special_tokens", "chat_template", "tensors", "logits", "merge", "stops"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What the gate compares."""

    base: Path
    adapter: Path
    model: Path
    gguf: Path
    tokens: Path
    template: str = "base"

    def check(self, output: Path) -> dict[str, Any]:
        settings = {"task": TASK, "dataset": COLUMNS, "card": {"template": self.template}}
        check_parity(settings, self.base, self.adapter, self.model, self.gguf, self.tokens,
                     self.tokens / "test.jsonl", 1, output)  # fmt: skip
        return program.read_json(output)

    def failed(self, output: Path) -> tuple[list[str], str]:
        """Return the names of the checks that fail, in order, and the error."""
        with pytest.raises(UserError) as raised:
            self.check(output)
        assert not output.exists()
        message = str(raised.value)
        names = re.findall(rf"(?:failed: | \| )({'|'.join(NAMES)}): ", message)
        assert f"{len(names)} of {len(NAMES)} checks failed" in message
        return names, message


def convert(model: Path, output: Path, settings: str = LINEAGE) -> Path:
    result = run_program("convert_model.py", "--model", model, "--converter", CONVERTER,
                         "--settings", settings, "--output", output)  # fmt: skip
    assert result.returncode == 0, result.stdout
    return output


def write_tokens(model: Path, folder: Path, texts: Sequence[str] = ()) -> Path:
    """Write tokens/ and the records of `texts`, or of hard ones."""
    maker = ExampleMaker(load_tokenizer(model), load_task(TASK, COLUMNS), 256)
    texts = texts or ["房间很干净，但是服务很差。", *(t for t in HARD_TEXTS if t.strip())] * 3
    rows = [{"id": str(n), "text": f"{n}{t}", "label": "正面"} for n, t in enumerate(texts)]
    folder.mkdir()
    write_records(folder / "test.jsonl", rows)
    write_examples(folder / "test.arrow", maker.make(rows))
    answers = {"words": list(maker.answer_ids), "ids": list(maker.answer_ids.values())}
    program.write_json(folder / "answers.json", answers)
    return folder


@pytest.fixture(scope="module")
def honest(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("parity")
    adapter = make_adapter(tiny_model, folder / "adapter")
    merge_adapter(tiny_model, adapter, folder / "merged")
    f16 = convert(folder / "merged", folder / "f16.gguf")
    tokens = write_tokens(tiny_model, folder / "tokens")
    return Case(tiny_model, adapter, folder / "merged", f16, tokens)


def edit(case: Case, path: Path, *changes: Callable[[gguf.GGUFReader], None]) -> Case:
    """Return the case with a copy of its file, changed in place."""
    shutil.copyfile(case.gguf, path)
    reader = gguf.GGUFReader(path, "r+")
    for change in changes:
        change(reader)
    reader.data.flush()
    return replace(case, gguf=path)


def replace_text(key: str, old: bytes, new: bytes) -> Callable[[gguf.GGUFReader], None]:
    """Replace text in a string of the metadata by text of the same length."""

    def change(reader: gguf.GGUFReader) -> None:
        stored = reader.fields[key].parts[-1]
        changed = stored.tobytes().replace(old, new)
        assert changed != stored.tobytes() and len(old) == len(new)
        stored[:] = np.frombuffer(changed, np.uint8)

    return change


def change_eos(reader: gguf.GGUFReader) -> None:
    reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = 5


def remove_eos(reader: gguf.GGUFReader) -> None:
    """Give the entry a name that llama.cpp does not know."""
    reader.fields["tokenizer.ggml.eos_token_id"].parts[1][-len("eos_token_id") :][:3] = 120


def rename_end_of_turn(reader: gguf.GGUFReader) -> None:
    """llama.cpp also knows the end of a turn by its text: <|im_end|>, token 2."""
    field = reader.fields["tokenizer.ggml.tokens"]
    field.parts[field.data[2]][:] = np.frombuffer(b"<|im_fin|>", np.uint8)


def swap_layers(name: str) -> Callable[[gguf.GGUFReader], None]:
    def change(reader: gguf.GGUFReader) -> None:
        first, second = (
            next(t.data for t in reader.tensors if t.name == f"blk.{layer}.{name}")
            for layer in (0, 1)
        )
        assert first.shape == second.shape
        kept = first.copy()
        first[:], second[:] = second, kept

    return change


WRONG_PRE = replace_text("tokenizer.ggml.pre", b"qwen2", b"gpt-2")
WRONG_TEMPLATE = replace_text("tokenizer.chat_template", b"assistant", b"Assistant")


def test_honest_conversion_passes(honest: Case, tmp_path: Path) -> None:
    result = run_program(
        "check_parity.py", "--settings", LINEAGE, "--base", honest.base,
        "--adapter", honest.adapter, "--model", honest.model, "--gguf", honest.gguf,
        "--tokens", honest.tokens, "--records", honest.tokens / "test.jsonl", "--threads", "1",
        "--output", tmp_path / "parity.json", "--log", tmp_path / "parity.log",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    written = program.read_json(tmp_path / "parity.json")
    assert written["passed"]
    assert [check["name"] for check in written["checks"]] == NAMES
    assert all(check["passed"] and check["detail"] for check in written["checks"])
    checks = {check["name"]: check for check in written["checks"]}
    assert checks["token_ids"]["prompts_not_nfc"] > 0, "one of the texts is changed by NFC"
    assert checks["merge"]["adapter_effect_in_spreads"] > 0.3
    assert "passed  logits: 32 of 32" in (tmp_path / "parity.log").read_text()


def test_wrong_pre_tokenizer_is_named(honest: Case, tmp_path: Path) -> None:
    names, message = edit(honest, tmp_path / "x.gguf", WRONG_PRE).failed(tmp_path / "out.json")
    assert names == ["token_ids"]
    assert re.search(r"at \".+\" \(token \d+\) llama\.cpp has \[.*\], Hugging Face has \[", message)
    assert "convert_model.PRE_TOKENIZERS" in message


def test_other_tokenizer_than_the_base_is_named(honest: Case, tmp_path: Path) -> None:
    model = tmp_path / "merged"
    shutil.copytree(honest.model, model)
    tokenizer = program.read_json(model / "tokenizer.json")
    tokenizer["model"]["merges"].pop()
    program.write_json(model / "tokenizer.json", tokenizer)
    names, message = replace(honest, model=model).failed(tmp_path / "out.json")
    assert names == ["token_ids"]
    assert "tokenizer.json must be the base's" in message


def test_changed_chat_template_is_named(honest: Case, tmp_path: Path) -> None:
    case = edit(honest, tmp_path / "x.gguf", WRONG_TEMPLATE)
    names, message = case.failed(tmp_path / "out.json")
    assert names == ["chat_template"]
    assert "a conversation of system+user differs from character" in message
    assert '"Assistant' in message and '"assistant' in message


@pytest.fixture(scope="module")
def asking(honest: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The case with a file that stores the task's own template."""
    card = {"license": "mit", "languages": ["zh"], "template": "task"}
    settings = json.loads(LINEAGE) | {"task": TASK, "card": card}
    settings["dataset"] |= COLUMNS
    path = tmp_path_factory.mktemp("asking") / "f16.gguf"
    convert(honest.model, path, json.dumps(settings))
    return replace(honest, gguf=path, template="task")


def test_template_of_the_task_gives_the_trained_prompts(asking: Case, tmp_path: Path) -> None:
    checks = {check["name"]: check for check in asking.check(tmp_path / "out.json")["checks"]}
    told = checks["chat_template"]
    assert told["texts"] == len(list(read_records(asking.tokens / "test.jsonl")))
    assert told["conversations"] > 5 * len(HARD_TEXTS) and told["differing"] == 0
    names, _ = replace(asking, template="base").failed(tmp_path / "base.json")
    assert names == ["chat_template"], "the model's own template is another"


TASK_TEMPLATE_FAULTS = {
    "another prompt": ("评论".encode(), "点评".encode(), "a conversation of user differs from character"),
    "system messages taken for the text": (b'== "user"', b'!= "xxxx"', "a conversation of"),
    "control tokens left": (rb"\t< |im_end|>", rb"\t<|im_end|> ", "a conversation of user differs"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TASK_TEMPLATE_FAULTS)
def test_changed_template_of_the_task_is_named(asking: Case, tmp_path: Path, fault: str) -> None:
    old, new, told = TASK_TEMPLATE_FAULTS[fault]
    change = replace_text("tokenizer.chat_template", old, new)
    names, message = edit(asking, tmp_path / "x.gguf", change).failed(tmp_path / "out.json")
    assert names == ["chat_template"] and told in message
    assert "rerun convert, or set card.template: base" in message


def test_file_of_another_task_is_named(honest: Case, tmp_path: Path) -> None:
    names, _ = replace(honest, template="task").failed(tmp_path / "out.json")
    assert names == ["chat_template"], "it stores the model's own"


def test_broken_and_missing_chat_template_are_named(honest: Case, tmp_path: Path) -> None:
    broken = replace_text("tokenizer.chat_template", b"endfor", b"endfur")
    names, message = edit(honest, tmp_path / "x.gguf", broken).failed(tmp_path / "out.json")
    assert names == ["chat_template"] and "refused:␣Encountered␣unknown␣tag" in message

    def remove(reader: gguf.GGUFReader) -> None:
        reader.fields["tokenizer.chat_template"].parts[1][-1] = ord("x")

    names, message = edit(honest, tmp_path / "x.gguf", remove).failed(tmp_path / "out.json")
    assert names == ["chat_template"] and "stores no chat template" in message


@pytest.mark.parametrize(
    ("change", "value"), [(change_eos, "5"), (remove_eos, "None")], ids=["changed", "removed"]
)
def test_lost_eos_is_named(
    change: Callable[[gguf.GGUFReader], None], value: str, honest: Case, tmp_path: Path
) -> None:
    names, message = edit(honest, tmp_path / "x.gguf", change).failed(tmp_path / "out.json")
    assert names == ["special_tokens"]
    assert f"EOS is {value} in the file, 2 in tokenizer_config.json" in message


def test_end_of_turn_that_does_not_stop_is_named(honest: Case, tmp_path: Path) -> None:
    case = edit(honest, tmp_path / "x.gguf", change_eos, rename_end_of_turn)
    names, message = case.failed(tmp_path / "out.json")
    assert "special_tokens" in names
    assert "llama.cpp does not stop at 2 (<|im_end|>), with which every answer ends" in message


def test_bos_that_prompts_lack_is_told() -> None:
    """llama.cpp and the tokenizer agree on adding a BOS, the rendered prompt has none."""
    bos = 1
    llama = mock.Mock()
    llama.special_token.return_value, llama.adds_bos.return_value = bos, True
    other = mock.MagicMock(bos_token_id=bos, eos_token_id=bos, pad_token_id=bos)
    other.return_value = {"input_ids": [bos, 5]}
    for prompt, lacks in (([bos, 5], False), ([bos + 1, 5], True)):
        result = check_special_tokens(llama, other, [], prompt)
        assert result["passed"] and result["prompts_lack_bos"] is lacks
        assert ("do not begin with it" in result["detail"]) is lacks


def test_untied_embedding_is_named(honest: Case, tmp_path: Path) -> None:
    model = tmp_path / "untied"
    shutil.copytree(honest.model, model)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    f16 = convert(model, tmp_path / "x.gguf")
    names, message = replace(honest, model=model, gguf=f16).failed(tmp_path / "out.json")
    assert names == ["tensors"]
    assert "the embedding is untied" in message
    names, message = replace(honest, gguf=f16).failed(tmp_path / "out.json")
    assert names == ["tensors"]
    assert "the file has an output.weight of its own" in message


def test_adapter_merged_twice_is_named(honest: Case, tmp_path: Path) -> None:
    merge_adapter(honest.model, honest.adapter, tmp_path / "twice")
    f16 = convert(tmp_path / "twice", tmp_path / "x.gguf")
    case = replace(honest, model=tmp_path / "twice", gguf=f16)
    names, message = case.failed(tmp_path / "out.json")
    assert names == ["merge"]
    assert "the merged folder is not base + adapter" in message


def test_adapter_not_merged_is_named(honest: Case, tmp_path: Path) -> None:
    f16 = convert(honest.base, tmp_path / "x.gguf")
    names, _ = replace(honest, model=honest.base, gguf=f16).failed(tmp_path / "out.json")
    assert names == ["merge"]


@pytest.mark.parametrize("name", ["attn_q.weight", "ffn_down.weight", "ffn_gate.weight"])
def test_swapped_layers_are_named(name: str, honest: Case, tmp_path: Path) -> None:
    names, message = edit(honest, tmp_path / "x.gguf", swap_layers(name)).failed(tmp_path / "o.json")  # fmt: skip
    assert names == ["logits"]
    assert "cause: weights differ" in message


@pytest.mark.parametrize("name", ["attn_k.bias", "attn_norm.weight"])
def test_swapped_vectors_are_named(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """Too small for the logits to tell; the tiny model's are all 0 or all 1, so they are drawn."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for key, weight in weights.items():
        if weight.ndim == 1:
            weights[key] = weight + (torch.randn(weight.shape, generator=generator) / 100).half()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(model, tmp_path / "adapter")
    merge_adapter(model, adapter, tmp_path / "merged")
    f16 = convert(tmp_path / "merged", tmp_path / "f16.gguf")
    case = Case(model, adapter, tmp_path / "merged", f16, write_tokens(model, tmp_path / "tokens"))
    assert case.check(tmp_path / "honest.json")["checks"][4]["vectors"] == 11
    names, message = edit(case, tmp_path / "x.gguf", swap_layers(name)).failed(tmp_path / "o.json")
    assert names == ["tensors"]
    full = {"attn_k.bias": "self_attn.k_proj.bias", "attn_norm.weight": "input_layernorm.weight"}[name]  # fmt: skip
    assert f"model.layers.0.{full} holds the values of model.layers.1.{full}" in message


def test_padded_vocabulary_is_named(honest: Case, tmp_path: Path) -> None:
    model = tmp_path / "padded"
    shutil.copytree(honest.model, model)
    weights = load_file(model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, torch.zeros_like(embedding[:1])])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = program.read_json(model / "config.json")
    program.write_json(model / "config.json", {**config, "vocab_size": len(embedding) + 1})
    f16 = convert(model, tmp_path / "x.gguf")
    names, message = replace(honest, model=model, gguf=f16).failed(tmp_path / "out.json")
    assert names == ["vocabulary"]
    assert "the GGUF has 513 tokens, the base model's embedding 512 rows (+1)" in message
    names, message = replace(honest, gguf=f16).failed(tmp_path / "out.json")
    assert names == ["vocabulary"]
    assert "the merged model's embedding 512 rows (+1)" in message


def test_several_faults_are_named_at_once(honest: Case, tmp_path: Path) -> None:
    case = edit(honest, tmp_path / "x.gguf", WRONG_PRE, WRONG_TEMPLATE, change_eos,
                swap_layers("ffn_down.weight"))  # fmt: skip
    result = run_program(
        "check_parity.py", "--settings", LINEAGE, "--base", case.base,
        "--adapter", case.adapter, "--model", case.model, "--gguf", case.gguf,
        "--tokens", case.tokens, "--records", case.tokens / "test.jsonl", "--threads", "1", "--output", tmp_path / "parity.json",
    )  # fmt: skip
    assert result.returncode == 2, result.stdout
    told = result.stdout.splitlines()[-1]
    assert "is not the merged model" in told and "4 of 8 checks failed" in told
    for name in ("token_ids", "special_tokens", "chat_template", "logits"):
        assert f"{name}: " in told
    assert not (tmp_path / "parity.json").exists()


def test_ties_and_nan_in_logits() -> None:
    expected = np.array([[0.0, 1, 5, 5.001], [0, 1, 2, 9]], np.float32)
    faults, numbers = compare_logits(expected[:, [0, 1, 3, 2]], expected, [0], bound=0.05)
    assert faults == ["the likeliest token differs on 1 of 2 prompts"], "the first is a tie"
    assert (numbers["likeliest_equal"], numbers["ties"]) == (0, 1)
    broken = expected.copy()
    broken[1, 0] = np.nan
    assert "prompt 2 of 2" in compare_logits(broken, expected, [0], bound=0.05)[0][0]


def test_adapter_too_weak_to_tell_is_said() -> None:
    logits = np.array([[0.0, 1, 2, 9]], np.float32)
    result = check_merge(logits, logits, logits + 1e-3, [0])
    assert result["passed"] and "too little to tell" in result["detail"]


def test_answer_must_stop_where_it_does_in_pytorch() -> None:
    ramble, answer = [7] * 10, [5, 2]
    assert not check_stops([ramble, answer], [answer, answer], [False, True], {2})["passed"]
    both = check_stops([ramble], [ramble], [False], {2})
    assert both["passed"] and both["neither_stops"] == 1 and "neither stops" in both["detail"]
    assert check_stops([answer], [ramble], [True], {2})["passed"]
