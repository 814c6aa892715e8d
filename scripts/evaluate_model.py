"""Score a model in PyTorch on the evaluation rows: the base model, or the merged one.

Input   a model folder; the folder tokens/
Output  metrics JSON; predictions parquet
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pockettune import evaluation
from pockettune.metrics import provenance
from pockettune.models import load_model, weight_files
from pockettune.packing import ATTENTION, next_token_logits
from pockettune.prompts import Example
from pockettune.scoring import score_answers


def score_model(
    folder: Path,
    examples: Sequence[Example],
    answers: Sequence[Sequence[int]],
    stage: str,
    threads: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return log probabilities (examples, answers) and what is known of the model."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # fp32 holds what is stored in 16 bits exactly: this is the reference for what follows.
    model = load_model(folder, attention=ATTENTION, dtype=torch.float32).to(device).eval()
    prompts = [example.prompt_ids for example in examples]
    scores = score_answers(partial(next_token_logits, model), prompts, answers, stage)
    return scores, {
        "size_bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "provenance": provenance("torch", "transformers"),
    }


if __name__ == "__main__":
    evaluation.run(__doc__, score_model)
