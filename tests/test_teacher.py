"""A student learns what a teacher says: the loss, the training, what is scored, and what is refused."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import train_adapter as program
from conftest import ROOT, run_program
from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, Examples, write_examples
from pockettune.data.records import write_records
from pockettune.data.texts import read_texts
from pockettune.evaluation.scoring import score_answers
from pockettune.models.folder import load_model
from pockettune.runtimes.packing import ATTENTION, next_token_logits
from pockettune.training.loop import AnswerWeights, Hardware, batch_loss
from pockettune.training.teacher import Teacher, label_tokens, load_teacher
from pockettune.workflow.config import check_config, drop_idle
from pockettune.workflow.teacher import deciding_files, find_teacher
from score_teacher import Inputs, score_teacher
from test_train import (
    WORDS,
    make_example,
    settings,
    start_program,
    wait_for_updates,
    weights,
    write_tokens,
)
from tokenize_dataset import tokenize_dataset

TEACHER = {"path": "x", "temperature": 2.0, "weight": 0.7, "unlabelled_texts": None}
TASK = {"type": "classification", "system": "", "prompt": "{text}情感：", "labels": {"0": "负面", "1": "正面"}, "template_options": {}}  # fmt: skip
SETTINGS = {"task": TASK, "tokenize": {"max_length": 64},
            "dataset": {"text_column": "text", "label_column": "label"}}  # fmt: skip
TEXTS = ["房间很干净", "服务很差", "但是房间差", "干净，很干净"]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens")


def without_answer(example: Example) -> Example:
    return replace(example, id=f"unlabelled-{example.id}", answer_ids=[], reference="")


def write_scores(folder: Path, probabilities: Sequence[float], unlabelled: int = 8) -> Path:
    """Write what a teacher that says the same of every text would have said."""
    folder.mkdir()
    more = [without_answer(make_example(n)) for n in range(30, 30 + unlabelled)]
    if unlabelled:
        write_examples(folder / "unlabelled.arrow", more)
    ids = {"train": [str(n) for n in range(16)], "unlabelled": [e.id for e in more]}
    for name, known in ids.items():
        said = dict(zip(WORDS, np.log(probabilities), strict=True))
        table = pd.DataFrame({"id": known, **{f"log_probability_{w}": x for w, x in said.items()}})
        if known:
            table.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def train(
    base: Path,
    tokens: Path,
    output: Path,
    teacher: Path | None,
    weight: float = 0.7,
    **changes: Any,
) -> dict[str, Any]:
    scratch = output.with_name("scratch")
    taught = settings(teacher=TEACHER | {"weight": weight} if teacher else None, **changes)
    program.train_adapter(taught, base, tokens, 1, scratch, output, teacher=teacher)
    summary: dict[str, Any] = json.loads((output / "training.json").read_text())
    return summary


# --- the loss ---


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) / temperature)
    return powers / powers.sum()


def test_loss_is_the_sum_by_hand(tiny_model: Path) -> None:
    model = load_model(tiny_model, attention=ATTENTION, dtype=torch.float32)
    examples = [make_example(0), without_answer(make_example(1)), make_example(3)]
    said = {"0": [-0.1, -2.5], "unlabelled-1": [-3.0, -0.2], "3": [-1.0, -0.9]}
    teacher = Teacher(said, label_tokens=[7, 9], temperature=3.0, weight=0.6)
    count = AnswerWeights(mean_tokens=2, classes={"好": 1.5})
    expected = 0.0
    for example in examples:
        (behind,) = next_token_logits(model, [example.prompt_ids])
        student, target = softened(behind[[7, 9]], 3.0), softened(np.array(said[example.id]), 3.0)
        expected += 0.6 * 9.0 * float((target * np.log(target / student)).sum())
        if example.answer_ids:
            expected += 0.4 * batch_loss(model, [example], count).item()
    found = batch_loss(model, examples, count, teacher)
    assert found.item() == pytest.approx(expected / 3, rel=1e-5)


def test_example_without_an_answer_has_no_gold_loss(tiny_model: Path) -> None:
    model = load_model(tiny_model, attention=ATTENTION, dtype=torch.float32)
    count = AnswerWeights(mean_tokens=2)
    alone = batch_loss(model, [make_example(0)], count)
    beside = batch_loss(model, [make_example(0), without_answer(make_example(1))], count)
    assert beside.item() == pytest.approx(alone.item() / 2, rel=1e-6)
    assert batch_loss(model, [without_answer(make_example(1))], count).item() == 0


def test_labels_that_begin_alike_are_refused() -> None:
    assert label_tokens(["a", "b"], [[5, 6, 2], [6, 2]]) == [5, 6]
    with pytest.raises(UserError, match="the labels a, b begin with the same token"):
        label_tokens(["a", "b", "c"], [[5, 6, 2], [5, 2], [6, 2]])


# --- training ---


def test_weight_of_nothing_is_no_teacher(tiny_model: Path, tokens: Path, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "teacher", [0.9, 0.1], unlabelled=0)
    plain = train(tiny_model, tokens, tmp_path / "a", None)
    taught = train(tiny_model, tokens, tmp_path / "b", scores, weight=0.0)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert taught["updates"] == plain["updates"]
    train(tiny_model, tokens, tmp_path / "c", scores, weight=0.1)
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def label_probabilities(base: Path, adapter: Path, prompts: list[list[int]]) -> np.ndarray:
    from peft import PeftModel

    model = load_model(base, attention=ATTENTION, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    scores = np.exp(score_answers(partial(next_token_logits, adapted), prompts, [*WORDS.values()]))
    return scores / scores.sum(axis=1, keepdims=True)


def test_student_moves_towards_the_teacher(tiny_model: Path, tokens: Path, tmp_path: Path) -> None:
    """Alone it is followed to its probabilities, against the gold labels; beside them, half the way."""
    scores = write_scores(tmp_path / "teacher", [0.8, 0.2])
    to_the_end: dict[str, Any] = {
        "eval_every": None,
        "dropout": 0.0,
    }  # not to the best by gold labels
    summary = train(tiny_model, tokens, tmp_path / "taught", scores, 1.0, **to_the_end)
    assert (summary["examples"], summary["unlabelled_examples"]) == (16, 8)
    assert summary["planned_updates"] == 8 * (16 + 8) / 4
    train(tiny_model, tokens, tmp_path / "both", scores, 0.5, **to_the_end)
    train(tiny_model, tokens, tmp_path / "plain", None, **to_the_end)
    prompts = [make_example(n).prompt_ids for n in (1, 3, 31, 33)]  # gold: the second label
    taught, both, plain = (
        label_probabilities(tiny_model, tmp_path / name, prompts)[:, 0]
        for name in ("taught", "both", "plain")
    )
    np.testing.assert_allclose(taught, 0.8, atol=0.15)
    assert plain.max() < 0.2 < taught.min()
    assert (plain < both).all() and (both < taught).all()


def test_killed_student_goes_on_to_the_same_adapter(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    scores = write_scores(tmp_path / "teacher", [0.8, 0.2])
    for folder, killed in ((tmp_path / "a", True), (tmp_path / "a", False), (tmp_path / "b", False)):  # fmt: skip
        process = start_program(tiny_model, tokens, folder, scores, teacher=TEACHER)
        if killed:
            wait_for_updates(folder, process, 7)
            process.kill()
        output, _ = process.communicate()
        assert (process.returncode == 0) is not killed, output
    assert json.loads((tmp_path / "a/adapter/training.json").read_text())["resumed"] == 1
    assert weights(tmp_path / "a/adapter") == weights(tmp_path / "b/adapter")


def test_what_the_teacher_says_decides_the_checkpoint(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    def digest(teacher: Path | None, **changes: Any) -> str:
        hardware = Hardware("cpu", "fp32")
        taught = settings(teacher=TEACHER | changes)
        return program.deciding_digest(taught, tiny_model, tokens, teacher, hardware, 1)

    scores = write_scores(tmp_path / "a", [0.8, 0.2])
    known = {digest(scores), digest(scores, weight=0.5), digest(scores, temperature=1.0), digest(None),
             digest(write_scores(tmp_path / "b", [0.7, 0.3])),
             digest(write_scores(tmp_path / "c", [0.8, 0.2], unlabelled=7))}  # fmt: skip
    assert len(known) == 6 and digest(scores) in known


def test_scores_of_other_rows_are_refused(tokens: Path, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "teacher", [0.8, 0.2])
    with pytest.raises(UserError, match="scores other rows than those trained on"):
        load_teacher(scores, TEACHER, Examples(tokens / "train.arrow"), {"words": [*WORDS]})


# --- scoring ---


@pytest.fixture(scope="module")
def tokenized(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the splits and tokens/ of a few rows."""
    folder = tmp_path_factory.mktemp("tokenized")
    splits = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    for split, text in zip(splits, TEXTS, strict=False):
        rows = [{"id": f"{split}-{n}", "text": f"{text}{n}", "label": "正面"} for n in range(3)]
        rows[0]["label"] = "负面"
        write_records(splits[split], rows)
    tokenize_dataset(SETTINGS, tiny_model, splits, folder / "tokens")
    return folder


