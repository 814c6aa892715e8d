"""Writes a model folder of some of another's tokens: its tokenizer files, its configuration, its rows."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.models.folder import EMBEDDINGS, embedding_rows
from pockettune.models.kept_tokens import split_merge
from pockettune.models.layers import NUMBER
from pockettune.models.shards import Stored, list_stored, write_shards

Json = dict[str, Any]

HEADS = ("lm_head", "embed_out")  # Llama and most, GPT-NeoX
# Keys of configurations that hold ids of tokens, or lists of them: of what they name, of what is never said.
NAMED = ("_token_id", "_token_ids", "_token_index")
OF_TOKENS = (*NAMED, "bad_words_ids", "suppress_tokens")


def trim_weights(model: Path, kept: Sequence[int], output: Path) -> None:
    """Write the weights with the rows of `kept` tokens alone; all else is copied as it is.

    Raises UserError where another tensor than embedding and head has a row for each token.
    """
    refuse_other_tensors(model)
    rows = torch.tensor(kept)

    def make(name: str, stored: Stored) -> torch.Tensor:
        return stored.load()[rows] if is_of_tokens(name) else stored.load()

    write_shards({stored.name: stored for stored in list_stored(model)}, make, output)


def refuse_other_tensors(model: Path) -> None:
    """Raise UserError where another tensor than embedding and head has a row for each token."""
    rows = embedding_rows(model)
    other = sorted(
        stored.name
        for stored in list_stored(model)
        if stored.shape[:1] == (rows,)
        and not (is_of_tokens(stored.name) or NUMBER.search(stored.name))
    )
    if other:
        raise UserError(
            f"vocabulary.keep task: {', '.join(other)} of {model} has a row for each token and is neither"
            " embedding nor head; set vocabulary.keep to full"
        )


def trimmed_bytes(model: Path, kept: Sequence[int]) -> int:
    """Return the bytes of the weights that `trim_weights` writes."""
    left = len(kept) / embedding_rows(model)
    return sum(
        round(2 * stored.elements * (left if is_of_tokens(stored.name) else 1))
        for stored in list_stored(model)
    )


def is_of_tokens(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)


def trim_tokenizer(content: Json, kept: Mapping[int, int]) -> Json:
    """Return tokenizer.json with the `kept` tokens alone: id -> id in the new vocabulary."""
    trimmed = copy.deepcopy(content)
    model = trimmed["model"]
    vocabulary = {t: kept[number] for t, number in model["vocab"].items() if number in kept}
    model["vocab"] = vocabulary
    # Their order is their rank.
    model["merges"] = [merge for merge in model["merges"] if may_join(merge, vocabulary)]
    trimmed["added_tokens"] = [
        {**token, "id": kept[token["id"]]}
        for token in trimmed["added_tokens"]
        if token["id"] in kept
    ]
    if padding := trimmed.get("padding"):
        own = kept.get(padding["pad_id"])
        trimmed["padding"] = None if own is None else {**padding, "pad_id": own}
    if trimmed.get("post_processor"):
        renumber_processor(trimmed["post_processor"], kept)
    return trimmed


def may_join(merge: str | Sequence[str], vocabulary: Mapping[str, int]) -> bool:
    """Whether both halves of a merge, and what they make, are in a vocabulary."""
    left, right = split_merge(merge)
    return left in vocabulary and right in vocabulary and left + right in vocabulary


def renumber_processor(processor: Json, kept: Mapping[int, int]) -> None:
    """Give what puts special tokens around a text their new ids, in place."""
    for inner in processor.get("processors", []):
        renumber_processor(inner, kept)
    for token in (processor.get("special_tokens") or {}).values():  # TemplateProcessing
        token["ids"] = [kept[number] for number in token["ids"]]
    for key in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if key in processor:
            processor[key] = [processor[key][0], kept[processor[key][1]]]


def renumber(content: Any, kept: Mapping[int, int]) -> Any:
    """Return a configuration with the new ids; an id that is not kept becomes None, or leaves its list."""
    if isinstance(content, list):
        return [renumber(value, kept) for value in content]
    if not isinstance(content, dict):
        return content
    return {
        key: map_ids(value, kept) if key.endswith(OF_TOKENS) else renumber(value, kept)
        for key, value in content.items()
    }


def map_ids(value: Any, kept: Mapping[int, int]) -> Any:
    """Return an id or a list of them; a sequence in a list, such as a bad word's, stays whole or leaves it."""
    if isinstance(value, list):
        mapped = [map_ids(number, kept) for number in value]
        whole = [isinstance(v, int) or len(m) == len(v) for v, m in zip(value, mapped, strict=True)]
        return [m for m, is_whole in zip(mapped, whole, strict=True) if is_whole and m is not None]
    return kept.get(value) if isinstance(value, int) else value


