"""The training program: it learns, repeats itself, goes on after a kill, and fails in one line."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT
from merge_adapter import merge_adapter
from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, write_examples
from pockettune.evaluation import calibration
from pockettune.evaluation.scoring import score_answers
from pockettune.models.adapters import add_adapter, check_adapter
from pockettune.models.folder import load_model
from pockettune.runtimes.memory import is_out_of_memory
from pockettune.runtimes.packing import ATTENTION, next_token_logits
from pockettune.training import loop
from pockettune.training.loop import AnswerWeights, batch_loss, cut_batch, weigh_answers
from train_adapter import choose_device, choose_precision, load_base, train_adapter

TRAIN: dict[str, Any] = {
    "adapter": None, "variant": "lora", "rank": 4, "alpha": 8, "dropout": 0.1,
    "target_modules": ["q_proj", "v_proj", "down_proj"], "learning_rate": 1e-2,
    "batch_size": 4, "batch_tokens": None, "gradient_accumulation": 1, "epochs": 8,
    "warmup_ratio": 0.1, "scheduler": "cosine", "seed": 3, "quantization": "none",
    "gradient_checkpointing": False, "class_weights": "none", "device": "auto", "precision": "fp32",
    "eval_every": 1, "eval_limit": None, "metric": "accuracy", "patience": None, "teacher": None,
}  # fmt: skip
TASK = {"type": "classification", "system": "", "prompt": "{text}", "labels": {"0": "差", "1": "好"}, "template_options": {}}  # fmt: skip
DATASET = {"text_column": "text", "label_column": "label"}
WORDS = {"差": [7, 2], "好": [9, 2]}
WEIGHTS = AnswerWeights(mean_tokens=2)


def make_example(number: int) -> Example:
    """Its answer is told by its first token: 10 or 11 gives 差 or 好."""
    word = list(WORDS)[number % 2]
    ids = [10 + number % 2, *(20 + number * k % 50 for k in range(number % 5 + 2))]
    return Example(str(number), "", ids, WORDS[word], word, seen=False, cut=False, defused=False)


def write_tokens(folder: Path) -> Path:
    folder.mkdir()
    write_examples(folder / "train.arrow", [make_example(n) for n in range(16)])
    write_examples(folder / "validation.arrow", [make_example(n) for n in range(16, 24)])
    answers = {"words": list(WORDS), "ids": list(WORDS.values())}
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens")


def settings(**changes: Any) -> dict[str, Any]:
    return {"train": TRAIN | changes, "task": TASK, "dataset": DATASET}


def train(base: Path, tokens: Path, output: Path, **changes: Any) -> dict[str, Any]:
    scratch = output.with_name("scratch")
    train_adapter(settings(**changes), base, tokens, threads=1, scratch=scratch, output=output)
    summary: dict[str, Any] = json.loads((output / "training.json").read_text())
    return summary


def losses(summary: dict[str, Any]) -> list[float]:
    return [update["loss"] for update in summary["updates"]]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("source", "name"),
    [({"name": "somebody/tiny", "sha256": {}}, "somebody/tiny"), ({"sha256": {}}, "tiny"), (None, "tiny")],
)  # fmt: skip
def test_adapter_names_its_base_as_others_know_it(
    source: dict[str, Any] | None, name: str, tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    base = tmp_path / "resources/models/tiny@0123456789ab"
    shutil.copytree(tiny_model, base)
    if source:
        (base / "source.json").write_text(json.dumps(source))
    train(base, tokens, tmp_path / "adapter", epochs=1)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    texts = [
        p.read_text() for p in (tmp_path / "adapter").iterdir() if p.suffix in (".json", ".md")
    ]
    assert not any("resources/models" in text for text in texts)
    check_adapter(tmp_path / "adapter", base)


def test_loss_falls_and_the_same_settings_give_the_same_bytes(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    first = train(tiny_model, tokens, tmp_path / "a")
    assert len(first["updates"]) == first["planned_updates"] == 8 * 16 / 4
    assert losses(first)[-1] < losses(first)[0] / 3
    assert losses(train(tiny_model, tokens, tmp_path / "b")) == losses(first)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert losses(train(tiny_model, tokens, tmp_path / "c", seed=4)) != losses(first)


def test_memory_saving_settings_change_nothing(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    """Activations computed twice, and smaller passes, give the same updates."""
    plain = train(tiny_model, tokens, tmp_path / "a")
    twice = train(tiny_model, tokens, tmp_path / "b", gradient_checkpointing=True)
    assert losses(twice) == pytest.approx(losses(plain), rel=1e-4)
    smooth = train(tiny_model, tokens, tmp_path / "c", dropout=0)
    smaller = train(
        tiny_model, tokens, tmp_path / "d", dropout=0, batch_size=1, gradient_accumulation=4
    )
    assert losses(smaller) == pytest.approx(losses(smooth), rel=1e-3)


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_train_and_merge(
    variant: str, tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    summary = train(tiny_model, tokens, tmp_path / "adapter", variant=variant)
    assert losses(summary)[-1] < losses(summary)[0] / 2
    merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").exists()


def test_best_validation_is_exported_and_training_stops_early(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    """A rate that is far too high spoils what the first epochs learned."""
    summary = train(
        tiny_model, tokens, tmp_path / "adapter", epochs=30, learning_rate=0.05, patience=2
    )
    scores = [(v["accuracy"], -v["loss"]) for v in summary["validations"]]
    best = scores.index(max(scores))
    assert summary["exported_update"] == summary["validations"][best]["update"]
    assert len(scores) == best + 1 + 2, "two validations no better, and no more"
    assert len(summary["updates"]) < summary["planned_updates"]
    # The exported weights are those of that update: they score as they did then.
    untrained = settings(epochs=30, learning_rate=0.05)
    model = load_model(tiny_model, attention=ATTENTION, dtype=torch.float32)
    from peft import PeftModel

    from train_adapter import make_validator

    validator = make_validator(untrained, tokens, updates=120)
    assert validator is not None
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    again, _ = validator.score(adapted, loop.Hardware("cpu", "fp32"))
    assert again["loss"] == pytest.approx(-scores[best][1], rel=1e-5)


def test_rows_seen_in_train_choose_nothing(tokens: Path) -> None:
    from train_adapter import make_validator

    rows = [replace(make_example(n), seen=n % 3 == 0) for n in range(16, 24)]
    write_examples(tokens / "validation.arrow", rows)
    validator = make_validator(settings(), tokens, updates=32)
    assert validator is not None
    assert [e.id for e in validator.examples] == ["16", "17", "19", "20", "22", "23"]
    assert validator.interval == 4
    assert make_validator(settings(eval_every=None), tokens, updates=32) is None


# --- killed and resumed ---


def start_program(
    base: Path,
    tokens: Path,
    folder: Path,
    scores: Path | None = None,
    task: dict[str, Any] = TASK,
    **changes: Any,
) -> subprocess.Popen[str]:
    """Start the program as the rule does, a checkpoint after every update."""
    command = [
        sys.executable, ROOT / "scripts/train_adapter.py",
        "--settings", json.dumps(settings(epochs=40, **changes) | {"task": task}), "--base", base, "--tokens", tokens,
        "--teacher", *([scores] if scores else []), "--threads", "1", "--scratch", folder / "scratch", "--save-every", "0",
        "--output", folder / "adapter", "--log", folder / "log",
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_updates(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    """Wait until `count` more checkpoints than now have been written."""
    seen, last = 0, 0
    while seen < count and process.poll() is None:
        written = max((p.stat().st_mtime_ns for p in folder.rglob("checkpoint.pt")), default=0)
        seen, last = seen + (written != last), written
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens/, and the adapter of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start_program(tiny_model, write_tokens(folder / "tokens"), folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return folder


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1)], ids=["kill -9", "SIGTERM"]
)
def test_killed_training_goes_on_to_the_same_adapter(
    number: signal.Signals, times: int, tiny_model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    killed, tokens = tmp_path, undisturbed / "tokens"
    for seed in range(times):
        process = start_program(tiny_model, tokens, killed)
        wait_for_updates(killed, process, random.Random(seed).randint(2, 30))
        process.send_signal(number)
        output, _ = process.communicate()
        assert not (killed / "adapter").exists(), "killed before the end"
        if number == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM
            assert "the same command goes on from there" in output
    process = start_program(tiny_model, tokens, killed)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert weights(killed / "adapter") == weights(undisturbed / "adapter")
    summaries = [
        json.loads((f / "adapter/training.json").read_text()) for f in (killed, undisturbed)
    ]
    assert [s["resumed"] for s in summaries] == [times, 0]
    for name in ("updates", "validations", "exported_update"):
        assert summaries[0][name] == summaries[1][name]
    assert not list((killed / "scratch").rglob("*.pt")), "a finished training needs no checkpoint"


def test_killed_training_on_conversations_goes_on_to_the_same_adapter(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    examples = [
        Example(str(n), "", [10 + n % 2, 20, 30 + n % 2, 2, 21, 22 + n], [40 + n % 3, 41, 2], "[]",
                seen=False, cut=False, defused=False, record=str(n), earlier=[2, 4])
        for n in range(24)
    ]  # fmt: skip
    write_examples(tokens / "train.arrow", examples[:16])
    write_examples(tokens / "validation.arrow", examples[16:])
    (tokens / "answers.json").write_text(json.dumps({"words": [], "ids": [], "ends": [2]}))
    chat = {**TASK, "type": "chat", "max_answer_tokens": 4}
    summaries = []
    for name, kills in (("undisturbed", 0), ("killed", 2)):
        folder = tmp_path / name
        for kill in range(kills):
            process = start_program(tiny_model, tokens, folder, task=chat, metric=None)
            wait_for_updates(folder, process, 5 + 9 * kill)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        process = start_program(tiny_model, tokens, folder, task=chat, metric=None)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        summaries.append(json.loads((folder / "adapter/training.json").read_text()))
    assert weights(tmp_path / "killed/adapter") == weights(tmp_path / "undisturbed/adapter")
    assert [s["resumed"] for s in summaries] == [0, 2]
    first, *_, last = summaries[0]["validations"]
    assert last["loss"] < first["loss"] and summaries[0]["metric"] == "token_accuracy"
    assert summaries[0]["validations"] == summaries[1]["validations"]


def test_other_settings_begin_anew(tiny_model: Path, tokens: Path, tmp_path: Path) -> None:
    process = start_program(tiny_model, tokens, tmp_path)
    wait_for_updates(tmp_path, process, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    (checkpoint,) = (tmp_path / "scratch").rglob("checkpoint.pt")
    assert train(tiny_model, tokens, tmp_path / "adapter", epochs=39)["resumed"] == 0
    assert checkpoint.exists(), "the other training may still be wanted"
    assert train(tiny_model, tokens, tmp_path / "adapter", epochs=40)["resumed"] == 1


# --- parts ---


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny_model: Path) -> None:
    model = load_model(tiny_model, attention=ATTENTION, dtype=torch.float32)
    model = add_adapter(model, TRAIN | {"dropout": 0.0}, tiny_model)
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:  # B starts at zero, which would hide the gradient of A
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    examples = [make_example(n) for n in range(6)]
    gradients = []
    for size in (6, 4, 1):
        model.zero_grad()
        for part in cut_batch(examples, TRAIN | {"batch_size": size}, "cpu"):
            (batch_loss(model, part, WEIGHTS) * len(part) / len(examples)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def test_four_bit_base_trains_and_merges_onto_sixteen_bits(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    summary = train(tiny_model, tokens, tmp_path / "adapter", quantization="nf4")
    assert losses(summary)[-1] < losses(summary)[0] / 2
    merge_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 4_399_104),
        (["q_proj", "k_proj", "v_proj", "o_proj"], 1_081_344),
    ],
)
def test_trainable_parameters_of_the_default_model(modules: list[str], parameters: int) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
        model = add_adapter(model, TRAIN | {"rank": 8, "target_modules": modules}, Path("x"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


# --- what answers count for ---


def learn_answers(
    model_folder: Path, answers: list[list[int]], weights: AnswerWeights
) -> np.ndarray:
    """Return the probabilities of answers that follow the same prompt equally often, once learned."""
    model = load_model(model_folder, attention=ATTENTION, dtype=torch.float32)
    prompt = [10, 20, 30]
    rows = [
        Example(str(n), "", prompt, ids, str(n), seen=False, cut=False, defused=False)
        for n, ids in enumerate(answers)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        batch_loss(model, rows, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = partial(next_token_logits, model)
    probabilities: np.ndarray = np.exp(score_answers(logits, [prompt], answers)[0])
    return probabilities


def test_answers_of_fewer_tokens_are_not_favoured(tiny_model: Path) -> None:
    """Half of the rows is answered with two tokens, half with four: each is as likely."""
    answers = [[7, 2], [9, 30, 31, 2]]
    found = learn_answers(tiny_model, answers, AnswerWeights(mean_tokens=3))
    np.testing.assert_allclose(found, 0.5, atol=0.02)


def test_balanced_classes_count_alike() -> None:
    weights = weigh_answers({"差": 95, "好": 5}, 2.0, balanced=True)
    assert weights.classes["差"] * 95 == pytest.approx(50) == weights.classes["好"] * 5
    assert weights.of_token(make_example(1)) == pytest.approx(10 / 2)
    assert weigh_answers({"差": 95, "好": 5}, 2.0, balanced=False).of_token(make_example(1)) == 0.5


def test_rare_labels_choose_the_best_by_macro_f1(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    summary = train(tiny_model, tokens, tmp_path / "adapter", metric="macro_f1", epochs=2)
    assert summary["metric"] == "macro_f1" and set(summary["validations"][0]) == {
        "update", "macro_f1", "loss"}  # fmt: skip


# --- how far probabilities can be trusted ---


def test_temperature_sets_probabilities_right(
    tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    source = np.random.default_rng(0)
    logit = source.normal(0, 2, size=4000)
    true = (source.random(4000) < 1 / (1 + np.exp(-logit))).astype(int)
    overconfident = np.stack([np.zeros(4000), 3 * logit], axis=1)  # three times as sure as right
    fitted = calibration.fit_temperature(overconfident, true)
    assert fitted is not None
    assert fitted["value"] == pytest.approx(3, rel=0.1)
    assert fitted["loss_after"] < fitted["loss_before"]
    assert fitted["calibration_error_after"] < 0.03 < fitted["calibration_error_before"]
    table = calibration.cover(overconfident, true, fitted["value"])
    coverage, accuracy = ([row[name] for row in table] for name in ("coverage", "accuracy"))
    assert coverage[0] == 1 and coverage == sorted(coverage, reverse=True)
    assert accuracy == sorted(accuracy) and accuracy[-1] > 0.98


def test_no_temperature_where_nothing_tells_one() -> None:
    scores = np.log(np.array([[0.9, 0.1]] * 40))
    assert calibration.fit_temperature(scores, np.zeros(40, dtype=int)) is None, "all are right"
    assert calibration.fit_temperature(scores[:9], np.array([1] + [0] * 8)) is None, "few rows"


def test_validation_of_seen_rows_is_said(
    tiny_model: Path, tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tiny_model, tokens, tmp_path / "a", epochs=1)["validation_seen"] is False
    rows = [replace(make_example(n), seen=True) for n in range(16, 24)]
    write_examples(tokens / "validation.arrow", rows)
    assert train(tiny_model, tokens, tmp_path / "b", epochs=1)["validation_seen"] is True
    assert "every row of validation stands in train" in caplog.text


# --- devices ---


@pytest.mark.parametrize("name", ["SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"])
def test_reserved_gpu_that_is_not_seen_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(UserError, match=r"train\.device is cuda, but PyTorch .* sees no GPU"):
        choose_device("cuda")
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match=rf"{name} is 0, but PyTorch .* set train\.device to cpu"):
        choose_device("auto")
    assert choose_device("cpu") == "cpu"
    monkeypatch.setenv(name, "-1")
    assert choose_device("auto") == "cpu"


def test_random_state_of_one_gpu_alone_is_kept(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that began where four GPUs were visible goes on where one is."""
    kept = torch.arange(16, dtype=torch.uint8)
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: kept)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [kept] * 4)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: pytest.fail("four of them"))
    model = add_adapter(load_model(tiny_model, dtype=torch.float32), TRAIN, tiny_model)
    state = loop.start_training(model, TRAIN, loop.Hardware("cpu", "fp32"), updates=4)
    state.restore(state.as_dict())
    assert [list(r) for r in restored] == [list(kept)]


