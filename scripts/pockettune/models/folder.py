"""Checks a model folder before hours are spent on it, and loads it."""

import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError, list_faults

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# The last part of the embedding's name: Llama and most, GPT-2, GPT-NeoX, BLOOM and Falcon, Nemotron-H.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")

INDEX = "model.safetensors.index.json"

# What a tokenizer may consist of; carried unchanged from the base to the merged model.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt",
                   "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
                   "chat_template.jinja", "generation_config.json")  # fmt: skip


def check_model_folder(folder: Path) -> None:
    """Raise UserError naming all that keeps a folder from being a usable base model.

    Looks at config.json, at each safetensors file's header and length (format:
    https://github.com/huggingface/safetensors, README at v0.8.0) and at whether the tokenizer
    fits the embedding. Reads no weights, so it takes no time.
    """
    faults = list(_missing_files(folder))
    if not faults:
        faults = _config_faults(folder) + _weight_faults(folder)
    if not faults:
        faults = _tokenizer_faults(folder)
    if faults:
        raise UserError(f"model {folder}: {list_faults(faults)}")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would load, in a fixed order.

    Those that the index names, or model.safetensors; else all, as of an adapter. Others beside them,
    such as Mistral's consolidated.safetensors, are the same weights once more.
    """
    single = folder / "model.safetensors"
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        named = {folder / Path(str(name)).name for name in index["weight_map"].values()}
        return sorted(path for path in named if path.is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one told later
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header: name -> {"dtype", "shape", "data_offsets"}.

    Raises ValueError where the file is not safetensors or its end is missing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)  # little-endian length of the JSON header that follows
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise ValueError("is not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("is not a safetensors file") from error
    if size != expected:
        raise ValueError(f"is truncated: {size:,} of {expected:,} bytes; fetch or copy it again")
    return header


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor that a model folder stores, by name."""
    headers = [read_header(path) for path in weight_files(folder)]
    return {name: entry["shape"] for header in headers for name, entry in header.items()}


def count_parameters(folder: Path) -> int:
    """Return how many weights a model folder stores."""
    return sum(map(math.prod, tensor_shapes(folder).values()))


def embedding_shape(shapes: Mapping[str, list[int]]) -> list[int] | None:
    """Return the embedding's (rows, width) among a model's tensors; None where none is known."""
    names = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS
    ]
    return shapes[min(names, key=len)] if names else None


def embedding_rows(folder: Path) -> int:
    """Return the rows of a model's embedding, which fetch_model.py saw that it has."""
    shape = embedding_shape(tensor_shapes(folder))
    assert shape is not None
    return shape[0]


def read_kept(vocabulary: Path | None) -> list[int] | None:
    """Return the ids that trim_vocabulary.py kept, in the order of their new ones; None without its file."""
    if vocabulary is None:
        return None
    return list(json.loads(vocabulary.read_text(encoding="utf-8"))["kept"])


