"""Makes of a GGUF file what a model folder holds of it: config.json and 16-bit weights.

What each architecture is in transformers' words was read off llama.cpp at 0c1e570: its converter
(conversion/) and what it computes (src/models/). The parity check of import_gguf.py proves it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pockettune.common.errors import UserError, list_faults
from pockettune.gguf.files import ROPE_FREQUENCIES, Tensor, read_gguf

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# llama.cpp's name of an architecture: transformers' name of it, and its causal language model.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length",
          "attention.head_count", "attention.layer_norm_rms_epsilon")  # fmt: skip
NEEDED_BY_TOKENIZER = {"gpt2": ("merges",), "llama": ("scores", "token_type", "bos_token_id", "unknown_token_id")}  # fmt: skip
REMEDY = "fetch or copy it again"
# What Llama 3.1 and 3.2 were made with; the file holds only what follows from it.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
GEMMA3_LAYERS_OF_27B = 62
ELEMENTS_A_STEP = 16_000_000  # dequantized at once, in fp32: 64 MB


@dataclass(frozen=True)
class Source:
    """A GGUF file whose header was read and found to be of a kind that can be imported."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    architecture: str

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry of the architecture's own metadata."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def open_source(path: Path) -> Source:
    """Read a GGUF file's header; UserError names what keeps the file from being imported."""
    metadata, tensors = read_gguf(path, REMEDY)
    architecture = metadata.get("general.architecture")
    source = Source(path, metadata, {tensor.name: tensor for tensor in tensors}, str(architecture))
    if faults := list(_faults(source)):
        raise UserError(f"model.path {path.name}: {list_faults(faults)}")
    return source


def _faults(source: Source) -> Iterator[str]:
    """Yield what keeps a file from being imported."""
    if (parts := source.metadata.get("split.count", 1)) > 1:
        yield (
            f"it is one of {parts} parts (split.count); join them with llama.cpp's"
            " llama-gguf-split --merge, then give the whole file"
        )
        return
    if source.architecture not in ARCHITECTURES:
        yield (
            f"architecture {source.architecture!r} is not one of {', '.join(ARCHITECTURES)};"
            " take the model's safetensors folder"
        )
        return
    yield from _missing_entries(source)
    if experts := source.get("expert_count"):
        yield f"a mixture of {experts} experts (expert_count) is not supported; take a dense model"
    keys = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
    if differing := [key for key in keys if isinstance(source.get(key), list)]:
        yield f"its layers differ in {', '.join(differing)}, which is not supported; take another file"
    kinds = {tensor.kind_name: tensor.kind for tensor in source.tensors.values()}
    if unread := sorted(name for name, kind in kinds.items() if not can_read(kind)):
        yield f"quantization {', '.join(unread)} cannot be read back; take a file of another type"


def _missing_entries(source: Source) -> Iterator[str]:
    """Yield the entries without which neither model nor tokenizer can be told."""
    kind = source.metadata.get("tokenizer.ggml.model")
    keys = [f"{source.architecture}.{key}" for key in NEEDED]
    keys += [f"tokenizer.ggml.{key}" for key in ("model", "tokens", "eos_token_id")]
    keys += [f"tokenizer.ggml.{key}" for key in NEEDED_BY_TOKENIZER.get(str(kind), ())]
    if missing := [key for key in keys if key not in source.metadata]:
        yield f"its metadata have no {', '.join(missing)}; take another file"


