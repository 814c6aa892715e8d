"""Score a .tflite file on the evaluation rows, in LiteRT.

Input   a .tflite file and, of a quantized one, its .litertlm bundle; the folder tokens/; F16's answers over
        the whole vocabulary, to compare with
Output  metrics JSON; predictions parquet
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pockettune.common.formats import LITERT
from pockettune.data.prompts import Example
from pockettune.evaluation import stages
from pockettune.evaluation.metrics import provenance
from pockettune.litert.bundles import LEAST_RUNTIME, open_bundle
from pockettune.litert.files import describe_file
from pockettune.runtimes.litert import LitertModel


@contextmanager
def open_litert(
    arguments: argparse.Namespace, examples: Sequence[Example]
) -> Iterator[stages.Runtime]:
    """Open the file; a bundle tokenizes the prompts itself, as it will in an app, and answers them."""
    facts: dict[str, Any] = {"format": LITERT, "size_bytes": arguments.model.stat().st_size}
    prompts: list[Sequence[int]] = [example.prompt_ids for example in examples]
    if arguments.bundle:
        with open_bundle(arguments.bundle, arguments.threads) as bundle:
            prompts = [bundle.tokenize(example.prompt) for example in examples]
        differing = sum(a != e.prompt_ids for a, e in zip(prompts, examples, strict=True))
        stored = describe_file(arguments.model) | {"least_runtime": f"LiteRT-LM {LEAST_RUNTIME}"}
        facts |= {"stored": stored, "prompts_tokenized_otherwise": differing}
    model = LitertModel(arguments.model, arguments.threads)
    facts["provenance"] = provenance("ai-edge-litert", "litert-torch", "litert-lm-api")
    texts = {tuple(ids): e.prompt for ids, e in zip(prompts, examples, strict=True)}

    def answer_greedily(asked: Sequence[Sequence[int]], limit: int) -> list[str | None]:
        with open_bundle(arguments.bundle, arguments.threads) as bundle:
            return [bundle.complete(texts[tuple(prompt)], limit) for prompt in asked]

    yield stages.Runtime(
        model.next_token_logits,
        prompts,
        model.vocabulary_size,
        facts,
        answer_greedily if arguments.bundle else None,
    )


if __name__ == "__main__":
    stages.run(__doc__, open_litert, ["--bundle"])
