"""Score what needs no language model: characters counted, and logistic regression.

A model that does not beat it is not worth a phone's battery.

Input   the folder tokens/, and {train,<split>}.jsonl
Output  metrics JSON; predictions parquet
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from pockettune.common import program
from pockettune.data.records import read_records
from pockettune.evaluation import stages
from pockettune.evaluation.metrics import provenance
from pockettune.tasks import load_task


def evaluate_tfidf(arguments: argparse.Namespace) -> None:
    """Fit on train and write the stage's files for the rows that `evaluate:` names."""
    settings = arguments.settings
    task = load_task(settings["task"], settings["dataset"])
    examples = stages.read_rows(arguments)
    words = program.read_json(arguments.tokens / "answers.json")["words"]
    train = list(read_records(arguments.train))
    texts = {record["id"]: record[task.text_field] for record in read_records(arguments.split)}
    started = time.perf_counter()
    model = fit([record[task.text_field] for record in train], [task.answer(r) for r in train])
    found = model.predict_log_proba([texts[example.id] for example in examples])
    scores = np.full((len(examples), len(words)), -np.inf)  # an answer that train never gives
    for column, word in enumerate(model.classes_):
        scores[:, words.index(word)] = found[:, column]
    facts = {
        "size_bytes": None,
        "seconds": round(time.perf_counter() - started, 2),
        "provenance": provenance("scikit-learn"),
    }
    stages.write_stage(arguments, examples, words, scores, facts)


def fit(texts: Sequence[str], answers: Sequence[str]) -> Pipeline:
    """Return a model of the texts' characters; of one class, a model that always gives it."""
    # C = 10 and 1 to 3 characters: the usual choice for short Chinese texts, not tuned on the rows.
    classifier = (
        LogisticRegression(C=10, max_iter=1000) if len(set(answers)) > 1 else DummyClassifier()
    )
    counted = {"analyzer": "char", "ngram_range": (1, 3), "sublinear_tf": True}
    try:
        return make_pipeline(TfidfVectorizer(**counted, min_df=2), classifier).fit(texts, answers)
    except ValueError:  # of few short texts, nothing stands in two
        return make_pipeline(TfidfVectorizer(**counted), classifier).fit(texts, answers)


def main() -> None:
    parser = stages.argument_parser(__doc__)
    parser.add_argument("--train", type=Path, required=True, help="train.jsonl")
    parser.add_argument("--split", type=Path, required=True, help="records of the scored split")
    program.run(parser, evaluate_tfidf)


if __name__ == "__main__":
    main()
