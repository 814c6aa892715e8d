"""What is done with the logits at the answer's position while a stage is scored."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np

from pockettune.common import program
from pockettune.evaluation.scoring import NextTokenLogits, Tokens
from pockettune.evaluation.statistics import kl_divergence, normalise


class Observer:
    """Sees the logits at the answer position pass, and does nothing with them."""

    def watch(self, next_token_logits: NextTokenLogits) -> NextTokenLogits:
        """Return `next_token_logits`, its first pass over all prompts observed."""
        passes = 0

        def watched(prompts: Sequence[Tokens]) -> Iterator[np.ndarray]:
            nonlocal passes
            passes += 1
            first = passes == 1
            for row, logits in enumerate(next_token_logits(prompts)):
                if first:
                    self.see(row, logits)
                yield logits

        return watched

    def see(self, row: int, logits: np.ndarray) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}


class OffLabels(Observer):
    """Counts what lies off the answers' first tokens: where the allowed answers are not free text's.

    The score of a stage is the best allowed answer; a chat program writes the likeliest token.
    """

    def __init__(self, answers: Sequence[Tokens]) -> None:
        self.first = sorted({answer[0] for answer in answers})
        self.rows = self.off = 0
        self.mass = 0.0

    def see(self, row: int, logits: np.ndarray) -> None:
        self.rows += 1
        self.off += int(logits.argmax()) not in self.first
        self.mass += 1 - float(np.exp(normalise(logits)[self.first]).sum())

    def describe(self) -> dict[str, Any]:
        """Return the share of rows whose likeliest token begins no answer, and the mean mass off."""
        return {"off_labels": {"rows": self.off / self.rows, "mass": max(self.mass, 0) / self.rows}}


class Recorder(Observer):
    """Writes log probabilities over the whole vocabulary, 16-bit, a row after another."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def see(self, row: int, logits: np.ndarray) -> None:
        self.stream.write(normalise(logits).astype(np.float16).tobytes())


class Divergence(Observer):
    """Compares with what F16 answered: KL(F16 || this stage) over the whole vocabulary, in nats.

    `places` are those of the scored rows among F16's. Where F16's vocabulary was trimmed, `kept` are its
    tokens' ids here, and the others are left out: what both can say is compared.
    """

    def __init__(
        self, reference: np.ndarray, places: Sequence[int], kept: Sequence[int] | None = None
    ) -> None:
        self.reference, self.places = reference, places
        self.shown = slice(None) if kept is None else list(kept)
        self.values = np.zeros(len(places))

    def see(self, row: int, logits: np.ndarray) -> None:
        # Renormalised: the reference was rounded to 16 bits when it was kept.
        expected = normalise(self.reference[self.places[row]])
        self.values[row] = kl_divergence(expected, normalise(logits[self.shown]))

    def describe(self) -> dict[str, Any]:
        return {"kl_vocabulary": describe_divergence(self.values)}


def describe_divergence(values: np.ndarray) -> dict[str, float]:
    """Return the mean and the 99.9th percentile of (rows,)."""
    return {"mean": float(values.mean()), "p999": float(np.quantile(values, 0.999))}


def observe_vocabulary(
    reference: Path | None,
    target: Path | None,
    places: Sequence[int],
    vocabulary: int,
    kept: Sequence[int] | None = None,
) -> AbstractContextManager[Observer]:
    """Return what writes F16's answers over the whole vocabulary, or compares with them, or neither."""
    if target:
        return record(target, (len(places), vocabulary))
    if reference:
        return nullcontext(Divergence(np.load(reference, mmap_mode="r"), places, kept))
    return nullcontext(Observer())


@contextmanager
def record(path: Path, shape: tuple[int, int]) -> Iterator[Recorder]:
    """Write a reference file (.npy) while the block runs, complete or not at all.

    Row by row and not through mapped memory: a full disk is then an error and not the process's end,
    and the file is closed before it is moved, without which Windows does not move it.
    """
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    needed = 2 * shape[0] * shape[1]
    with program.staged(path, needed) as partial, partial.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        yield Recorder(stream)
