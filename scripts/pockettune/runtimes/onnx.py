"""ONNX Runtime: computes the logits of a folder that export_onnx.py made.

The prompts' common start is computed once; what follows is computed prompt by prompt, because
ONNX Runtime's GroupQueryAttention takes no batch behind keys and values that are there already.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.common.errors import UserError
from pockettune.common.extras import as_numbers, use_extra
from pockettune.common.program import read_json
from pockettune.runtimes.batching import common_prefix

MODEL, WEIGHTS, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MADE = "pockettune.json"  # what a folder says of itself beside what the apps read
ERRORS_ONLY = 3  # of ONNX Runtime's levels of logging


@dataclass(frozen=True)
class Past:
    """Keys and values of the tokens so far, by the name of the input that takes them."""

    length: int
    values: Mapping[str, Any]


class OnnxModel:
    """A folder with an ONNX model, opened for scoring.

    Raises UserError where ONNX Runtime is older than the folder needs, or cannot load it.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.runtime = folder, require_runtime(folder)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = ERRORS_ONLY
        try:
            self.session = self.runtime.InferenceSession(
                str(folder / MODEL), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of several kinds, all of them ONNX Runtime's own
            told = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: ONNX Runtime cannot load it: {told}") from error
        told = read_json(folder / CONFIG)["model"]
        self.vocabulary_size = int(told["vocab_size"])
        self.stops = stop_tokens(folder)
        decoder = told["decoder"]
        self.shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
        outputs = [output.name for output in self.session.get_outputs()]
        self.outputs = sorted(outputs, key=lambda name: name != "logits")  # logits first

    def next_token_logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits behind each prompt's last token, in order: (vocabulary,), float32."""
        prefix = common_prefix(prompts)
        past = self.decode(prefix, self.nothing())[1] if prefix else self.nothing()
        for prompt in prompts:
            yield self.decode(prompt[len(prefix) :], past)[0]

    def nothing(self) -> Past:
        """Return the past of a prompt's first token."""
        empty = self.runtime.OrtValue.ortvalue_from_numpy(np.zeros(self.shape, np.float32))
        names = [name.replace("present.", "past_key_values.") for name in self.outputs[1:]]
        return Past(0, dict.fromkeys(names, empty))

    def decode(self, tokens: Sequence[int], past: Past) -> tuple[np.ndarray, Past]:
        """Return the logits behind the last of `tokens`, which follow `past`, and the past that includes them."""
        value = self.runtime.OrtValue.ortvalue_from_numpy
        length = past.length + len(tokens)
        inputs = {
            "input_ids": value(np.array([tokens], np.int64)),
            "attention_mask": value(np.ones((1, length), np.int64)),
            **past.values,
        }
        logits, *present = self.session.run_with_ort_values(self.outputs, inputs)
        # A copy: the whole array would stay in memory as long as its last row.
        return logits.numpy()[0, -1].copy(), Past(
            length, dict(zip(past.values, present, strict=True))
        )

    def generate_greedy(self, prompt: Sequence[int], limit: int) -> list[int]:
        """Return the likeliest continuation, up to the token that ends it or `limit` tokens."""
        generated: list[int] = []
        tokens, past = list(prompt), self.nothing()
        while len(generated) < limit and not (generated and generated[-1] in self.stops):
            logits, past = self.decode(tokens, past)
            tokens = [int(logits.argmax())]
            generated += tokens
        return generated


class OnnxTokenizer:
    """The tokenizer with which onnxruntime-genai reads a folder on a phone; not Hugging Face's."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = import_genai().Tokenizer(str(folder))

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt; special tokens written in it count as such."""
        return [int(token) for token in self.tokenizer.encode(text)]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a conversation as the folder's chat template writes it, to be answered."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages=json.dumps(list(messages)), add_generation_prompt=True
                )
            )
        except RuntimeError as error:
            return f"refused: {error}"

    def as_text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(np.array(tokens, np.int32)))


def import_genai() -> Any:
    """Return the package onnxruntime_genai, which then sends nothing to anyone."""
    use_extra("onnx")
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


def answer_greedily(
    model: OnnxModel, tokenizer: OnnxTokenizer, prompts: Sequence[Sequence[int]], limit: int
) -> list[str | None]:
    """Return each prompt's likeliest answer as text, without the token that ends it.

    None for an answer that does not end within `limit` tokens.
    """
    answers = [model.generate_greedy(prompt, limit) for prompt in prompts]
    return [tokenizer.as_text(a[:-1]) if a[-1] in model.stops else None for a in answers]


def stop_tokens(folder: Path) -> set[int]:
    """Return the tokens at which onnxruntime-genai ends an answer."""
    told = read_json(folder / CONFIG)["model"]["eos_token_id"]
    return set(told) if isinstance(told, list) else {told}


def require_runtime(folder: Path) -> Any:
    """Return the package onnxruntime; UserError where it is older than the folder needs."""
    use_extra("onnx")
    import onnxruntime

    check_runtime(folder, onnxruntime.__version__)
    return onnxruntime


def check_runtime(folder: Path, version: str) -> None:
    """Raise UserError where this ONNX Runtime is older than a folder's operators need."""
    made = read_json(folder / MADE) if (folder / MADE).is_file() else {}
    needed = made.get("needs", {}).get("onnxruntime", "0")
    if as_numbers(version) < as_numbers(needed):
        raise UserError(
            f"{folder}: made for ONNX Runtime {needed} or newer, this one is {version}, which lacks its"
            " operators; update onnxruntime (make onnx), on a phone the app's runtime"
        )


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return what a folder really stores, as gguf.files.describe_file tells of a GGUF file.

    tensors: count; tensor_types: what computes a matrix -> count; bits_per_weight: of all stored numbers
    over the merged model's parameters; embedding_type; embedding_share: None, because a tied head is the
    same matrix; fallback_share: 0, no type takes another's place; least_runtime: what a phone must have.
    """
    use_extra("onnx")
    import onnx

    model = onnx.load(str(folder / MODEL), load_external_data=False)
    made = read_json(folder / MADE)
    kinds: dict[str, int] = {}
    embedding = "FP32"
    for node in model.graph.node:
        bits = next((a.i for a in node.attribute if a.name == "bits"), 0)
        kind = f"INT{bits}" if bits else "FP32"
        if node.op_type in ("MatMul", "MatMulNBits"):
            kinds[kind] = kinds.get(kind, 0) + 1
        elif node.op_type in ("Gather", "GatherBlockQuantized") and "embed_tokens" in node.name:
            embedding = kind
    stored = (folder / WEIGHTS).stat().st_size
    return {
        "tensors": len(model.graph.initializer),
        "tensor_types": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "bits_per_weight": round(8 * stored / made["parameters"], 3),
        "embedding_type": embedding,
        "embedding_share": None,
        "fallback_share": 0.0,
        "least_runtime": f"ONNX Runtime {made['needs']['onnxruntime']}",
    }
