"""LiteRT through its interpreter: computes the logits behind given token ids.

A file that litert-torch exported has two kinds of signature, each of one row: prefill_<n> takes n tokens
and gives keys and values alone, decode takes one token and gives its logits too. So a prompt is cut into
pieces of the prefill's length, the last one padded, and its last token goes through decode. What all
prompts start with is computed once; a later token overwrites what padding left behind it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.common.errors import UserError
from pockettune.common.extras import use_extra
from pockettune.litert.files import open_flatbuffer
from pockettune.runtimes.batching import common_prefix

Tokens = Sequence[int]
Cache = dict[str, np.ndarray]  # keys and values of one row, by name

MASKED = np.float32(-1e9)


class LitertModel:
    """A .tflite model, opened for scoring."""

    def __init__(self, path: Path, threads: int) -> None:
        open_flatbuffer(path)  # says what is wrong with a file that is none
        use_extra("litert")
        from ai_edge_litert.interpreter import Interpreter

        try:
            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            names = interpreter.get_signature_list()
            prefill = next(name for name in names if name.startswith("prefill_"))
            self.prefill = interpreter.get_signature_runner(prefill)
            self.decode = interpreter.get_signature_runner("decode")
            self.chunk = int(prefill.removeprefix("prefill_"))
            inputs = self.decode.get_input_details()
            self.capacity = int(inputs["mask"]["shape"][-1])
            self.empty = {
                name: np.zeros(told["shape"], told["dtype"])
                for name, told in inputs.items()
                if name.startswith("kv_cache")
            }
            # Types that are not taken show only now.
            self.vocabulary_size = len(self.step(self.empty, 0, 0)[0])
        except (ValueError, RuntimeError, StopIteration, KeyError) as error:
            raise UserError(f"{path}: LiteRT cannot open it: {error}") from error

    def next_token_logits(self, prompts: Sequence[Tokens]) -> Iterator[np.ndarray]:
        """Yield the logits behind each prompt's last token, in order: (vocabulary,), float32."""
        longest = max(map(len, prompts))
        if longest + self.chunk > self.capacity:
            raise UserError(
                f"a prompt of {longest} tokens does not fit: the file was exported for"
                f" {self.capacity - self.chunk}; export it again"
            )
        prefix = common_prefix(prompts)
        shared = self.fill(self.empty, 0, prefix)
        for prompt in prompts:
            cache = self.fill(shared, len(prefix), prompt[len(prefix) : -1])
            yield self.step(cache, len(prompt) - 1, prompt[-1])[0]

    def fill(self, cache: Cache, start: int, tokens: Tokens) -> Cache:
        """Return keys and values of `tokens`, from position `start` on, behind those of the cache."""
        for begin in range(0, len(tokens), self.chunk):
            piece = list(tokens[begin : begin + self.chunk])
            padded = np.zeros((1, self.chunk), np.int32)
            padded[0, : len(piece)] = piece
            cache = self._run(self.prefill, cache, start + begin, padded)
        return cache

    def step(self, cache: Cache, position: int, token: int) -> tuple[np.ndarray, Cache]:
        """Return the logits behind one token, and the cache with it."""
        outputs = self._run(self.decode, cache, position, np.array([[token]], np.int32))
        return outputs.pop("logits")[0, -1], outputs

    def _run(self, signature: Any, cache: Cache, start: int, tokens: np.ndarray) -> Cache:
        positions = np.arange(start, start + tokens.shape[1], dtype=np.int32)
        seen = np.arange(self.capacity) <= positions[:, None]
        mask = np.where(seen, np.float32(0), MASKED)[None, None]
        return signature(tokens=tokens, input_pos=positions, mask=mask, **cache)
