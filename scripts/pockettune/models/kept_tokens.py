"""Which tokens of a BPE vocabulary a task needs, and what must stay with them.

A merge joins two neighbouring tokens into a third, the lowest-ranked pair of a text first. Let S be the
merges that were applied to some texts. Every set of merges that contains S, in the same order, gives those
texts the same tokens: by induction the lowest-ranked pair of all is in S, so it is the lowest-ranked of
the fewer too, and where no pair of all can be joined, none of the fewer can. So it is enough to keep what
the texts consist of and, over and over, both halves of every merge that makes a kept token. Llama.cpp's
SentencePiece joins any two tokens whose text is a third, by score; those are the merges of its
tokenizer.json, and the same holds.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import regex
from tokenizers import Tokenizer, pre_tokenizers

from pockettune.common.errors import UserError

Json = dict[str, Any]
Merge = tuple[str, str]

# Rows of the embedding that no text uses; Gemma 3 has 6,242 of them, Llama 3 251.
RESERVED = re.compile(r"<unused\d+>|<\|reserved_special_token_\d+\|>|\[unused\d+\]|\[PAD\d+\]")
MULTIPLE = 64  # rows: what kernels that interleave rows like


class Vocabulary:
    """A tokenizer.json of byte-level BPE, or of SentencePiece's BPE with bytes.

    Raises UserError, with `name` in it, where it is of another kind.
    """

    def __init__(self, content: Json, name: str) -> None:
        self.content, model = content, content["model"]
        marks = [
            key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)
        ]
        if model["type"] != "BPE" or marks:
            raise UserError(
                f"vocabulary.keep task: the tokenizer of {name} is {' with '.join([model['type'], *marks])},"
                " not BPE as those of Qwen, Llama 3, SmolLM2 and Gemma are; set vocabulary.keep to full"
            )
        self.ids: dict[str, int] = model["vocab"]
        self.added = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
        self.merges = [split_merge(merge) for merge in model["merges"]]
        fallback = {f"<0x{byte:02X}>" for byte in range(256)}
        if model.get("byte_fallback") and fallback <= self.ids.keys():
            self.bytes = fallback
        elif '"ByteLevel"' in json.dumps(content.get("pre_tokenizer")):
            # SmolLM2 has none for 21 bytes: what they are in is lost to it before as after.
            self.bytes = set(pre_tokenizers.ByteLevel.alphabet()) & self.ids.keys()
        else:
            raise UserError(
                f"vocabulary.keep task: the tokenizer of {name} does not take an unknown text apart into"
                " bytes, so without its tokens it would be lost; set vocabulary.keep to full"
            )

    def needed(self, named: str) -> set[str]:
        """Return what every text may need: bytes, ASCII characters, and added tokens.

        Reserved ones only where they are `named`: in the text of the tokenizer's configuration.
        """
        unknown = self.content["model"].get("unk_token") or ""
        single = {chr(code) for code in range(128)} | {"▁", unknown}
        own = {text for text in self.added if not RESERVED.fullmatch(text) or text in named}
        return self.bytes | (single & self.ids.keys()) | own

    def of_scripts(self, scripts: Sequence[str]) -> set[str]:
        """Return the tokens that are words or characters of one of some Unicode scripts.

        Beside its letters such a token may hold what scripts share: spaces, digits, punctuation.
        """
        if not scripts:
            return set()
        shared = r"\p{Script=Common}\p{Script=Inherited}"
        pattern = regex.compile(
            "|".join(f"[{shared}]*\\p{{Script={s}}}[{shared}\\p{{Script={s}}}]*" for s in scripts)
        )
        decoder = Tokenizer.from_str(json.dumps(self.content)).decoder
        texts = {text: decoder.decode([text]) for text in self.ids.keys() - self.added.keys()}
        return {text for text, shown in texts.items() if pattern.fullmatch(shown)}

    def most_frequent(self, count: int) -> set[str]:
        """Return the tokens that the first `count` merges make: the commonest when it was trained."""
        return {"".join(merge) for merge in self.merges[:count]}

    def close(self, kept: Iterable[str]) -> set[str]:
        """Return tokens with the halves of every merge that makes them, over and over."""
        closed: set[str] = set()
        waiting = list(kept)
        while waiting:
            token = waiting.pop()
            if token not in closed:
                closed.add(token)
                waiting += self.halves.get(token, ())
        return closed

    @cached_property
    def halves(self) -> dict[str, list[str]]:
        """Both halves of every merge that makes a token."""
        halves: dict[str, list[str]] = {}
        for merge in self.merges:
            halves.setdefault("".join(merge), []).extend(merge)
        return halves

    def fill_up(self, kept: set[str], rows: int) -> set[str]:
        """Return up to MULTIPLE - 1 more tokens, the commonest first, so that rows come in that many.

        `rows` are the embedding's: tokens beyond, as Gemma 3's for images, have none. Only
        tokens are added of which all halves are kept, as of the others.
        """
        missing, known = -len(kept) % MULTIPLE, set(kept)
        for merge in self.merges:
            if len(known) == len(kept) + missing:
                break
            token = "".join(merge)
            if known.issuperset(self.halves[token]) and self.number(token) < rows:
                known.add(token)
        return known - kept

    def number(self, token: str) -> int:
        return self.ids[token] if token in self.ids else self.added[token]

    def numbers(self, tokens: Iterable[str], rows: int) -> list[int]:
        """Return the ids of tokens, ascending, of those that the embedding has a row for."""
        return sorted(number for number in set(map(self.number, tokens)) if number < rows)


def split_merge(merge: str | Sequence[str]) -> Merge:
    """Return the halves of a merge, which tokenizer.json has as a pair or parted by a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def choose_tokens(
    vocabulary: Vocabulary,
    emitted: Iterable[int],
    settings: Mapping[str, Any],
    rows: int,
    named: str = "",
    special: Iterable[int] = (),
) -> tuple[list[int], dict[str, int]]:
    """Return the ids to keep, ascending, and how many each reason added.

    `emitted` are the ids that train's texts, prompts and answers consist of, `settings` the section
    `vocabulary`, `rows` those of the embedding, `named` the text that names special tokens, `special` ids that
    configurations name.
    """
    by_id = {number: text for text, number in (vocabulary.ids | vocabulary.added).items()}
    kept: set[str] = set()
    reasons = {}
    steps = {
        "needed": lambda: vocabulary.needed(named) | {by_id[n] for n in special if n in by_id},
        "train": lambda: {by_id[number] for number in emitted},
        "scripts": lambda: vocabulary.of_scripts(settings["scripts"]),
        "frequent": lambda: vocabulary.most_frequent(settings["frequent"]),
        "halves": lambda: vocabulary.close(kept),
        "filled": lambda: vocabulary.fill_up(kept, rows),
    }
    for reason, tokens in steps.items():
        before = len(kept)
        kept |= tokens()
        reasons[reason] = len(kept) - before
    return vocabulary.numbers(kept, rows), reasons
