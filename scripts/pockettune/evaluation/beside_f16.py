"""Opens F16 in llama.cpp beside a stage of text, whose every token of the right answers is compared with it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from pockettune.evaluation.reading import LogitsAt
from pockettune.runtimes.generation import logits_at
from pockettune.runtimes.llama import LlamaModel


@contextmanager
def open_f16(arguments: argparse.Namespace) -> Iterator[LogitsAt | None]:
    """Open the file `arguments.reference`; nothing where there is none, as for F16 itself."""
    if arguments.reference is None:
        yield None
        return
    with LlamaModel(arguments.reference, arguments.threads) as model:
        yield partial(logits_at, model)
