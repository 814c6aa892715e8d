"""llama.cpp through llama-cpp-python's low-level calls: tokenizes and computes logits in batches.

The high-level class keeps 311 MB of scores and takes one sequence at a time. Here the prompts'
common start is computed once and shared, several prompts make a batch, and only the last token of
each asks for logits. Batches are cut the same way every time, so a rerun gives the same bytes.
"""

import ctypes
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np

from pockettune.batching import common_prefix, group_by_tokens
from pockettune.errors import UserError

PROMPTS_A_BATCH = 16
TOKENS_A_BATCH = 2048

_logger = logging.getLogger("llama.cpp")
_logger.setLevel(logging.INFO)


@llama_cpp.llama_log_callback
def _log_native(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if line := text.decode("utf-8", "replace").rstrip():
        _logger.info(line)


def start_backend() -> None:
    """Initialise llama.cpp and send its output to the log; needed once before anything else."""
    # The callback object is module-level: llama.cpp keeps a pointer to it.
    llama_cpp.llama_log_set(_log_native, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


class LlamaModel:
    """A GGUF model, opened for scoring; use it in a `with` block."""

    def __init__(self, path: Path, threads: int) -> None:
        start_backend()
        self.threads = threads
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise UserError(f"{path}: llama.cpp cannot load it; its own words are in the log")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        llama_cpp.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt; special tokens written in it count as such."""
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(
            self.vocabulary, data, len(data), ids, len(ids), False, True
        )
        assert count >= 0, "a token stands for at least one byte"
        return list(ids[:count])

    def next_token_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits behind each prompt's last token, in order: (vocabulary,), float32."""
        prefix = common_prefix(prompts)
        tails = [list(prompt[len(prefix) :]) for prompt in prompts]
        capacity = max(TOKENS_A_BATCH, max(map(len, tails)))
        context = self._context(len(prefix) + capacity, max(len(prefix), capacity))
        batch = llama_cpp.llama_batch_init(max(len(prefix), capacity), 0, 1)
        memory = llama_cpp.llama_get_memory(context)
        try:
            if prefix:
                self._decode(context, batch, [(0, 0, prefix)])
            for group in group_by_tokens(tails, capacity, len, PROMPTS_A_BATCH):
                for sequence in range(1, len(group) + 1):
                    llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
                rows = self._decode(
                    context, batch, [(s, len(prefix), tail) for s, tail in enumerate(group, 1)]
                )
                for row in rows:
                    pointer = llama_cpp.llama_get_logits_ith(context, row)
                    yield np.ctypeslib.as_array(pointer, (self.vocabulary_size,)).copy()
                for sequence in range(1, len(group) + 1):
                    llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _context(self, tokens: int, batch: int) -> llama_cpp.llama_context_p:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = tokens
        parameters.n_batch = batch
        parameters.n_seq_max = PROMPTS_A_BATCH + 1  # sequence 0 holds the common start
        parameters.kv_unified = True  # sequences that share a start need it (llama.h at 0c1e570)
        parameters.n_threads = parameters.n_threads_batch = self.threads
        context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not context:
            raise UserError(f"llama.cpp has no memory for a context of {tokens:,} tokens")
        return context

    def _decode(
        self,
        context: llama_cpp.llama_context_p,
        batch: Any,
        sequences: list[tuple[int, int, Sequence[int]]],
    ) -> list[int]:
        """Compute (sequence, first position, tokens) together; return the rows with logits."""
        rows, n = [], 0
        for sequence, start, tokens in sequences:
            for offset, token in enumerate(tokens):
                batch.token[n] = token
                batch.pos[n] = start + offset
                batch.n_seq_id[n] = 1
                batch.seq_id[n][0] = sequence
                batch.logits[n] = offset == len(tokens) - 1
                n += 1
            rows.append(n - 1)
        batch.n_tokens = n
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed with code {code} on {n} tokens")
        return rows
