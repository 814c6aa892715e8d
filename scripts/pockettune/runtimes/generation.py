"""Free text in llama.cpp: generates answers to many prompts at once, and scores answers that are given.

What the prompts start with is computed once. Several sequences make a batch: the next token of those that
answer, and prompts, whole or in parts, of those that are to; one that has ended makes way for a waiting
prompt (continuous batching: Orca, Yu et al., OSDI 2022). Batches are cut the same way every time, so a
rerun gives the same bytes. Which prompts share a batch changes the order of sums, so that with another
`parallel` the answers part where two tokens are nearly as likely.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import llama_cpp
import numpy as np

from pockettune.common.errors import UserError
from pockettune.runtimes.answers import (
    LOGITS_HELD,
    Generation,
    Tokens,
    check_lengths,
    find_room,
    log_probability,
)
from pockettune.runtimes.batching import common_prefix
from pockettune.runtimes.grammar import Grammar
from pockettune.runtimes.llama import PROMPTS_A_BATCH, TOKENS_A_BATCH, Context, LlamaModel

# Tokens that all sequences together may hold besides the common start, where none alone needs more: 200 MB of
# keys and values in Qwen2.5-0.5B. Prompts wait for room as they wait for a place.
TOKENS_HELD = 16_384


@dataclass
class _Answering:
    """A prompt whose answer is being generated."""

    number: int  # of the prompt
    pending: Tokens  # its tokens that are computed next
    room: int  # tokens that may be generated
    held: int  # tokens of memory that are kept for it
    computed: int  # tokens of it that are
    sequence: int = 0  # of the context
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    log_probability: float = 0.0


def generate(
    model: LlamaModel,
    prompts: Sequence[Tokens],
    *,
    ends: Collection[int],
    max_tokens: int,
    parallel: int = PROMPTS_A_BATCH,
    grammar: str | None = None,
) -> Iterator[Generation]:
    """Yield the likeliest continuation of each prompt, in the prompts' order.

    It is over with one of the tokens `ends`, or after `max_tokens` tokens (the end among them), or where
    the model's context is full. With a grammar (GBNF), it is the likeliest token that the grammar allows.
    `parallel` prompts are answered at once. Raises UserError, before the first, for prompts that are longer
    than the model's context and for a grammar that cannot be read.
    """
    most = llama_cpp.llama_max_parallel_sequences() - 1
    if not 1 <= parallel <= most:
        raise UserError(f"parallel: {parallel} prompts at once; llama.cpp takes 1 to {most}")
    if not prompts:
        return iter(())
    rooms = find_room(prompts, max_tokens, model.context_length)
    return _generate(model, prompts, rooms, ends, min(parallel, len(prompts)), grammar)


def _generate(
    model: LlamaModel,
    prompts: Sequence[Tokens],
    rooms: Sequence[int],
    ends: Collection[int],
    parallel: int,
    grammar: str | None,
) -> Iterator[Generation]:
    start = common_prefix(prompts)
    # The last token that is generated is not computed.
    held = [len(p) - len(start) + room - 1 for p, room in zip(prompts, rooms, strict=True)]
    memory = max(max(held), min(TOKENS_HELD, sum(sorted(held)[-parallel:])))
    waiting = deque(
        _Answering(number, prompt[len(start) :], rooms[number], held[number], computed=len(start))
        for number, prompt in enumerate(prompts)
    )
    with ExitStack() as stack:
        grammars = [
            stack.enter_context(closing(Grammar(model, text, ends)))
            for text in ([] if grammar is None else [grammar] * parallel)
        ]
        context = stack.enter_context(
            model.open_context(len(start) + memory, TOKENS_A_BATCH, parallel, parallel)
        )
        context.compute_start(start, TOKENS_A_BATCH)
        batches = _Batches(context, waiting, memory, parallel, ends, grammars)
        finished: dict[int, Generation] = {}
        for number in range(len(prompts)):
            while number not in finished:
                finished.update(batches.compute_next())
            yield finished.pop(number)


class _Batches:
    """The prompts that are being answered, and those that wait."""

    def __init__(
        self,
        context: Context,
        waiting: deque[_Answering],
        memory: int,
        parallel: int,
        ends: Collection[int],
        grammars: Sequence[Grammar],
    ) -> None:
        self.context, self.waiting, self.ends, self.grammars = context, waiting, ends, grammars
        self.memory = memory  # tokens
        self.free = list(range(parallel, 0, -1))  # sequences of the context
        self.answering: list[_Answering] = []

    def compute_next(self) -> dict[int, Generation]:
        """Compute one batch; return the answers that it finished, by number of the prompt."""
        self._fill_places()
        parts, wanted, ready = [], [], []
        left = TOKENS_A_BATCH
        # Those that answer come first: no long prompt holds them up.
        for answering in sorted(self.answering, key=lambda a: not a.ids):
            part = answering.pending[:left]
            if not part:
                break
            left -= len(part)
            parts.append((answering.sequence, answering.computed, part))
            answering.computed += len(part)
            answering.pending = answering.pending[len(part) :]
            wanted.append(0 if answering.pending else 1)
            ready += [] if answering.pending else [answering]
        rows = self.context.decode(parts, wanted)
        finished = {}
        for answering, row in zip(ready, rows, strict=True):
            if self._take_token(answering, self.context.logits_until_decoding(row)):
                finished[answering.number] = self._finish(answering)
        return finished

    def _fill_places(self) -> None:
        """Let waiting prompts, in their order, take the free sequences and memory."""
        while self.free and self.waiting and self.waiting[0].held <= self.memory:
            answering = self.waiting.popleft()
            answering.sequence = self.free.pop()
            self.memory -= answering.held
            self.context.share_with(answering.sequence)
            if self.grammars:
                self.grammars[answering.sequence - 1].reset()
            self.answering.append(answering)

    def _take_token(self, answering: _Answering, logits: np.ndarray) -> bool:
        """Add the likeliest token to an answer; return whether that was its last."""
        grammar = self.grammars[answering.sequence - 1] if self.grammars else None
        token = int(logits.argmax()) if grammar is None else grammar.likeliest(logits)
        answering.log_probability += log_probability(logits, token)
        answering.ended = token in self.ends
        if not answering.ended:
            answering.ids.append(token)
            answering.pending = [token]
        if answering.ended or len(answering.ids) == answering.room:
            return True
        if grammar is not None:
            grammar.accept(token)
        return False

    def _finish(self, answering: _Answering) -> Generation:
        """Give back an answer's place."""
        self.answering.remove(answering)
        self.context.forget(answering.sequence)
        self.free.append(answering.sequence)
        self.memory += answering.held
        return Generation(answering.ids, answering.ended, answering.log_probability)


