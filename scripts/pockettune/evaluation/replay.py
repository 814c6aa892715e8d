"""How a file is asked, and rows that any runtime can replay to show that it answers as it was scored.

Until rule bundle makes both files; the contract of their keys is docs/phone.md's.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pockettune.common import program
from pockettune.data.prompts import Examples, take_evenly
from pockettune.data.records import read_records
from pockettune.evaluation.scoring import decisive_prefixes

ROWS = 50
CONTROL, USER_DEFINED = 3, 4  # llama_token_type in llama.h of llama.cpp at 0c1e570


def describe_task(
    settings: Mapping[str, Any], metadata: Mapping[str, Any], tokens: Path
) -> dict[str, Any]:
    """Return what a program must know to ask a GGUF file of this `metadata` as it was trained."""
    task, chat = settings["task"], program.read_json(tokens / "chat.json")
    before, _, after = chat["prompt"].partition("{text}")
    return {
        "type": task["type"],
        "template": "task",
        "system": task["system"],
        "prompt": task["prompt"],
        "labels": program.read_json(tokens / "answers.json")["words"],
        "before": before,
        "after": after,
        "defuse": control_tokens(metadata),
        "stop": chat["end"],
        "temperature": metadata.get("pockettune.temperature"),
        "threshold": None,
    }


def control_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Return what a text must not hold: as chat.control_tokens, of a GGUF file's metadata."""
    template = metadata.get("tokenizer.chat_template", "")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    return [
        token
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == CONTROL or (kind == USER_DEFINED and token in template)
    ]


def conformance_rows(
    tokens: Path, split: str, records: Path, predictions: Path
) -> Iterator[dict[str, Any]]:
    """Yield up to ROWS of the rows that were scored: message, prompt, ids, scores, answer.

    A row whose text was cut is left out: where it is cut is a program's own affair.
    """
    answers = program.read_json(tokens / "answers.json")
    prefixes = dict(zip(answers["words"], decisive_prefixes(answers["ids"]), strict=True))
    scored = {row["id"]: row for row in pd.read_parquet(predictions).to_dict("records")}
    whole = [
        row for row in Examples(tokens / f"{split}.arrow") if row.id in scored and not row.cut
    ]
    chosen = {row.id: row for row in take_evenly(whole, ROWS)}
    for record in read_records(records):
        if row := chosen.get(record["id"]):
            scores = scored[row.id]
            yield {
                "id": row.id,
                "message": record["text"],
                "prompt": row.prompt,
                "prompt_ids": list(row.prompt_ids),
                "labels": {
                    word: {"ids": list(ids), "log_probability": scores[f"log_probability_{word}"]}
                    for word, ids in prefixes.items()
                },
                "answer": scores["prediction"],
            }


def longest_prompt(max_length: int, answer_ids: Sequence[Sequence[int]]) -> int:
    """Return the tokens a prompt may have: the longest answer always has room behind it."""
    return max_length - max(map(len, answer_ids))
