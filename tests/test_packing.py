"""Packed sequences do not see each other: logits, losses and gradients are those of each alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pockettune.common.errors import UserError
from pockettune.data.prompts import Example
from pockettune.models.adapters import add_adapter
from pockettune.models.folder import load_model
from pockettune.runtimes import packing
from pockettune.runtimes.packing import (
    ATTENTION,
    TOKENS_A_PASS,
    next_token_logits,
    pack,
    packed_logits,
)
from pockettune.runtimes.packing_check import check_packing
from pockettune.training.loop import AnswerWeights, batch_loss, cut_batch, draw_batches

# fp32 sums in another order for another shape of the batch.
LOGIT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5  # of the largest gradient

START = [3, 14, 15, 92, 65]
ADAPTER = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "lora",
           "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip
WEIGHTS = AnswerWeights(mean_tokens=2.5)
SETTINGS: dict[str, Any] = {
    "batch_size": 2, "batch_tokens": None, "gradient_accumulation": 1, "epochs": 1, "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    return load_model(tiny_model, attention=ATTENTION, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def usual(tiny_model: Path) -> torch.nn.Module:
    """The same model with transformers' own attention."""
    return load_model(tiny_model, attention="sdpa", dtype=torch.float32).eval()


def make_example(number: int, answer_ids: list[int], start: Sequence[int] = START) -> Example:
    ids = np.random.default_rng(number).integers(3, 500, size=5 + 3 * number).tolist()
    prompt = [*start, *ids]
    return Example(str(number), "", prompt, answer_ids, "", seen=False, cut=False, defused=False)


EXAMPLES = [make_example(1, [7, 2]), make_example(2, [9, 8, 2]), make_example(3, [7, 2])]
UNLIKE = [make_example(n, [7, 2], start=[]) for n in (1, 2, 3)]


def test_start_is_laid_once(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = type(model).forward

    def watch(self: Any, **arguments: Any) -> Any:
        seen.append((arguments["input_ids"].tolist()[0], arguments["position_ids"].tolist()[0]))
        return forward(self, **arguments)

    monkeypatch.setattr(type(model), "forward", watch)
    list(next_token_logits(model, [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7]]))
    assert seen == [([1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 2, 2, 3])]


@pytest.mark.parametrize("examples", [EXAMPLES, UNLIKE], ids=["shared start", "nothing shared"])
def test_packed_logits_are_those_of_each_sequence_alone(
    examples: list[Example], model: torch.nn.Module, usual: torch.nn.Module
) -> None:
    sequences = [example.prompt_ids for example in examples]
    tails = [range(len(START), len(sequence)) for sequence in sequences]
    with torch.inference_mode():
        packed = packed_logits(model, sequences, tails)
        alone = [usual(input_ids=torch.tensor([s])).logits[0, len(START) :] for s in sequences]
    torch.testing.assert_close(packed, torch.cat(alone), atol=LOGIT_TOLERANCE, rtol=0)


