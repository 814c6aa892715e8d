"""What a grammar allows next, in llama.cpp's own notation (GBNF) and by its own code, as on the phone."""

import codecs
import ctypes
from collections.abc import Collection, Iterator

import llama_cpp
import numpy as np

from pockettune.common.errors import UserError
from pockettune.runtimes.llama import LlamaModel

CANDIDATE = np.dtype([("id", "i4"), ("logit", "f4"), ("p", "f4")])  # llama_token_data

# How many of the likeliest tokens are asked about, until one is allowed; in the end all are.
ASKED = (64, 4096)


class Grammar:
    """Where one answer stands in a grammar. Opened once, and reset for each answer."""

    def __init__(self, model: LlamaModel, text: str, ends: Collection[int]) -> None:
        """Read a grammar whose start is `root`; `ends` are the tokens that may end an answer."""
        self.model, self.ends = model, ends
        # llama.cpp asks a grammar whether it may end for tokens that it knows as ends. One that it does not
        # know would count as its text, so all are asked about in the name of one.
        known = [*ends, *(model.special_token(name) for name in ("eot", "eos"))]
        stops = [t for t in known if t is not None and model.stops_at(t)]
        if not stops:
            raise UserError("grammar: the model's file names no token that ends an answer")
        self.end = stops[0]
        root = b"root"
        self.sampler = llama_cpp.llama_sampler_init_grammar(model.vocabulary, text.encode(), root)
        if not self.sampler:
            raise UserError(
                "grammar: llama.cpp cannot read it; its own words are in the log. It must have a rule"
                " root, and no rule that begins with itself"
            )
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self.sampler)

    def reset(self) -> None:
        """Begin a new answer."""
        self.decoder.reset()
        llama_cpp.llama_sampler_reset(self.sampler)

    def accept(self, token: int) -> None:
        """Go on behind a token that was allowed and does not end the answer."""
        self.decoder.decode(self.model.piece(token, special=True))
        llama_cpp.llama_sampler_accept(self.sampler, token)

    def likeliest(self, logits: np.ndarray) -> int:
        """Return the likeliest token that is allowed; of equal ones the first.

        As llama.cpp's common_sampler_sample asks first about the likeliest of all, which seldom is not
        allowed; asking about the whole vocabulary takes as long as a small model's forward pass.
        """
        for tokens in candidates(logits):
            allowed = tokens[self.allows(tokens)]
            for token in map(int, allowed):
                # An end that is not one of ours would be followed by nothing.
                if self.may_end() if token in self.ends else not self.model.stops_at(token):
                    return token
        raise UserError(
            "grammar: no token of the model's vocabulary can follow; it must be able to end"
        )

    def may_end(self) -> bool:
        """Whether the last character is whole.

        Behind a token that ends one character and begins the next, llama.cpp (0c1e570) forgets that.
        """
        begun, _ = self.decoder.getstate()
        return not begun

    def allows(self, tokens: np.ndarray) -> np.ndarray:
        """Return for each token whether it may come next."""
        asked = np.zeros(len(tokens), CANDIDATE)
        asked["id"] = np.where(np.isin(tokens, list(self.ends)), self.end, tokens)
        pointer = asked.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(pointer, len(asked), -1, False)
        llama_cpp.llama_sampler_apply(self.sampler, ctypes.byref(array))
        allowed: np.ndarray = np.isfinite(asked["logit"])
        return allowed


def candidates(logits: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the likeliest token, then more and more of the likeliest, likeliest first, up to all."""
    yield np.array([logits.argmax()])
    for count in (n for n in ASKED if n < len(logits)):
        # All that are as likely as the last of them, so that which of equals comes first is settled.
        least = np.partition(logits, -count)[-count]
        tokens = np.flatnonzero(logits >= least)
        yield tokens[np.argsort(-logits[tokens], kind="stable")]
    yield np.argsort(-logits, kind="stable")