def inputs(base: Path, teacher: Path, folder: Path, texts: Path | None = None) -> Inputs:
    splits = [folder / f"{split}.jsonl" for split in ("train", "validation", "test")]
    return Inputs(base, teacher, folder / "tokens", splits, texts)


def test_folder_and_file_of_one_model_say_the_same(
    tiny_model: Path, f16: Path, tokenized: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "more.txt"
    # The second and the last but one stand in a split, the last above.
    texts.write_text(f"房间很好\n{TEXTS[1]}1\n很差\n {TEXTS[2]}2\n很差\n", encoding="utf-8")
    tables = {}
    for teacher in (tiny_model, labelled_alike(f16, tmp_path)):
        output = tmp_path / f"scores of {teacher.name}"
        score_teacher(SETTINGS, inputs(tiny_model, teacher, tokenized, texts), 1, output)
        tables[teacher.name] = [pd.read_parquet(output / f"{n}.parquet") for n in ("train", "unlabelled")]  # fmt: skip
        told = json.loads((output / "teacher.json").read_text())
        assert (told["unlabelled_texts"], told["left_out"]) == (2, 3)
        examples = Examples(tokenized / "tokens/train.arrow", output / "unlabelled.arrow")
        assert examples.ids() == ["train-0", "train-1", "train-2", "unlabelled-1", "unlabelled-3"]
        assert examples[4].answer_ids == [] and "很差" in examples[4].prompt
        answers = json.loads((tokenized / "tokens/answers.json").read_text())
        loaded = load_teacher(output, TEACHER, examples, answers)
        assert list(loaded.scores) == examples.ids()
    for folder, file in zip(*tables.values(), strict=True):
        assert folder["id"].tolist() == file["id"].tolist()
        columns = ["log_probability_负面", "log_probability_正面"]
        np.testing.assert_allclose(folder[columns], file[columns], atol=0.02)
        assert (folder[columns] < 0).all(axis=None)


def labelled_alike(f16: Path, folder: Path) -> Path:
    """Return the file without the labels that it was converted with, which are other ones."""
    content = f16.read_bytes().replace(b"pockettune.task.labels", b"pockettune.task.others")
    path = folder / "f16.gguf"
    path.write_bytes(content)
    return path


def refusal(base: Path, teacher: Path, folder: Path, texts: Path | None = None) -> str:
    """Return the line with which scoring is refused, and see that it left nothing."""
    output = folder / "refused"
    with pytest.raises(UserError) as error:
        score_teacher(SETTINGS, inputs(base, teacher, folder, texts), 1, output)
    assert not output.exists() and not list(folder.glob("*.partial"))
    return str(error.value)


def test_teacher_of_another_tokenizer_is_refused(
    tiny_model: Path, tokenized: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refusal(tiny_model, other, tokenized)
    assert f"{other} has another tokenizer than tiny: 2 of " in line
    assert f"the first is {vocabulary[second]}, {second!r} and not {first!r}" in line


def test_teacher_of_other_labels_is_refused(
    tiny_model: Path, f16: Path, tokenized: Path, tmp_path: Path
) -> None:
    assert "was taught the labels 差, 好, task.labels has 负面, 正面" in refusal(tiny_model, f16, tokenized)  # fmt: skip
    merged = shutil.copytree(tiny_model, tmp_path / "run/merged")
    (tmp_path / "run/tokens").mkdir()
    (tmp_path / "run/tokens/answers.json").write_text(json.dumps({"words": ["好", "坏", "中"]}))
    assert "was taught the labels 好, 坏, 中" in refusal(tiny_model, merged, tokenized)


def test_texts_that_all_stand_in_the_dataset_are_refused(
    tiny_model: Path, tokenized: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "more.txt"
    texts.write_text(f"{TEXTS[0]}1\n", encoding="utf-8")
    line = refusal(tiny_model, tiny_model, tokenized, texts)
    assert "each of its 1 texts stands in the dataset" in line


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "很好\n\n很差\n  \n", "line 2; line 4"),
        ("a.txt", "", "line 1"),
        ("a.csv", 'id,text\n1,"很\n\n好"\n\n2,\n', "line 5; row 2"),
        ("a.jsonl", '{"text": "很好"}\n\n{"text": ""}\n', "line 2; row 2"),
    ],
)
def test_empty_line_is_named(name: str, content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}: no text in {told}; take it out$"):
        read_texts(path, "text")