def named_ids(config: Any) -> Iterator[int]:
    """Yield the ids that a configuration names, such as eos_token_id's."""
    if isinstance(config, list):
        for value in config:
            yield from named_ids(value)
    elif isinstance(config, dict):
        for key, value in config.items():
            if key.endswith(NAMED):
                several = value if isinstance(value, list) else [value]
                yield from (number for number in several if isinstance(number, int))
            else:
                yield from named_ids(value)


def trim_config(config: Json, kept: Mapping[int, int]) -> Json:
    """Return config.json of a model with `kept` tokens; the text's part of it, where that lies apart."""
    trimmed: Json = renumber(config, kept)
    for part in (trimmed, trimmed.get("text_config")):
        if part and "vocab_size" in part:
            part["vocab_size"] = len(kept)
    return trimmed


def trim_tokenizer_config(content: Json, kept: Mapping[int, int]) -> Json:
    """Return tokenizer_config.json, whose added_tokens_decoder goes by id."""
    decoder = content.get("added_tokens_decoder")
    if decoder is None:
        return content
    left = {str(kept[int(n)]): token for n, token in decoder.items() if int(n) in kept}
    return {**content, "added_tokens_decoder": left}


def trim_sentencepiece(data: bytes, kept: Mapping[int, int]) -> bytes:
    """Return tokenizer.model with the kept pieces alone, in their order.

    A message of sentencepiece_model.proto in protocol buffers' encoding, of which field 1, a piece,
    repeats. What it says of special tokens it says by their text.
    """
    fields: list[bytes] = []
    pieces = 0
    for number, field in split_fields(data):
        if number == 1:
            pieces += 1
            if pieces - 1 not in kept:
                continue
        fields.append(field)
    return b"".join(fields)


def split_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each field of a message that consists of messages, and its bytes."""
    at = 0
    while at < len(data):
        begin = at
        key, at = read_varint(data, at)
        if key & 7 != 2:
            raise UserError(
                f"tokenizer.model: byte {begin} begins no message; fetch the model again"
            )
        length, at = read_varint(data, at)
        at += length
        yield key >> 3, data[begin:at]


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number that is written in groups of seven bits, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def trim_files(model: Path, kept: Sequence[int], output: Path) -> None:
    """Write the tokenizer's files and the configurations of a folder for the `kept` tokens, ascending."""
    new = {number: place for place, number in enumerate(kept)}
    changes: dict[str, Callable[[Json, Mapping[int, int]], Json]] = {
        "config.json": trim_config,
        "generation_config.json": renumber,
        "tokenizer.json": trim_tokenizer,
        "tokenizer_config.json": trim_tokenizer_config,
        "added_tokens.json": lambda told, new: {t: new[n] for t, n in told.items() if n in new},
    }
    for name, change in changes.items():
        if (model / name).is_file():
            program.write_json(output / name, change(program.read_json(model / name), new))
    sentencepiece = model / "tokenizer.model"
    if sentencepiece.is_file():
        (output / sentencepiece.name).write_bytes(
            trim_sentencepiece(sentencepiece.read_bytes(), new)
        )
    for name in ("special_tokens_map.json", "chat_template.jinja"):  # by text
        if (model / name).is_file():
            (output / name).write_bytes((model / name).read_bytes())
