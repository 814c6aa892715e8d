"""llama.cpp through llama-cpp-python's low-level calls: tokenizes and computes logits in batches.

The high-level class keeps 311 MB of scores and takes one sequence at a time. Here the prompts'
common start is computed once and shared, several prompts make a batch, and only the last token of
each asks for logits. Batches are cut the same way every time, so a rerun gives the same bytes.
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _ggml

from pockettune.common.errors import UserError
from pockettune.common.program import logger
from pockettune.gguf.files import REMEDY, read_gguf
from pockettune.runtimes.batching import common_prefix, group_by_tokens
from pockettune.runtimes.processor import check_processor

PROMPTS_A_BATCH = 16
TOKENS_A_BATCH = 2048

_logger = logging.getLogger("llama.cpp")
_logger.setLevel(logging.INFO)


@llama_cpp.llama_log_callback
def _log_native(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if line := text.decode("utf-8", "replace").rstrip():
        _logger.info(line)


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _end_in_one_line(text: bytes) -> None:
    """Say why llama.cpp is about to kill this process, and end it as `program.fail` does.

    Python cannot unwind from here; what was half written lies under a temporary name.
    """
    place = text.decode("utf-8", "replace").rsplit("/", 1)[-1]
    logger.error("error: llama.cpp stopped at %s; a damaged GGUF file does that: %s", place, REMEDY)
    os._exit(2)


def start_backend() -> None:
    """Initialise llama.cpp and send its output to the log; needed once before anything else."""
    check_processor()
    # The callback objects are module-level: llama.cpp keeps pointers to them.
    llama_cpp.llama_log_set(_log_native, ctypes.c_void_p(0))
    # Not in llama_cpp's own interface, and on Windows not to be found through this library.
    if set_callback := getattr(_ggml.libggml, "ggml_set_abort_callback", None):
        set_callback(_end_in_one_line)
    llama_cpp.llama_backend_init()


class LlamaModel:
    """A GGUF model, opened for scoring; use it in a `with` block."""

    def __init__(self, path: Path, threads: int) -> None:
        read_gguf(path)  # says what is wrong with a damaged file, which llama.cpp may not outlive
        start_backend()
        self.threads = threads
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise UserError(f"{path}: llama.cpp cannot load it; its own words are in the log")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.context_length = llama_cpp.llama_model_n_ctx_train(self.model)

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
        """Return the ids of a rendered prompt; special tokens written in it count as such.

        Begins with a BOS where the file asks for one, as pockettune.data.prompts.encode does.
        """
        data = text.encode()
        # A space may become three tokens, in a vocabulary of bytes that has no "▁".
        ids = (llama_cpp.llama_token * (3 * len(data) + 8))()
        count = llama_cpp.llama_tokenize(
            self.vocabulary, data, len(data), ids, len(ids), False, True
        )
        assert count >= 0, "at most three tokens a byte"
        found = list(ids[:count])
        bos = llama_cpp.llama_vocab_bos(self.vocabulary)
        return [bos, *found] if self.adds_bos() and found[:1] != [bos] else found

    def special_token(self, name: str) -> int | None:
        """Return the id of bos, eos, eot (end of turn) or pad as llama.cpp will use it."""
        token = getattr(llama_cpp, f"llama_vocab_{name}")(self.vocabulary)
        return None if token == llama_cpp.LLAMA_TOKEN_NULL else int(token)

    def stores(self, key: str) -> bool:
        """Whether the file's metadata hold `key`; else llama.cpp takes a default of its own."""
        buffer = ctypes.create_string_buffer(1)
        return llama_cpp.llama_model_meta_val_str(self.model, key.encode(), buffer, 1) >= 0

    def adds_bos(self) -> bool:
        """Whether llama.cpp puts a BOS before a prompt unasked."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self.vocabulary))

    def stops_at(self, token: int) -> bool:
        """Whether generation ends with this token."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocabulary, token))

    def end_tokens(self) -> set[int]:
        """Return all tokens with which generation ends."""
        return set(filter(self.stops_at, range(self.vocabulary_size)))

    def piece(self, token: int, special: bool) -> bytes:
        """Return a token's bytes, which need not be whole characters; `special`: of special ones too."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = llama_cpp.llama_token_to_piece(
                self.vocabulary, token, buffer, size, 0, special
            )
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def chat_template(self) -> str | None:
        """Return the chat template that the file stores."""
        template = llama_cpp.llama_model_chat_template(self.model, None)
        return None if template is None else template.decode()

    @contextlib.contextmanager
    def open_context(
        self, tokens: int, batch: int, sequences: int = PROMPTS_A_BATCH, outputs: int = 0
    ) -> Iterator["Context"]:
        """Open room for `tokens` tokens of all sequences together, `batch` of them at a time.

        `outputs` is the largest number of logits' rows that a batch asks for; 0: as many as tokens.
        """
        context = Context(self, tokens, batch, sequences, outputs)
        try:
            yield context
        finally:
            context.close()

    def generate_greedy(self, prompt: Sequence[int], limit: int) -> list[int]:
        """Return the likeliest continuation, up to the token that ends it or `limit` tokens."""
        generated: list[int] = []
        tokens, start = list(prompt), 0
        with self.open_context(len(prompt) + limit, len(prompt)) as context:
            while len(generated) < limit and not (generated and self.stops_at(generated[-1])):
                (row,) = context.decode([(0, start, tokens)])
                start += len(tokens)
                tokens = [int(context.logits(row).argmax())]
                generated += tokens
        return generated

    def next_token_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits behind each prompt's last token, in order: (vocabulary,), float32."""
        prefix = common_prefix(prompts)
        tails = [list(prompt[len(prefix) :]) for prompt in prompts]
        capacity = max(TOKENS_A_BATCH, max(map(len, tails)))
        with self.open_context(len(prefix) + capacity, max(len(prefix), capacity)) as context:
            if prefix:
                context.decode([(0, 0, prefix)])
            for group in group_by_tokens(tails, capacity, len, PROMPTS_A_BATCH):
                context.share(len(group))
                rows = context.decode([(s, len(prefix), tail) for s, tail in enumerate(group, 1)])
                for row in rows:
                    yield context.logits(row)
                context.drop(len(group))