def test_threads_and_versions_decide_the_checkpoint(
    tiny_model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_adapter as program

    def digest(threads: int) -> str:
        hardware = loop.Hardware("cpu", "fp32")
        return program.deciding_digest(settings(), tiny_model, tokens, None, hardware, threads)

    first = digest(1)
    assert first == digest(1) != digest(2)
    monkeypatch.setattr(program, "version", lambda name: "0.0")
    assert digest(1) != first


# --- number formats ---


def test_base_that_is_stored_finer_is_told(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "finer"
    load_model(tiny_model, dtype=torch.float32).save_pretrained(base)  # type: ignore[operator]
    for precision, told in (("fp32", False), ("bf16", True)):
        caplog.clear()
        load_base(base, TRAIN, loop.Hardware("cpu", precision))
        assert ("stored in float32 and trained on in" in caplog.text) is told


def test_weights_beyond_fp16_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "large"
    model = load_model(tiny_model, dtype=torch.bfloat16)
    next(p for n, p in model.named_parameters() if "down_proj" in n).data[0, 0] = 1e5
    model.save_pretrained(base)  # type: ignore[operator]
    load_base(base, TRAIN, loop.Hardware("cpu", "bf16"))
    with pytest.raises(
        UserError, match=r"down_proj\.weight does not fit into fp16 .*: set train\.p"
    ):
        load_base(base, TRAIN, loop.Hardware("cpu", "fp16"))


# --- failing ---


def test_loss_that_is_not_finite_names_the_setting_and_leaves_nothing(
    tiny_model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(model: torch.nn.Module, *arguments: Any) -> torch.Tensor:
        return batch_loss(model, *arguments) * float("nan")

    monkeypatch.setattr(loop, "batch_loss", diverged)
    with pytest.raises(UserError, match=r"the loss became nan at update 1: lower train\.learning_"):
        train(tiny_model, tokens, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_memory_that_runs_out_names_the_settings_and_leaves_nothing(
    tiny_model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: Any) -> torch.Tensor:
        return torch.empty(2**60)  # the allocator's own error

    monkeypatch.setattr(loop, "batch_loss", greedy)
    with pytest.raises(UserError, match=r"out of memory .*: lower train\.batch_size \(4\) and"):
        train(tiny_model, tokens, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"out of memory .*: lower train\.batch_tokens \(64\) and"):
        train(tiny_model, tokens, tmp_path / "adapter", batch_tokens=64)
    assert not (tmp_path / "adapter").exists()


def test_memory_that_runs_out_while_loading_names_the_settings(
    tiny_model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_adapter as program

    def greedy(*_: Any) -> torch.nn.Module:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(program, "load_base", greedy)
    with pytest.raises(
        UserError, match=r"out of memory \(CUDA error: out of memory\): lower train"
    ):
        train(tiny_model, tokens, tmp_path / "adapter")


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_unknown_target_module_is_named(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32)
    with pytest.raises(UserError, match=r"query_key_value not in model tiny; its layers are down"):
        add_adapter(model, TRAIN | {"target_modules": ["query_key_value"]}, tiny_model)


def test_precision() -> None:
    assert choose_precision("fp32", "cpu") == "fp32"
    assert choose_precision("auto", "cpu") in ("bf16", "fp32")
    with pytest.raises(UserError, match=r"train\.precision fp16 needs a GPU"):
        choose_precision("fp16", "cpu")


def test_layers_that_no_adapter_can_change_are_named(tiny_model: Path) -> None:
    """A tied head or embedding would be another model after merging; a block is no layer."""
    model = load_model(tiny_model, dtype=torch.float32)
    for wanted in (["lm_head"], ["embed_tokens"], ["mlp"]):
        with pytest.raises(
            UserError, match=rf"{wanted[0]}.* not in model tiny; its layers are down_"
        ):
            add_adapter(model, TRAIN | {"target_modules": ["q_proj", *wanted]}, tiny_model)


def test_all_linear_layers_of_another_architecture() -> None:
    """GPT-2 has no q_proj: the error says what it has, and all-linear takes it."""
    from transformers import AutoModelForCausalLM, GPT2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=64, n_head=2))
    message = r"q_proj.* not in model x; its layers are c_attn, c_fc, c_proj, and all-linear"
    with pytest.raises(UserError, match=message):
        add_adapter(model, TRAIN, Path("x"))
    adapted = add_adapter(model, TRAIN | {"target_modules": "all-linear"}, Path("x"))
    targets = {
        n.split(".lora_A")[0].rpartition(".")[2]
        for n, _ in adapted.named_parameters()
        if "lora_A" in n
    }
    assert targets == {"c_attn", "c_fc", "c_proj"}
