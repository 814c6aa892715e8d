"""Score an ONNX folder on the evaluation rows, in ONNX Runtime, the runtime that will serve it.

Input   a folder of export_onnx.py; the folder tokens/; F16's answers over the whole vocabulary, to compare with
Output  metrics JSON; predictions parquet
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from pockettune.common.disk import used_bytes
from pockettune.common.formats import ONNX, float_rung
from pockettune.data.prompts import Example
from pockettune.evaluation import stages
from pockettune.evaluation.metrics import provenance
from pockettune.runtimes.onnx import OnnxModel, OnnxTokenizer, answer_greedily, describe_folder


@contextmanager
def open_onnx(
    arguments: argparse.Namespace, examples: Sequence[Example]
) -> Iterator[stages.Runtime]:
    """Open the folder; prompts are tokenized as onnxruntime-genai does it on a phone."""
    model = OnnxModel(arguments.model, arguments.threads)
    tokenizer = OnnxTokenizer(arguments.model)
    prompts = [tokenizer.tokenize(example.prompt) for example in examples]
    differing = sum(a != e.prompt_ids for a, e in zip(prompts, examples, strict=True))
    facts = {
        "format": ONNX,
        "size_bytes": used_bytes(arguments.model),
        "prompts_tokenized_otherwise": differing,
        "provenance": provenance("onnxruntime", "onnxruntime-genai"),
    }
    # The rung is a means of comparison, no file that is handed out.
    if arguments.metrics.stem != float_rung(ONNX):
        facts["stored"] = describe_folder(arguments.model)
    yield stages.Runtime(
        model.next_token_logits,
        prompts,
        model.vocabulary_size,
        facts,
        partial(answer_greedily, model, tokenizer),
    )


if __name__ == "__main__":
    stages.run(__doc__, open_onnx)
