"""Conversations: what is learned of them, behind which prompt, and at which places, by hand."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from pockettune.common.errors import UserError
from pockettune.data.chat import render_chat
from pockettune.data.prompts import Example, ExampleMaker, write_examples
from pockettune.data.prompts import Examples as Stored
from pockettune.data.turns import find_turns
from pockettune.models.folder import load_tokenizer
from pockettune.tasks import load_task
from pockettune.training.loop import AnswerWeights, batch_loss
from test_chat import ASK, CHATML, GEMMA_2, IM, LLAMA_3_2, QWEN_3, make_folder

COLUMNS: dict[str, Any] = {"text_column": "messages", "label_column": None}
SETTINGS = {"type": "chat", "system": "", "prompt": "{text}", "labels": {}, "template_options": {},
            "max_answer_tokens": 40}  # fmt: skip
TALK = [
    {"role": "user", "content": "一"},
    {"role": "assistant", "content": "甲"},
    {"role": "user", "content": "二"},
    {"role": "assistant", "content": "乙丙"},
]
# SmolLM2's template is Qwen2's, but for the system message that it adds by itself.
ADDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
TURNS = ["<start_of_turn>", "<end_of_turn>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

# name: template, special tokens, EOS, BOS, options; and the text of each example, what is learned in «».
FAMILIES: dict[str, tuple[str, list[str], str, str | None, dict[str, Any], list[str]]] = {
    "qwen2": (
        CHATML + ASK, IM, "<|im_end|>", None, {},
        ["<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n«甲<|im_end|>»\n"
         "<|im_start|>user\n二<|im_end|>\n<|im_start|>assistant\n«乙丙<|im_end|>»"],
    ),
    "smollm2": (
        ADDS_SYSTEM + CHATML + ASK, IM, "<|im_end|>", None, {},
        ["<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n"
         "«甲<|im_end|>»\n<|im_start|>user\n二<|im_end|>\n<|im_start|>assistant\n«乙丙<|im_end|>»"],
    ),
    "gemma": (
        GEMMA_2, ["<bos>", "<eos>", *TURNS], "<eos>", "<bos>", {},
        ["<bos><start_of_turn>user\n一<end_of_turn>\n<start_of_turn>model\n«甲<end_of_turn>»\n"
         "<start_of_turn>user\n二<end_of_turn>\n<start_of_turn>model\n«乙丙<end_of_turn>»"],
    ),
    "llama3": (
        LLAMA_3_2, ["<|begin_of_text|>", "<|end_of_text|>", *HEADERS], "<|end_of_text|>", "<|begin_of_text|>", {},
        ["<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\n一<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n«甲<|eot_id|>»"
         "<|start_header_id|>user<|end_header_id|>\n\n二<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n«乙丙<|eot_id|>»"],
    ),
    # Asked with an empty thought, which the template leaves out of earlier turns: two examples.
    "qwen3": (
        QWEN_3, IM, "<|im_end|>", None, {"enable_thinking": False},
        ["<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«甲<|im_end|>»",
         "<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n甲<|im_end|>\n"
         "<|im_start|>user\n二<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«乙丙<|im_end|>»"],
    ),
    # Without the option the template writes no thought before an answer that is asked for.
    "qwen3 thinking": (
        QWEN_3, IM, "<|im_end|>", None, {},
        ["<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n«甲<|im_end|>»\n"
         "<|im_start|>user\n二<|im_end|>\n<|im_start|>assistant\n«乙丙<|im_end|>»"],
    ),
}  # fmt: skip


def make_examples(folder: Path, family: str, talk: list[dict[str, str]], room: int = 400) -> Any:
    """Return the family's tokenizer and the examples of a conversation."""
    template, special, eos, bos, options, _ = FAMILIES[family]
    make_folder(folder, template, special, eos, bos)
    tokenizer = load_tokenizer(folder)
    task = load_task({**SETTINGS, "template_options": options}, COLUMNS)
    record = {"id": "train-1", **task.read({"messages": talk})}
    return tokenizer, list(ExampleMaker(tokenizer, task, room).make([record]))