def test_position_in_the_start_is_not_shared_away(
    model: torch.nn.Module, usual: torch.nn.Module
) -> None:
    sequences = [example.prompt_ids for example in EXAMPLES]
    with torch.inference_mode():
        packed = packed_logits(model, sequences, [[0], [2], [4]])
        alone = [usual(input_ids=torch.tensor([s])).logits[0] for s in sequences]
    expected = torch.stack([alone[0][0], alone[1][2], alone[2][4]])
    torch.testing.assert_close(packed, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_a_sequence_does_not_see_its_neighbour(model: torch.nn.Module) -> None:
    first, second = EXAMPLES[0].prompt_ids, EXAMPLES[1].prompt_ids
    other = [*START, *(token + 1 for token in first[len(START) :])]
    with torch.inference_mode():
        after_first = packed_logits(model, [first, second], [[], [len(second) - 1]])
        after_other = packed_logits(model, [other, second], [[], [len(second) - 1]])
    assert torch.equal(after_first, after_other)


def test_next_token_logits_do_not_depend_on_the_grouping(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [example.prompt_ids for example in EXAMPLES]
    together = np.stack(list(next_token_logits(model, prompts)))
    monkeypatch.setitem(TOKENS_A_PASS, "cpu", 1)
    apart = np.stack(list(next_token_logits(model, prompts)))
    np.testing.assert_allclose(together, apart, atol=LOGIT_TOLERANCE)


def test_loss_of_a_batch_is_the_mean_of_its_examples(model: torch.nn.Module) -> None:
    with torch.inference_mode():
        together = batch_loss(model, EXAMPLES, WEIGHTS)
        alone = torch.stack([batch_loss(model, [example], WEIGHTS) for example in EXAMPLES]).mean()
    torch.testing.assert_close(together, alone, atol=LOGIT_TOLERANCE, rtol=0)


def usual_loss(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """The plain way: padded on the right, logits of every token, the prompt's labels ignored."""
    sequences = [[*e.prompt_ids, *e.answer_ids] for e in examples]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    labels = [
        [-100] * len(e.prompt_ids) + e.answer_ids + [-100] * (width - len(s))
        for e, s in zip(examples, sequences, strict=True)
    ]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(labels)[:, 1:].flatten(), reduction="none"
    ).view(len(examples), -1)
    return losses.sum() / WEIGHTS.mean_tokens / len(examples)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("examples", [EXAMPLES, UNLIKE], ids=["shared start", "nothing shared"])
def test_gradient_is_that_of_the_padded_computation_with_all_logits(
    examples: list[Example], tiny_model: Path
) -> None:
    models = []
    for attention in (ATTENTION, "sdpa"):
        loaded = load_model(tiny_model, attention=attention, dtype=torch.float32)
        loaded = add_adapter(loaded, ADAPTER, tiny_model)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:  # B starts at zero, which would hide the gradient of A
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        models.append(loaded)
    ours = gradients(models[0], batch_loss(models[0], examples, WEIGHTS))
    plain = gradients(models[1], usual_loss(models[1], examples))
    assert ours.keys() == plain.keys() and len(ours) == 2 * 7 * 2
    largest = max(float(g.abs().max()) for g in plain.values())
    assert largest > 1e-3
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, atol=GRADIENT_TOLERANCE * largest, rtol=0)


def test_heads_with_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folded call against PyTorch's own grouped attention, on numbers drawn at random."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 7, 8), torch.randn(1, 3, 7, 8), torch.randn(1, 3, 7, 8)
    packed = pack(0, [7], torch.device("cpu"), varlen=False)
    output, _ = packing.attend(torch.nn.Module(), query, key, value, None, packed, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_rows_of_the_flash_call() -> None:
    """Start of 2, tails of 3 and 1: each is a sequence whose keys are the start and its own."""
    arguments = pack(2, [3, 1], torch.device("cpu"), varlen=True).varlen
    assert arguments["cu_seq_q"].tolist() == [0, 2, 5, 6]
    assert arguments["keys"].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
    assert arguments["cu_seq_k"].tolist() == [0, 2, 7, 10]
    assert (arguments["max_q"], arguments["max_k"]) == (3, 5)
    alone = pack(0, [3, 1], torch.device("cpu"), varlen=True).varlen
    assert alone["cu_seq_q"].tolist() == alone["cu_seq_k"].tolist() == [0, 3, 4]


# Two layers, narrow: enough for every kind of layer to show.
NARROW: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPTS = [list(range(3, 45)), list(range(60, 100))]


def save_narrow(folder: Path, kind: str, **changes: Any) -> Path:
    """Save a random model of an architecture, its weights large enough for attention to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **NARROW | changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / kind)
    return folder / kind


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 0.5}),
        ("gemma3_text", {"sliding_window": 6}),
        ("minicpm3", {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
                      "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}),
        ("cohere2", {"sliding_window": 6}),
    ],
)  # fmt: skip
def test_packed_is_alone(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Also with a window shorter than the prompt, a soft cap, and values narrower than keys."""
    found = check_packing(save_narrow(tmp_path, kind, **changes), PROMPTS)
    assert found["difference"] < 1e-4 * found["spread"]


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "mix the sequences of a pass"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "mix the sequences of a pass"),
        ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
         "mix the sequences of a pass"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "attention has s_aux"),
        ("stablelm", {}, "does not pass on what its attention must know"),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(
    kind: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = save_narrow(tmp_path, kind, **changes)
    with pytest.raises(
        UserError, match=f"model {kind} cannot be trained here: .*{reason}"
    ) as caught:
        check_packing(folder, PROMPTS)
    assert "\n" not in str(caught.value)


def test_windows_and_soft_caps_of_the_flash_call_go_one_sequence_at_a_time() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": 3, "softcap": 2.0}
    results = [
        packing.attend(
            torch.nn.Module(), query, key, value, None,
            pack(4, [5, 3], torch.device("cpu"), varlen), **options,
        )[0]
        for varlen in (False, True)
    ]  # fmt: skip
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_flash_on_a_gpu_is_one_call_a_sequence() -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 37, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (14, 2, 2)
    )
    results = []
    for varlen in (False, True):
        packed = pack(5, [20, 1, 11], query.device, varlen)
        output, _ = packing.attend(torch.nn.Module(), query, key, value, None, packed, 0.125)
        found = torch.autograd.grad(output.float().square().sum(), (query, key, value))
        results.append([output, *found])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


def test_batches_see_every_row_once_an_epoch() -> None:
    batches = draw_batches([9, 9, 9], SETTINGS | {"epochs": 2})
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    assert sorted(row for batch in batches[:2] for row in batch) == [0, 1, 2]
    assert [len(part) for part in cut_batch(EXAMPLES, SETTINGS, "cpu")] == [2, 1]


def test_part_of_an_epoch_and_accumulation() -> None:
    assert len(draw_batches([9] * 30, SETTINGS | {"batch_size": 3, "epochs": 0.5})) == 5
    batches = draw_batches([9] * 30, SETTINGS | {"batch_size": 3, "gradient_accumulation": 4})
    assert [len(batch) for batch in batches] == [12, 12, 6]


def test_batches_of_a_number_of_tokens() -> None:
    settings = SETTINGS | {"batch_tokens": 50}
    lengths = np.array([10, 20, 30, 40] * 5)
    batches = draw_batches(lengths, settings)
    assert sorted(row for batch in batches for row in batch) == list(range(20))
    assert all(sum(lengths[batch]) <= 50 for batch in batches)
    assert len(batches) < 16, "rows are put together"
    parts = list(cut_batch(EXAMPLES, settings, "cpu"))
    sizes = [sum(len(e.prompt_ids) + len(e.answer_ids) for e in part) for part in parts]
    assert len(sizes) > 1 and max(sizes) <= 50
