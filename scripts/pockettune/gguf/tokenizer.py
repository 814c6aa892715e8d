"""Makes of a GGUF file's metadata the tokenizer files of a model folder.

The ids must be those that llama.cpp gives, before the import and after the conversion back. So
tokenizer.json is built from what llama.cpp at 0c1e570 does (src/llama-vocab.cpp), and llama.cpp's
converter gets what it reads: tokenizer.json, or tokenizer.model of a SentencePiece vocabulary.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pockettune.common.errors import UserError

# tokenizer.ggml.token_type: gguf.TokenType, and SentencePiece's own numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PADDING = re.compile(r"\[PAD\d+\]")  # rows of the embedding that stand for no token

Metadata = Mapping[str, Any]
Json = dict[str, Any]


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}  # fmt: skip


def _words(digits: str) -> str:
    """Return the pattern of Qwen2 and Llama 3, which differ in how many digits stay together."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# What splits a text before byte-level BPE, by llama.cpp's name (tokenizer.ggml.pre).
PRE_TOKENIZERS: dict[str, list[Json]] = {
    "qwen2": [_split(_words(r"\p{N}")), _bytes(use_regex=False)],
    "llama-bpe": [_split(_words(r"\p{N}{1,3}")), _bytes(use_regex=False)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)],
    "gpt-2": [_bytes(use_regex=True)],
}
# Other names that llama.cpp has for the same.
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "gpt2": "gpt-2"}  # fmt: skip


def write_tokenizer(metadata: Metadata, template: str, name: str, folder: Path) -> None:
    """Write the tokenizer's files; `name` is the GGUF's, for errors.

    tokenizer.json, tokenizer_config.json and chat_template.jinja; tokenizer.model of a
    SentencePiece vocabulary. Raises UserError where llama.cpp's tokenizer is not one known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = byte_level_tokenizer(metadata, name)
    elif kind == "llama":
        tokenizer = sentencepiece_tokenizer(metadata)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(metadata))
    else:
        raise UserError(
            f"model.path {name}: tokenizer {kind!r} is not one of gpt2 (byte-level BPE), llama"
            " (SentencePiece); take the model's safetensors folder"
        )
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "tokenizer_config.json", tokenizer_config(metadata))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def pieces(metadata: Metadata) -> Iterator[tuple[int, str, int]]:
    """Yield id, text and type of each token, without the rows that only fill up the embedding."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    for number, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if not (kind == UNUSED and PADDING.fullmatch(text)):
            yield number, text, kind


def special_token(metadata: Metadata, key: str) -> str | None:
    """Return the text of bos, eos, unknown or padding, where the file names one."""
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return None if number is None else str(metadata["tokenizer.ggml.tokens"][number])


def adds_bos(metadata: Metadata) -> bool:
    """Whether llama.cpp puts a BOS before a prompt unasked."""
    if "tokenizer.ggml.bos_token_id" not in metadata:
        return False
    of_kind = metadata.get("tokenizer.ggml.model") == "llama" or pre_tokenizer_name(metadata) == "llama-bpe"  # fmt: skip
    return bool(metadata.get("tokenizer.ggml.add_bos_token", of_kind))


def pre_tokenizer_name(metadata: Metadata) -> str | None:
    name = metadata.get("tokenizer.ggml.pre")
    return ALIASES.get(str(name), name)