def marked(tokenizer: Any, example: Example) -> str:
    """Return an example's text, runs of what is learned between « and »."""
    ids, learned, text = example.ids(), set(example.learned()), ""
    for inside, places in groupby(range(len(ids)), key=lambda place: place in learned):
        run = tokenizer.decode([ids[place] for place in places])
        text += f"«{run}»" if inside else run
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(
    family: str, tmp_path: Path
) -> None:
    tokenizer, examples = make_examples(tmp_path, family, TALK)
    assert [marked(tokenizer, example) for example in examples] == FAMILIES[family][-1]
    assert [e.id for e in examples] == ["train-1", "train-1#2"][: len(examples)]
    assert {e.record for e in examples} == {"train-1"}
    assert json.loads(examples[0].reference) == ["甲", "乙丙"]


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(tmp_path: Path) -> None:
    tokenizer, (whole,) = make_examples(tmp_path, "qwen2", TALK)
    _, examples = make_examples(tmp_path, "qwen2", TALK, room=len(whole.prompt_ids) + 30)
    assert [marked(tokenizer, e).replace("\n", "") for e in examples] == [
        "<|im_start|>user一<|im_end|><|im_start|>assistant«甲<|im_end|>»",
        "<|im_start|>user二<|im_end|><|im_start|>assistant«乙丙<|im_end|>»",
    ]
    assert [e.cut for e in examples] == [False, True]


def test_control_tokens_in_any_turn_are_broken(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "一<|im_end|>"},
        {"role": "assistant", "content": "甲<|im_start|>"},
    ]
    tokenizer, (example,) = make_examples(tmp_path, "qwen2", talk)
    assert example.defused
    assert example.ids().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in example.answer_ids


def test_examples_with_turns_come_back_from_the_disk(tmp_path: Path) -> None:
    _, examples = make_examples(tmp_path / "folder", "qwen2", TALK)
    write_examples(tmp_path / "train.arrow", [*examples, *examples])
    stored = Stored(tmp_path / "train.arrow")
    assert list(stored) == [*examples, *examples]
    assert stored.count_answer_tokens().tolist() == [len(examples[0].learned())] * 2


def test_gradient_of_packed_turns_is_that_of_each_alone_padded(tmp_path: Path) -> None:
    """Against Hugging Face's own attention and loss, each conversation alone, labels masked by hand."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from pockettune.runtimes.packing import ATTENTION

    _, first = make_examples(tmp_path / "a", "qwen2", TALK)
    _, second = make_examples(tmp_path / "a", "qwen2", [TALK[0], TALK[3]])
    examples = [*first, *second]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    gradients = []
    for attention in (ATTENTION, "eager"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", attn_implementation=attention, dtype=torch.float32
        )
        if attention == ATTENTION:
            loss = batch_loss(model, examples, AnswerWeights(mean_tokens=5.0))
        else:
            loss = padded_loss(model, examples, mean_tokens=5.0)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for packed, padded in zip(*gradients, strict=True):
        assert torch.allclose(packed, padded, rtol=1e-4, atol=1e-6)


def padded_loss(model: Any, examples: list[Example], mean_tokens: float) -> torch.Tensor:
    """Return the usual loss: padded on the right, labels of -100 where nothing is learned."""
    width = max(len(e.ids()) for e in examples)
    ids = torch.tensor([e.ids() + [0] * (width - len(e.ids())) for e in examples])
    mask = torch.tensor([[1] * len(e.ids()) + [0] * (width - len(e.ids())) for e in examples])
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        for place in example.learned():
            labels[row, place] = ids[row, place]
    logits = model(ids, attention_mask=mask).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return losses / mean_tokens / len(examples)


@pytest.mark.parametrize("family", FAMILIES)
def test_page_puts_a_conversation_together_as_the_template(family: str, tmp_path: Path) -> None:
    options = FAMILIES[family][4]
    tokenizer, _ = make_examples(tmp_path, family, TALK)
    turns = find_turns(tokenizer, options)
    talks = [TALK[:1], TALK[:3], [*TALK, {"role": "user", "content": " 三<|im_end|>\n"}]]
    system = {"role": "system", "content": "听"}
    for talk in [*talks, *([system, *talk] for talk in talks if turns.system)]:
        safe = [{**m, "content": m["content"].replace("<|im_end|>", "< |im_end|>")} for m in talk]
        given = talk if "<|im_end|>" in turns.control else safe
        assert turns.render(given) == render_chat(tokenizer, safe, options)
    assert (turns.system is None) == (family == "gemma")


def test_template_that_counts_turns_is_refused(tmp_path: Path) -> None:
    counting = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}<|im_end|>{% endfor %}"
    make_folder(tmp_path, counting + ASK, IM, "<|im_end|>", None)
    with pytest.raises(UserError, match="an earlier message otherwise than the last"):
        find_turns(load_tokenizer(tmp_path), {})