def test_texts_are_read_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff很好 \r\n“很\u2028差\n".encode())
    assert read_texts(path, "text") == ["很好 ", "“很\u2028差"]
    path.write_bytes("很好\n".encode() + "很差".encode("gb18030"))
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        read_texts(path, "text")
    table = tmp_path / "a.csv"
    table.write_text('text,x\n"很\n\n好",1\n', encoding="utf-8")
    assert read_texts(table, "text") == ["很\n\n好"]


def test_refusal_of_the_program_is_one_line(tiny_model: Path, tokenized: Path, f16: Path) -> None:
    result = run_program(
        "score_teacher.py", "--settings", json.dumps(SETTINGS), "--base", tiny_model, "--teacher", f16,
        "--tokens", tokenized / "tokens", "--splits", tokenized / "train.jsonl", "--texts",
        "--threads", "1", "--output", tokenized / "refused",
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout.count("error: ") == 1
    assert "Traceback" not in result.stdout


# --- the config ---


def test_which_model_a_path_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("results", "results/large"):
        Path(run, "merged").mkdir(parents=True)
        Path(run, "merged/config.json").touch()
        Path(run, "f16.gguf").touch()
    Path("results/large/merged.sha256").touch()
    Path("plain").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("plain", name).touch()
    merged = find_teacher("results/large", "results")
    assert merged == Path("results/large/merged")
    assert deciding_files(merged) == ["results/large/merged.sha256"]
    assert find_teacher("results/large/f16.gguf", "results") == Path("results/large/f16.gguf")
    assert find_teacher("results", "results/large") == Path("results/merged")
    assert "plain/model.safetensors" in deciding_files(find_teacher("plain", "results"))
    shutil.rmtree("results/large/merged")
    assert find_teacher("results/large", "results") == Path("results/large/f16.gguf")
    for path, results in (("results", "results"), ("results/merged", "results"),
                          ("results/../results/f16.gguf", "results"), ("results/large/", "results/large")):  # fmt: skip
        with pytest.raises(UserError, match="is of this run itself"):
            find_teacher(path, results)
    Path("empty").mkdir()
    Path("results/half/tokens").mkdir(parents=True)
    for path in (
        "empty",
        "results/half",
    ):  # the latter lies in this run's results, and is not of it
        with pytest.raises(UserError, match=f"{path} is no finished run"):
            find_teacher(path, "results")


def overlaid(teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    config = copy.deepcopy(config)
    config["train"]["teacher"] = teacher
    check_config(config, yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text()))
    return config


def test_teacher_in_the_config() -> None:
    assert overlaid({"path": "x"})["train"]["teacher"] == TEACHER
    without = overlaid({"path": "x", "weight": 0})
    drop_idle(without)
    assert without["train"]["teacher"] is None
    for wrong, told in (
        ({"path": "x", "weigth": 0.5}, "unknown key train.teacher.weigth; did you mean weight?"),
        ({"path": "x", "weight": 1.5}, "train.teacher.weight is 1.5"),
        ({"temperature": 0, "path": "x"}, "train.teacher.temperature is 0"),
        ({"path": "x{y}"}, "train.teacher.path is 'x{y}': '{' cannot stand there"),
        ({}, "train.teacher.path is missing"),
    ):
        with pytest.raises(UserError, match=told.replace("?", r"\?").replace("{", r"\{")):
            overlaid(wrong)