def _missing_files(folder: Path) -> list[str]:
    missing = [
        f"{name} is missing"
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
        if not (folder / name).is_file()
    ]
    if not weight_files(folder):
        pickles = [path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")]]
        why = f" ({', '.join(pickles)} is refused: loading it can run code)" if pickles else ""
        if files := sorted(path.name for path in folder.glob("*.gguf")):
            why = f" (model.path may be a GGUF file itself: {folder.name}/{files[0]})"
        missing.append(f"no *.safetensors weights{why}")
    # transformers would apply it unasked, and train and merge another model than the base.
    if adapter := sorted(path.name for path in folder.glob("adapter_*")):
        missing.append(f"{', '.join(adapter)}: an adapter lies beside the base; move it elsewhere")
    return missing


def _config_faults(folder: Path) -> list[str]:
    """Look for auto_map, in tokenizer_config.json too: llama.cpp's converter would run what it names.

    Weights that are packed for another library are no matrices to merge into.
    """
    faults = []
    for path in sorted(folder.glob("*config.json")):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            faults.append(f"{path.name} is not JSON: {error}")
            continue
        if not isinstance(config, dict):
            faults.append(f"{path.name} is not a JSON object")
        elif "auto_map" in config:
            faults.append(f"{path.name} asks to run the model's own code (auto_map), which is refused")  # fmt: skip
        elif "quantization_config" in config:
            method = dict(config["quantization_config"] or {}).get("quant_method", "unknown")
            faults.append(f"its weights are quantized ({method}); take the model's 16-bit weights")
    return faults


def _weight_faults(folder: Path) -> list[str]:
    faults = []
    for path in weight_files(folder):
        try:
            read_header(path)
        except ValueError as error:
            faults.append(f"{path.name} {error}")
    index = folder / INDEX
    if index.is_file() and not faults:
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{index.name} cannot be read"]
        absent = sorted(named - {path.name for path in weight_files(folder)})
        faults += [f"{name}, which {index.name} names, is not in the folder" for name in absent]
    return faults


def _tokenizer_faults(folder: Path) -> list[str]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        return [f"tokenizer.json cannot be read: {error}"]
    shape = embedding_shape(tensor_shapes(folder))
    if shape is None:
        return [
            f"the weights hold no embedding (a matrix named {', '.join(EMBEDDINGS)}):"
            " not an architecture that this workflow knows"
        ]
    highest = max(_ids_in_use(folder, tokenizer))
    if highest >= shape[0]:
        return [
            f"the tokenizer does not fit: its ids go up to {highest}, the embedding has {shape[0]} rows;"
            " take tokenizer and weights from the same model"
        ]
    return []


def context_length(folder: Path) -> int | None:
    """Return the most tokens that a model folder's config.json says the model can hold, if it does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)  # apart where the model also sees, as Gemma 3 4B
    return text.get("max_position_embeddings") or text.get("n_positions")  # GPT-2's name for it


def _ids_in_use(folder: Path, tokenizer: "Tokenizer") -> list[int]:
    """Return the vocabulary's ids, and those of added tokens that a file beside it names.

    Gemma 3's text models have a token for images beyond their embedding, which nothing names.
    """
    used = list(tokenizer.get_vocab(with_added_tokens=False).values())
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = folder / "chat_template.jinja"
    told = [str(config.get(key) or "") for key in ("bos_token", "eos_token", "pad_token", "chat_template")]  # fmt: skip
    if template.is_file():
        told.append(template.read_text(encoding="utf-8"))
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if any(token.content in text for text in told):
            used.append(number)
    return used


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files byte for byte.

    Saving it through transformers would rewrite them, and llama.cpp's converter recognises a
    tokenizer by what the original files make of a test text.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a model folder's tokenizer; UserError where it has no usable chat template or end of turn."""
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise UserError(f"model {folder}: no chat template; take the Instruct version of the model")
    try:
        _compile_jinja_template(tokenizer.get_chat_template())
    except Exception as error:  # no Jinja, or several templates of which none is the default
        raise UserError(f"model {folder}: its chat template cannot be used: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {folder}: the tokenizer names no eos_token, so answers never end")
    return tokenizer


def published_name(folder: Path) -> str:
    """Return a base model's name on its hub; of a local one, its folder's or file's name."""
    source = folder / "source.json"
    told = json.loads(source.read_text(encoding="utf-8")) if source.exists() else {}
    return str(told.get("name") or folder.name.rpartition("@")[0] or folder.name)


def check_unchanged(folder: Path) -> None:
    """Raise UserError where a base model's weights are not those that fetch_model.py wrote down.

    Done wherever weights are loaded, because Snakemake looks at a folder's time and not into it:
    training, merging, evaluating and comparing each read all of them anyway.
    """
    source = folder / "source.json"
    fetched = json.loads(source.read_text(encoding="utf-8"))["sha256"] if source.exists() else {}
    for name, expected in fetched.items():
        actual = sha256(folder / name) if (folder / name).is_file() else "none"
        if actual != expected:
            raise UserError(
                f"model {folder}: {name} has changed since it was fetched: SHA-256 {actual[:12]}…,"
                f" then {expected[:12]}…; remove the folder and run again, so that it is fetched anew"
            )


def load_model(folder: Path, *, attention: str = "eager", **options: Any) -> "torch.nn.Module":
    """Load a causal language model from a local folder; options are from_pretrained's.

    `attention` is by default the one that every architecture has (Gemma 2 has no other).

    Raises UserError where the weights have changed since they were fetched.
    """
    check_unchanged(folder)
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        attn_implementation=attention,
        **options,
    )
    return model
