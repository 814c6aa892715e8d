"""Whether two models mean the same tokens by the same ids, whatever files they are in."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from pockettune.gguf.files import read_gguf
from pockettune.gguf.tokenizer import pieces
from pockettune.models.folder import embedding_shape, tensor_shapes


def read_vocabulary(model: Path) -> dict[int, str]:
    """Return the text of each token of a model folder or a GGUF file, by id.

    "▁" is a space: a GGUF file has either where SentencePiece writes that sign.
    """
    if model.is_file():
        tokens = [(number, text) for number, text, _ in pieces(read_gguf(model)[0])]
    else:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokens = [(number, text) for text, number in tokenizer.get_vocab().items()]
    return {number: text.replace("▁", " ") for number, text in tokens}


def describe_difference(base: Path, others: Mapping[int, str]) -> str | None:
    """Say which of a base model's tokens another vocabulary has not, or by another id; None for none.

    Tokens beyond the base's embedding, as Gemma 3's for images, stand in no text.
    """
    shape = embedding_shape(tensor_shapes(base))
    own = {n: text for n, text in read_vocabulary(base).items() if not shape or n < shape[0]}
    differing = sorted(number for number, text in own.items() if others.get(number) != text)
    if not differing:
        return None
    first = differing[0]
    return (
        f"{len(differing):,} of {len(own):,} tokens differ, the first is {first},"
        f" {others.get(first)!r} and not {own[first]!r}"
    )