def can_read(kind: int) -> bool:
    """Whether the gguf package can dequantize a type; tried on one block of zeros."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block = np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1]), np.uint8)
    try:
        return bool(np.isfinite(gguf_dequantize(block, kind)).all())
    except NotImplementedError:
        return False


def gguf_dequantize(rows: np.ndarray, kind: int) -> np.ndarray:
    """Return rows of stored bytes as fp32; NotImplementedError where gguf cannot read the type."""
    from gguf import GGMLQuantizationType, dequantize

    return np.asarray(dequantize(rows, GGMLQuantizationType(kind)))


def file_type(source: Source) -> str:
    """Return the recipe that a file was quantized by, such as Q4_K_M, or its commonest type."""
    from gguf import LlamaFileType

    recipe = source.metadata.get("general.file_type")
    if recipe in list(LlamaFileType):
        return LlamaFileType(recipe).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    matrices = [t for t in source.tensors.values() if len(t.shape) > 1]
    names = [tensor.kind_name for tensor in matrices]
    return max(sorted(set(names)), key=names.count)


def make_config(source: Source) -> "PreTrainedConfig":
    """Return the model's config as transformers knows it; UserError where a part is unknown."""
    from transformers import AutoConfig

    kind, model_class = ARCHITECTURES[source.architecture]
    heads = source.get("attention.head_count")
    settings: dict[str, Any] = {
        "architectures": [model_class],
        "dtype": "float16",
        "vocab_size": len(source.metadata["tokenizer.ggml.tokens"]),
        "hidden_size": source.get("embedding_length"),
        "intermediate_size": source.get("feed_forward_length"),
        "num_hidden_layers": source.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.get("attention.head_count_kv", heads),
        "head_dim": head_width(source),
        "max_position_embeddings": source.get("context_length"),
        "rms_norm_eps": shortest(source.get("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(source),
        # llama.cpp stores the output projection only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in source.tensors,
        **{
            f"{name}_token_id": source.metadata.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    return AutoConfig.for_model(kind, **settings, **_own_settings(source))


def _own_settings(source: Source) -> dict[str, Any]:
    """Return what only one architecture has."""
    if source.architecture == "llama":
        return {
            "attention_bias": "blk.0.attn_q.bias" in source.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in source.tensors,
        }
    if source.architecture == "qwen3":
        return {"attention_bias": "blk.0.attn_q.bias" in source.tensors}
    if source.architecture == "gemma3":
        layers, window = source.get("block_count"), source.get("attention.sliding_window")
        narrow = narrow_layers(source.get("attention.sliding_window_pattern", 6), layers)
        # As in llama.cpp: the largest Gemma 3 scales by another width than the others.
        large = layers == GEMMA3_LAYERS_OF_27B
        width = source.get("embedding_length") // source.get("attention.head_count")
        return {
            "query_pre_attn_scalar": width if large else head_width(source),
            "sliding_window": window or source.get("context_length"),
            "layer_types": [
                "sliding_attention" if window and is_narrow else "full_attention"
                for is_narrow in narrow
            ],
            "final_logit_softcapping": source.get("final_logit_softcapping"),
        }
    return {}


def narrow_layers(pattern: int | Sequence[bool], layers: int) -> list[bool]:
    """Say of each layer whether it looks through a window; of every `pattern` the last does not."""
    if isinstance(pattern, int):
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    return [bool(narrow) for narrow in pattern]


def head_width(source: Source) -> int:
    """Return the width of an attention head; UserError where its parts are treated apart."""
    width = source.get("attention.key_length") or (
        source.get("embedding_length") // source.get("attention.head_count")
    )
    others = {
        key: source.get(key, width) for key in ("attention.value_length", "rope.dimension_count")
    }
    odd = [f"{key} is {other}, attention heads are {width} wide" for key, other in others.items() if other != width]  # fmt: skip
    if odd:
        raise UserError(f"model.path {source.path.name}: {list_faults(odd)}; take another file")
    return int(width)


def _rope(source: Source) -> dict[str, Any]:
    """Return how positions are turned into rotations."""
    scaling, factor = source.get("rope.scaling.type"), source.get("rope.scaling.factor")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": shortest(source.get("rope.freq_base", 10_000.0)),
    }
    if scaling == "linear" and factor and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": shortest(factor)}
    elif scaling not in (None, "none", "linear"):
        raise UserError(
            f"model.path {source.path.name}: rope scaling {scaling!r} is not supported, only linear"
            " and Llama 3's; take the model's safetensors folder"
        )
    if ROPE_FREQUENCIES in source.tensors:
        rope |= _llama3_rope(source, rope["rope_theta"])
    if source.architecture != "gemma3":
        return rope
    local = shortest(source.get("rope.freq_base_swa", 10_000.0))
    return {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _llama3_rope(source: Source, base: float) -> dict[str, Any]:
    """Return the parameters from which the divisors of the frequencies follow that a file stores."""
    stored = read_tensor(source, ROPE_FREQUENCIES)
    settings = {"rope_type": "llama3", "factor": shortest(stored.max()), **LLAMA3_ROPE}
    expected = llama3_divisors(base, head_width(source), settings)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-5):
        raise UserError(
            f"model.path {source.path.name}: its {ROPE_FREQUENCIES} are not those of Llama 3.1 or 3.2;"
            " take the model's safetensors folder"
        )
    return settings


def llama3_divisors(base: float, width: int, settings: Mapping[str, Any]) -> np.ndarray:
    """Return by what Llama 3.1 divides each of a head's frequencies: (width / 2,).

    1 where a wave is short, `factor` where it is long, between the two where it is in between
    (transformers 5.23, modeling_rope_utils._compute_llama3_parameters).
    """
    waves = 2 * np.pi * base ** (np.arange(0, width, 2) / width)  # tokens a turn
    turns = settings["original_max_position_embeddings"] / waves
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / settings["factor"] + share)


def shortest(value: Any) -> float:
    """Return a number that is stored as fp32 as a person wrote it: 1e-05, not 9.99999974738e-06."""
    return float(str(np.float32(value)))


def read_tensor(source: Source, name: str) -> np.ndarray:
    """Return a tensor of the file in fp32, last axis first as in PyTorch."""
    return np.concatenate(list(_read_steps(source, name))).reshape(source.tensors[name].shape[::-1])


def _read_steps(source: Source, name: str) -> Iterator[np.ndarray]:
    """Yield a tensor's rows in fp32, as many at a time as fit ELEMENTS_A_STEP."""
    tensor = source.tensors[name]
    rows = tensor.elements // tensor.shape[0]
    data = np.memmap(source.path, np.uint8, "r", tensor.start, (rows, tensor.size // rows))
    step = max(ELEMENTS_A_STEP // tensor.shape[0], 1)
    for begin in range(0, rows, step):
        block = np.ascontiguousarray(data[begin : begin + step])
        yield gguf_dequantize(block, tensor.kind)


def read_weights(source: Source, config: "PreTrainedConfig") -> dict[str, "torch.Tensor"]:
    """Return the model's weights as F16 by the names they have in transformers.

    F16 and not bf16: a dequantized weight is an F16 scale times a small whole number, which F16's
    11 bits round by 0.02 % and bf16's 8 by 0.2 %; and merging and llama.cpp's F16 file round to F16
    anyway. bf16's one advantage is its range, so a weight that F16 cannot hold is refused.
    """
    import torch

    expected = _expected(source, config)
    weights, large = {}, []
    for name, (stored, shape) in expected.items():
        values = np.empty((np.prod(shape[:1], dtype=int), *shape[1:]), np.float16)
        filled = 0
        for block in _read_steps(source, stored):
            shifted = block - 1 if is_shifted(source, stored) else block
            # NaN and infinity too: the comparison fails.
            if not (np.abs(shifted) <= np.finfo(np.float16).max).all():
                large.append(name)
                break
            flat = values.reshape(-1)
            flat[filled : filled + shifted.size] = shifted.reshape(-1)
            filled += shifted.size
        weights[name] = torch.from_numpy(unpermute(source, stored, values))
    if large:
        raise UserError(
            f"model.path {source.path.name}: weights that F16 cannot hold (NaN, or beyond 65504) in"
            f" {list_faults(large)}; take another file, or the model's safetensors folder"
        )
    return weights


def _expected(source: Source, config: "PreTrainedConfig") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return, by its name in transformers, each weight's name in the file, and its shape.

    UserError where the file has not exactly the tensors that the model consists of.
    """
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kind = next(k for k, name in MODEL_ARCH_NAMES.items() if name == source.architecture)
    known = get_tensor_name_map(kind, config.num_hidden_layers)
    expected = {
        name: (str(known.get_name(name, (".weight", ".bias"))), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    needed = {stored: shape for stored, shape in expected.values()}
    found = {name: tensor.shape[::-1] for name, tensor in source.tensors.items()
             if name != ROPE_FREQUENCIES}  # fmt: skip
    faults = [f"{name} is missing" for name in needed.keys() - found.keys()]
    faults += [f"{name} is no part of this architecture" for name in found.keys() - needed.keys()]
    faults += [f"{name} is {found[name]}, not {shape}" for name, shape in needed.items()
               if found.get(name, shape) != shape]  # fmt: skip
    if faults:
        raise UserError(
            f"model.path {source.path.name}: its tensors are not those of its architecture"
            f" {source.architecture}: {list_faults(sorted(faults))}"
        )
    return expected


def is_shifted(source: Source, name: str) -> bool:
    """Whether the converter added one to a weight: Gemma's norms multiply by 1 + weight."""
    return source.architecture == "gemma3" and name.endswith("norm.weight")


def unpermute(source: Source, name: str, weight: np.ndarray) -> np.ndarray:
    """Put the rows of llama's queries and keys back.

    llama.cpp rotates neighbouring rows of a head, transformers row i with row i + half; the
    converter lays the one out of the other for llama, not for qwen2, qwen3 and gemma3.
    """
    part = name.rsplit(".", 2)[-2]
    if source.architecture != "llama" or part not in ("attn_q", "attn_k"):
        return weight
    heads = source.get("attention.head_count")
    if part == "attn_k":
        heads = source.get("attention.head_count_kv", heads)
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
