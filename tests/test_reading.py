"""Reference answers read token by token, and compared with F16's reading of them."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from pockettune.data.prompts import Example
from pockettune.evaluation.reading import read_answers
from pockettune.evaluation.text_stages import describe_all

VOCABULARY = 6


def example(prompt: list[int], answer: list[int], earlier: list[int] | None = None) -> Example:
    return Example("1", "", prompt, answer, "[]", False, False, False, "1", earlier or [])


def sure_of(shift: int, height: float, width: int = VOCABULARY):  # type: ignore[no-untyped-def]
    """Return a model that finds token + shift the likeliest behind a token, by `height` nats."""

    def logits_at(
        sequences: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> Iterator[np.ndarray]:
        for sequence, chosen in zip(sequences, places, strict=True):
            rows = np.zeros((len(chosen), width), np.float32)
            for row, place in enumerate(chosen):
                rows[row, (sequence[place] + shift) % width] = height
            yield rows

    return logits_at


def test_every_answer_of_a_conversation_is_read() -> None:
    talk = example(
        [0, 1, 2, 5], [0, 1], earlier=[1, 3]
    )  # learned: 1, 2 behind 0, 1; 0, 1 behind 5, 0
    (read,) = read_answers(sure_of(1, 2.0), [talk], "")
    likely = 2.0 - np.log(np.exp(2.0) + VOCABULARY - 1)
    assert (read.tokens, read.right) == (4, 4)
    assert read.log_probability == pytest.approx(4 * likely, abs=1e-6)
    assert read.divergence is None
    (wrong,) = read_answers(sure_of(2, 2.0), [talk], "")
    assert wrong.right == 0 and wrong.log_probability == pytest.approx(4 * (likely - 2.0), abs=1e-6)


def test_divergence_is_at_every_token_of_the_answers() -> None:
    rows = [example([0, 1], [2, 3]), example([3], [4])]
    same = list(read_answers(sure_of(1, 2.0), rows, "", reference=sure_of(1, 2.0)))
    assert [read.tokens for read in same] == [2, 1]
    told = describe_all(same)
    assert told["kl_vocabulary"]["mean"] == 0 and told["likeliest_equal"] == 1
    assert told["compared_tokens"] == 3 and told["token_accuracy"] == 1
    other = describe_all(list(read_answers(sure_of(1, 1.0), rows, "", reference=sure_of(2, 2.0))))
    sharp = np.array([2.0, 0, 0, 0, 0, 0])
    blunt = np.array([0, 1.0, 0, 0, 0, 0])
    p, q = (np.exp(x) / np.exp(x).sum() for x in (sharp, blunt))
    assert other["kl_vocabulary"]["mean"] == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)
    assert other["likeliest_equal"] == 0


def test_trimmed_reference_is_asked_in_its_own_ids() -> None:
    kept = [0, 2, 4]  # the trimmed model's tokens 0, 1, 2
    rows = [example([0, 2], [4]), example([1], [2])]  # token 1 is not in it
    asked: list[list[int]] = []

    def reference(
        sequences: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> Iterator[np.ndarray]:
        asked.extend(map(list, sequences))
        yield from sure_of(1, 2.0, width=3)(sequences, places)

    first, second = read_answers(sure_of(2, 2.0), rows, "", reference, kept)
    assert asked == [[0, 1]]
    assert first.divergence == pytest.approx([0], abs=1e-6)
    assert second.divergence is None and second.tokens == 1
