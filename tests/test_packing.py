"""Packed sequences do not see each other, and a batch's loss is the mean of its examples'."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pockettune.models import load_model
from pockettune.packing import TOKENS_A_PASS, group_by_tokens, next_token_logits, packed_logits
from pockettune.prompts import Example
from train_adapter import batch_loss, cut_batch, draw_batches

# fp32 sums in another order for another shape of the batch.
LOGIT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    return load_model(tiny_model, dtype=torch.float32).eval()


def make_example(number: int, answer_ids: list[int]) -> Example:
    ids = np.random.default_rng(number).integers(3, 500, size=5 + 3 * number).tolist()
    return Example(str(number), "", ids, answer_ids, "", seen=False, cut=False, defused=False)


EXAMPLES = [make_example(1, [7, 2]), make_example(2, [9, 8, 2]), make_example(3, [7, 2])]


def test_packed_logits_are_those_of_each_sequence_alone(model: torch.nn.Module) -> None:
    sequences = [example.prompt_ids for example in EXAMPLES]
    everywhere = [range(len(sequence)) for sequence in sequences]
    with torch.inference_mode():
        packed = packed_logits(model, sequences, everywhere)
        alone = [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]
    torch.testing.assert_close(packed, torch.cat(alone), atol=LOGIT_TOLERANCE, rtol=0)


def test_a_sequence_does_not_see_its_neighbour(model: torch.nn.Module) -> None:
    first, second = EXAMPLES[0].prompt_ids, EXAMPLES[1].prompt_ids
    other = [token + 1 for token in first]
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
        together = batch_loss(model, EXAMPLES)
        alone = torch.stack([batch_loss(model, [example]) for example in EXAMPLES]).mean()
    torch.testing.assert_close(together, alone, atol=LOGIT_TOLERANCE, rtol=0)


def test_loss_is_the_cross_entropy_of_the_answer_alone(model: torch.nn.Module) -> None:
    example = EXAMPLES[1]
    ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
    ignored = torch.full((1, len(example.prompt_ids)), -100)
    labels = torch.cat([ignored, torch.tensor([example.answer_ids])], dim=1)
    with torch.inference_mode():
        usual = model(input_ids=ids, labels=labels).loss
        ours = batch_loss(model, [example])
    torch.testing.assert_close(ours, usual, atol=LOGIT_TOLERANCE, rtol=0)


def test_groups_keep_the_order_and_the_limit() -> None:
    assert list(group_by_tokens([[1] * 3, [2] * 3, [3] * 9, [4]], 6, len)) == [
        [[1] * 3, [2] * 3], [[3] * 9], [[4]],
    ]  # fmt: skip


def test_batches_see_every_example_once_an_epoch() -> None:
    batches = list(draw_batches(EXAMPLES, 2, epochs=2, seed=1))
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    assert sorted(e.id for batch in batches[:2] for e in batch) == ["1", "2", "3"]
    assert [e.id for e in cut_batch(EXAMPLES, 1, "cpu").__next__()] == ["1"]


def test_part_of_an_epoch() -> None:
    assert len(list(draw_batches(EXAMPLES * 10, 3, epochs=0.5, seed=1))) == 5