class Context:
    """Keys and values of sequences 1 to `sequences`, and of sequence 0, their common start."""

    def __init__(
        self, model: LlamaModel, tokens: int, batch: int, sequences: int, outputs: int
    ) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = sequences + 1
        parameters.n_ctx = max(tokens, parameters.n_seq_max)
        # llama.cpp makes room for the logits of every sequence, and ends the process where the batch is
        # smaller than that.
        parameters.n_batch = max(batch, parameters.n_seq_max)
        # Room is kept for as many rows of the whole vocabulary, 0.6 MB each where that is Qwen2's.
        parameters.n_outputs_max = outputs and max(outputs, parameters.n_seq_max)
        parameters.kv_unified = True  # sequences that share a start need it (llama.h at 0c1e570)
        parameters.n_threads = parameters.n_threads_batch = model.threads
        self.vocabulary_size = model.vocabulary_size
        self.context = llama_cpp.llama_init_from_model(model.model, parameters)
        if not self.context:
            raise UserError(f"llama.cpp has no memory for a context of {tokens:,} tokens")
        self.batch: Any = llama_cpp.llama_batch_init(batch, 0, 1)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(self.memory, True)

    def share(self, count: int) -> None:
        """Let sequences 1 to `count` begin with sequence 0."""
        for sequence in range(1, count + 1):
            self.share_with(sequence)

    def drop(self, count: int) -> None:
        """Forget sequences 1 to `count`."""
        for sequence in range(1, count + 1):
            self.forget(sequence)

    def share_with(self, sequence: int) -> None:
        """Let a sequence begin with sequence 0."""
        llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)

    def forget(self, sequence: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def logits(self, row: int) -> np.ndarray:
        """Return a copy of the logits of a row that `decode` named: (vocabulary,), float32."""
        return self.logits_until_decoding(row).copy()

    def logits_until_decoding(self, row: int) -> np.ndarray:
        """Return the same in llama.cpp's own memory, which the next `decode` overwrites."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(pointer, (self.vocabulary_size,))

    def compute_start(self, tokens: Sequence[int], batch: int) -> None:
        """Compute what all sequences begin with, `batch` tokens at a time, as sequence 0."""
        for begin in range(0, len(tokens), batch):
            self.decode([(0, begin, tokens[begin : begin + batch])])

    def decode(
        self,
        sequences: Sequence[tuple[int, int, Sequence[int]]],
        wanted: Sequence[int] | None = None,
    ) -> list[int]:
        """Compute (sequence, first position, tokens) together; return the rows with logits.

        Those are each sequence's last token, or as many of its last tokens as `wanted` says.
        """
        batch, n = self.batch, 0
        rows: list[int] = []
        counts = [1] * len(sequences) if wanted is None else wanted
        for (sequence, start, tokens), count in zip(sequences, counts, strict=True):
            for offset, token in enumerate(tokens):
                batch.token[n] = token
                batch.pos[n] = start + offset
                batch.n_seq_id[n] = 1
                batch.seq_id[n][0] = sequence
                batch.logits[n] = offset >= len(tokens) - count
                n += 1
            rows += range(n - count, n)
        batch.n_tokens = n
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed with code {code} on {n} tokens")
        return rows
