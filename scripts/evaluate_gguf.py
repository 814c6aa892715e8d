"""Score a GGUF file on the evaluation rows, in llama.cpp, the runtime that will serve it.

Input   a GGUF file; the folder tokens/
Output  metrics JSON; predictions parquet
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pockettune import evaluation
from pockettune.gguf_files import describe_tensors
from pockettune.llama import LlamaModel
from pockettune.metrics import provenance
from pockettune.prompts import Example
from pockettune.scoring import score_answers


def score_gguf(
    path: Path,
    examples: Sequence[Example],
    answers: Sequence[Sequence[int]],
    stage: str,
    threads: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return log probabilities (examples, answers) and what the file stores.

    llama.cpp tokenizes the prompts itself, as it will on the phone.
    """
    with LlamaModel(path, threads) as model:
        prompts = [model.tokenize(example.prompt) for example in examples]
        scores = score_answers(model.next_token_logits, prompts, answers, stage)
    differing = sum(a != e.prompt_ids for a, e in zip(prompts, examples, strict=True))
    return scores, {
        "size_bytes": path.stat().st_size,
        "stored": describe_tensors(path),
        "prompts_tokenized_otherwise": differing,
        "provenance": provenance("llama-cpp-python"),
    }


if __name__ == "__main__":
    evaluation.run(__doc__, score_gguf)
