"""Score a model in PyTorch on the evaluation rows: the base model, with its adapter, or merged.

Input   a model folder, an adapter folder to lay over it; the folder tokens/; F16's answers over the
        whole vocabulary, to compare with, and which tokens that is where it was trimmed
Output  metrics JSON; predictions parquet
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from pockettune.common import program
from pockettune.data.prompts import Example
from pockettune.evaluation import stages
from pockettune.evaluation.beside_f16 import open_f16
from pockettune.evaluation.metrics import provenance
from pockettune.evaluation.text_stages import TextRuntime
from pockettune.models.folder import load_tokenizer, weight_files
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.generation_pytorch import generate
from pockettune.runtimes.memory import ELSEWHERE, memory_hint
from pockettune.runtimes.packing import logits_at, next_token_logits


@contextmanager
def open_model(
    arguments: argparse.Namespace, examples: Sequence[Example]
) -> Iterator[stages.Runtime]:
    """Load the model to compute in fp32, which holds what is stored in 16 bits exactly."""
    with memory_hint(ELSEWHERE):
        yield load_runtime(arguments, examples)


def load_runtime(arguments: argparse.Namespace, examples: Sequence[Example]) -> stages.Runtime:
    """Return the model, on a GPU where there is one."""
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_exact(arguments.model, device=device)
    vocabulary_size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    files = weight_files(arguments.model)
    if arguments.adapter:
        from peft import PeftModel  # here, so that what it says at import goes into the log

        model = PeftModel.from_pretrained(model, arguments.adapter).to(device).eval()
        files += weight_files(arguments.adapter)
    facts = {
        "size_bytes": sum(path.stat().st_size for path in files),
        "provenance": provenance("torch", "transformers"),
    }
    prompts = [example.prompt_ids for example in examples]
    logits = partial(next_token_logits, model)
    text = partial(open_text, arguments, model, prompts)
    return stages.Runtime(logits, prompts, vocabulary_size, facts, text=text)


def open_text(
    arguments: argparse.Namespace, model: torch.nn.Module, prompts: Sequence[Sequence[int]]
) -> TextRuntime:
    """Return how the model answers with text."""
    tokenizer = load_tokenizer(arguments.model)
    ends = program.read_json(arguments.tokens / "answers.json")["ends"]
    return TextRuntime(
        prompts,
        partial(logits_at, model),
        partial(generate, model, ends=ends),
        partial(tokenizer.decode, skip_special_tokens=True),
    )


if __name__ == "__main__":
    stages.run(__doc__, open_model, ["--adapter", "--vocabulary"], open_f16)