def name_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of what tokenizer.json splits a text by, if it is one known here."""
    own = tokenizer.get("pre_tokenizer") or {}
    steps = own.get("pretokenizers", [own])
    return next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)


def byte_level_tokenizer(metadata: Metadata, name: str) -> Json:
    """Return tokenizer.json of a byte-level BPE vocabulary."""
    pre = pre_tokenizer_name(metadata)
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"model.path {name}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not one of"
            f" {', '.join(PRE_TOKENIZERS)}; take the model's safetensors folder"
        )
    model = {
        "type": "BPE",
        "vocab": {text: number for number, text, _ in pieces(metadata)},
        "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        "ignore_merges": pre == "llama-bpe",  # a word that is a token is never taken apart
        "byte_fallback": False,
        "fuse_unk": False,
    }
    decoder = _bytes(use_regex=True)
    # Qwen's own tokenizers normalize, which llama.cpp leaves out and a GGUF file does not tell.
    normalizer = {"type": "NFC"} if pre == "qwen2" else None
    return tokenizer_json(metadata, model, normalizer, PRE_TOKENIZERS[pre], decoder)


def tokenizer_json(
    metadata: Metadata,
    model: Json,
    normalizer: Json | None,
    steps: Sequence[Json],
    decoder: Json,
) -> Json:
    """Put a tokenizer together."""
    whole = added_tokens(metadata, CONTROL, UNKNOWN, USER_DEFINED)
    several = {"type": "Sequence", "pretokenizers": list(steps)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **token} for number, token in whole],
        "normalizer": normalizer,
        "pre_tokenizer": several if len(steps) > 1 else steps[0] if steps else None,
        "post_processor": _bos_before(metadata) if adds_bos(metadata) else None,
        "decoder": decoder,
        "model": model,
    }


def added_tokens(metadata: Metadata, *kinds: int) -> Iterator[tuple[int, Json]]:
    """Yield the tokens of some types as tokenizers wants those that it is to match as a whole.

    As they are written, spaces being spaces, because llama.cpp looks for them in the raw text.
    """
    for number, text, kind in pieces(metadata):
        if kind in kinds:
            yield number, {"content": text, "special": kind != USER_DEFINED, "single_word": False,
                           "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip


def _bos_before(metadata: Metadata) -> Json:
    """Return what puts a BOS before a text where special tokens are asked for."""
    bos = special_token(metadata, "bos")
    number = metadata["tokenizer.ggml.bos_token_id"]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }  # fmt: skip


def tokenizer_config(metadata: Metadata) -> Json:
    """Return tokenizer_config.json: which tokens begin, end and fill up a text."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{name}_token": special_token(metadata, key) for name, key in keys.items()}
    architecture = metadata["general.architecture"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        **{name: text for name, text in named.items() if text is not None},
        "add_bos_token": adds_bos(metadata),
        "model_max_length": metadata.get(f"{architecture}.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    if metadata["tokenizer.ggml.model"] == "llama":
        # llama.cpp's converter learns from here, and from nowhere else, which pieces of
        # tokenizer.model are matched as a whole: line breaks, runs of spaces, tags.
        config["added_tokens_decoder"] = {
            str(number): token for number, token in added_tokens(metadata, CONTROL, USER_DEFINED)
        }
    return config


def sentencepiece_tokenizer(metadata: Metadata) -> Json:
    """Return tokenizer.json of a SentencePiece vocabulary (BPE, bytes for what it does not know)."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    begins_with_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    model = {
        "type": "BPE",
        "unk_token": special_token(metadata, "unknown"),
        "vocab": {text: number for number, text, _ in pieces(metadata)},
        "merges": [list(pair) for pair in find_merges(metadata)],
        "byte_fallback": True,
        "fuse_unk": True,
    }
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    return tokenizer_json(metadata, model, prepend if begins_with_space else spaces, [], decoder)


def find_merges(metadata: Metadata) -> list[tuple[str, str]]:
    """Return the pairs of tokens that make another, in the order in which SentencePiece joins them.

    It joins the neighbours whose token has the highest score, the leftmost first; which two they
    are, the file does not say, so every way to cut a token in two others is one.
    """
    scores = metadata["tokenizer.ggml.scores"]
    ordinary = {text: number for number, text, kind in pieces(metadata) if kind in (NORMAL, UNUSED)}
    found = [
        (-scores[number], number, at, (text[:at], text[at:]))
        for text, number in ordinary.items()
        for at in range(1, len(text))
        if text[:at] in ordinary and text[at:] in ordinary
    ]
    return [pair for *_, pair in sorted(found)]


def sentencepiece_model(metadata: Metadata) -> bytes:
    """Return tokenizer.model, which llama.cpp's converter takes tokens, scores and types from.

    A message of sentencepiece_model.proto (SentencePiece 0.2) in protocol buffers' encoding,
    written here because the sentencepiece package reads but cannot write it without protobuf.
    """
    scores = metadata["tokenizer.ggml.scores"]
    unknown = metadata["tokenizer.ggml.unknown_token_id"]
    encoded = []
    for number, text, kind in pieces(metadata):
        piece = text.replace(" ", "▁") if kind == USER_DEFINED else text
        kind = UNKNOWN if number == unknown else kind  # the converter marks Gemma's as control
        encoded.append(
            _text(1, piece) + b"\x15" + struct.pack("<f", scores[number]) + _number(3, kind)
        )
    trainer = [_number(3, 2), _number(4, len(encoded)), _number(35, 1)]  # BPE, size, byte_fallback
    for place, key in enumerate(("unknown", "bos", "eos", "padding")):
        token = special_token(metadata, key)
        trainer.append(_number(40 + place, metadata.get(f"tokenizer.ggml.{key}_token_id", -1)))
        trainer.append(_text(45 + place, token) if token else b"")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer = [_text(1, "identity"), _number(3, prefix), _number(4, 0), _number(5, 1)]
    return b"".join([*(_field(1, piece) for piece in encoded), _field(2, b"".join(trainer)),
                     _field(3, b"".join(normalizer))])  # fmt: skip


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value % 2**64)


def _text(field: int, value: str) -> bytes:
    return _field(field, value.encode())


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first."""
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])
