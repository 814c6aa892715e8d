"""Score a GGUF file on the evaluation rows, in llama.cpp, the runtime that will serve it.

Input   a GGUF file; the folder tokens/; F16's answers over the whole vocabulary, to compare with
Output  metrics JSON; predictions parquet; for F16 itself, its answers over the whole vocabulary
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from pockettune.data.prompts import Example
from pockettune.evaluation import stages
from pockettune.evaluation.beside_f16 import open_f16
from pockettune.evaluation.metrics import provenance
from pockettune.evaluation.text_stages import TextRuntime
from pockettune.gguf.files import describe_file
from pockettune.runtimes.generation import generate, logits_at
from pockettune.runtimes.greedy import answer_greedily, as_text
from pockettune.runtimes.llama import LlamaModel


@contextmanager
def open_gguf(
    arguments: argparse.Namespace, examples: Sequence[Example]
) -> Iterator[stages.Runtime]:
    """Open the file; llama.cpp tokenizes the prompts itself, as it will on the phone."""
    with LlamaModel(arguments.model, arguments.threads) as model:
        prompts = [model.tokenize(example.prompt) for example in examples]
        differing = sum(a != e.prompt_ids for a, e in zip(prompts, examples, strict=True))
        facts = {
            "size_bytes": arguments.model.stat().st_size,
            "stored": describe_file(arguments.model),
            "prompts_tokenized_otherwise": differing,
            "provenance": provenance("llama-cpp-python"),
        }
        yield stages.Runtime(
            model.next_token_logits,
            prompts,
            model.vocabulary_size,
            facts,
            partial(answer_greedily, model),
            partial(open_text, model, prompts),
        )


def open_text(model: LlamaModel, prompts: Sequence[Sequence[int]]) -> TextRuntime:
    """Return how the file answers with text."""
    return TextRuntime(
        prompts,
        partial(logits_at, model),
        partial(generate, model, ends=model.end_tokens()),
        partial(as_text, model),
        takes_grammar=True,
    )


if __name__ == "__main__":
    stages.run(__doc__, open_gguf, open_reference=open_f16)