def answer_logits(
    model: LlamaModel, prompts: Sequence[Tokens], answers: Sequence[Tokens]
) -> Iterator[np.ndarray]:
    """Yield for each prompt the logits at every position of its answer: (len(answer), vocabulary), float32.

    Row i is what the model says behind the prompt and the answer's first i tokens. Raises UserError,
    before the first, for those that are longer than the model's context.
    """
    # Nothing is asked for behind an answer's last token, so it need not be computed.
    sequences = [[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)]
    check_lengths(list(map(len, sequences)), model.context_length)
    counts = list(map(len, answers))
    if 0 in counts:
        raise ValueError("an answer without a token")
    return _answer_logits(model, prompts, sequences, counts) if prompts else iter(())


def _answer_logits(
    model: LlamaModel,
    prompts: Sequence[Tokens],
    sequences: Sequence[Tokens],
    counts: Sequence[int],
) -> Iterator[np.ndarray]:
    start = common_prefix(prompts)
    tails = [sequence[len(start) :] for sequence in sequences]
    outputs = max(PROMPTS_A_BATCH, LOGITS_HELD // (4 * model.vocabulary_size))
    # At most one sequence is begun in one batch and goes on in the next.
    memory = len(start) + TOKENS_A_BATCH + max(map(len, tails))
    with model.open_context(memory, TOKENS_A_BATCH, PROMPTS_A_BATCH, outputs) as context:
        context.compute_start(start, TOKENS_A_BATCH)
        rows: dict[int, list[np.ndarray]] = {}
        for batch in cut_batches(list(map(len, tails)), counts, outputs):
            parts = []
            for number, begin, end, _ in batch:
                sequence = number % PROMPTS_A_BATCH + 1
                if begin == 0:
                    context.share_with(sequence)
                parts.append((sequence, len(start) + begin, tails[number][begin:end]))
            computed = iter(context.decode(parts, [wanted for *_, wanted in batch]))
            for number, _, end, wanted in batch:
                rows.setdefault(number, []).extend(
                    context.logits(next(computed)) for _ in range(wanted)
                )
                if end == len(tails[number]):
                    context.forget(number % PROMPTS_A_BATCH + 1)
                    yield np.stack(rows.pop(number))


def cut_batches(
    lengths: Sequence[int], counts: Sequence[int], outputs: int
) -> Iterator[list[tuple[int, int, int, int]]]:
    """Cut sequences into batches of TOKENS_A_BATCH tokens, `outputs` rows and PROMPTS_A_BATCH sequences.

    `counts` says of how many last tokens of each the logits are wanted. A batch is of parts (number of the
    sequence, begin, end, rows wanted), in order; a sequence that does not fit goes on in the next batch.
    """
    batch: list[tuple[int, int, int, int]] = []
    tokens, rows = TOKENS_A_BATCH, outputs
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        begin, silent = 0, length - count  # tokens before the first whose logits are wanted
        while begin < length:
            end = min(length, begin + tokens, max(begin, silent) + rows)
            if end == begin or len(batch) == PROMPTS_A_BATCH:
                yield batch
                batch, tokens, rows = [], TOKENS_A_BATCH, outputs
                continue
            wanted = max(0, end - max(begin, silent))
            batch.append((number, begin, end, wanted))
            begin, tokens, rows = end, tokens - (end - begin), rows - wanted
    if batch:
        yield batch


def logits_at(
    model: LlamaModel, sequences: Sequence[Tokens], places: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """Yield the logits behind the given places of each sequence, in order: (places, vocabulary), float32.

    Computed are those from the first place on: what a conversation's users say between its answers too.
    """
    first = [min(chosen) for chosen in places]
    prompts = [sequence[: begin + 1] for sequence, begin in zip(sequences, first, strict=True)]
    # Behind an answer's last token nothing is computed, whatever it is.
    answers = [
        [*s[begin + 1 : max(p) + 1], 0]
        for s, begin, p in zip(sequences, first, places, strict=True)
    ]
    for rows, begin, chosen in zip(
        answer_logits(model, prompts, answers), first, places, strict=True
    ):
        yield rows[[place - begin for place in chosen]]
