"""Stages side by side: the pairing, the divergence from F16, and the table."""

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from compare_stages import as_table, common_rows, compare_stages, list_flips, pair
from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, write_examples
from pockettune.evaluation import stages

WORDS = ["差", "好"]


def predictions(answers: str, seen: Sequence[bool] = (False,) * 4) -> pd.DataFrame:
    """A table of four rows, whose right answers are 好 好 差 差."""
    likely = {"差": [-0.1, -3.0], "好": [-3.0, -0.1]}
    scores = np.array([likely[word] for word in answers])
    return pd.DataFrame(
        {
            "id": [f"test-{n}" for n in range(1, 5)],
            "reference": list("好好差差"),
            "prediction": list(answers),
            "seen": list(seen),
            "log_probability_差": scores[:, 0],
            "log_probability_好": scores[:, 1],
        }
    )


TABLES = {
    "tfidf": predictions("好差差差"),
    "base": predictions("差差差差"),
    "merged": predictions("好好差差"),
    "f16": predictions("好好差差"),
    "q4": predictions("好好差好"),
    "q8": predictions("好好差差"),
}
METRICS: dict[str, dict[str, Any]] = {
    name: {"n": 4, "metric": "accuracy", "accuracy": float((t["prediction"] == t["reference"]).mean()), "unseen": {"n": 4}}
    for name, t in TABLES.items()
}  # fmt: skip


UNTRAINED: dict[str, Any] = {"imported_from": "x"}


def compare(tables: dict[str, pd.DataFrame] = TABLES, **training: Any) -> dict[str, Any]:
    compared = compare_stages(METRICS, tables, 0.005, training or UNTRAINED)
    stages: dict[str, Any] = compared["stages"]
    return stages


def test_stages_are_paired_with_those_they_stem_from() -> None:
    stages = compare()
    assert {name: s["against_before"]["stage"] for name, s in stages.items() if "against_before" in s} == {
        "merged": "base", "f16": "merged", "q4": "f16", "q8": "f16",
    }  # fmt: skip
    learned = stages["merged"]["against_before"]
    assert (learned["lost"], learned["gained"], learned["difference"]) == (0, 2, 0.5)
    assert stages["q4"]["against_f16"]["flips"] == 1
    assert stages["q4"]["against_f16"]["lost"] == 1
    assert stages["q8"]["against_f16"]["flips"] == 0
    assert stages["q8"]["kl_labels"] == {"mean": 0.0, "p999": 0.0}
    assert stages["q4"]["kl_labels"]["mean"] > 0.1
    assert "against_f16" not in stages["f16"]
    assert stages["base"]["against_tfidf"]["lost"] == 1
    low, high = stages["base"]["interval"]
    assert low <= 0.5 <= high


def test_rows_seen_in_train_are_told_apart() -> None:
    seen = (False, False, False, True)
    tables = {name: predictions("".join(t["prediction"]), seen) for name, t in TABLES.items()}
    lost = compare(tables)["q4"]["against_f16"]
    assert (lost["lost"], lost["unseen"]["lost"]) == (1, 0)


def test_every_stage_is_judged_against_f16() -> None:
    stages = compare()
    assert [name for name in stages if "verdict" not in stages[name]] == ["f16"]
    assert stages["q8"]["verdict"]["claim"] == "undecided", "four rows prove nothing"
    many = {name: pd.concat([t.assign(id=t["id"] + f"-{n}") for n in range(400)])
            for name, t in TABLES.items()}  # fmt: skip
    stages = compare(many)
    assert stages["q8"]["verdict"]["claim"] == "as good"
    assert stages["q4"]["verdict"]["claim"] == "worse"
    assert stages["q8"]["verdict"]["margin"] == 0.005
    assert "verdict_bound" in as_table({"stages": stages})


def test_files_are_calibrated_with_the_temperature_of_validation() -> None:
    stages = compare(temperature={"value": 2.0}, coverage=[{"threshold": 0.5}, {"threshold": 0.95}])
    assert [name for name in stages if "at_temperature" in stages[name]] == ["f16", "q4", "q8"]
    told = stages["q4"]["at_temperature"]
    sure = 1 / (1 + np.exp(-2.9 / 2))  # log probabilities -0.1 and -3
    assert told["calibration_error"] == pytest.approx(abs(0.75 - sure))
    assert told["coverage"] == [
        {"threshold": 0.5, "coverage": 1.0, "accuracy": 0.75},
        {"threshold": 0.95, "coverage": 0.0, "accuracy": None},
    ]
    assert "at_temperature" not in compare(temperature=None)["f16"]


def test_other_rows_cannot_be_paired() -> None:
    for other, told in (
        (TABLES["q8"].iloc[::-1], "different orders"),
        (TABLES["q8"].assign(id="test-9"), "different rows"),
        (TABLES["q8"].iloc[:0], "different rows"),
    ):
        with pytest.raises(UserError, match=told):
            common_rows(TABLES["f16"], other)


def test_stage_of_fewer_rows_is_paired_on_those() -> None:
    """As evaluate.pytorch_limit has it: a sample of what the files are scored on."""
    few = TABLES["q4"].iloc[[1, 3]]
    paired = pair(TABLES["f16"], few)
    assert paired["n"] == 2 and paired["flips"] == 1, "row 4 of TABLES differs"
    assert pair(few, TABLES["f16"])["n"] == 2


def test_flips_carry_their_text() -> None:
    records = zip(TABLES["f16"]["id"], TABLES["f16"]["reference"], strict=True)
    shown = {row: {"text": f"text of {row}", "reference": answer} for row, answer in records}
    flips = list_flips(TABLES, shown)
    assert flips == {
        "q4": [
            {"id": "test-4", "text": "text of test-4", "reference": "差", "f16": "差", "now": "好"}
        ],
        "q8": [],
    }


def test_table_has_a_row_a_stage_and_only_numbers() -> None:
    table = as_table({"stages": compare()}).set_index("stage")
    assert table.loc["q4", "against_f16_lost"] == 1
    assert list(table.index) == list(TABLES)


def test_divergence_from_f16_is_over_the_whole_vocabulary(tmp_path: Path) -> None:
    """Two stages scored through the frame of every evaluation; the second is the first, sharpened."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 50)).astype(np.float32)
    examples = [Example(f"test-{n}", "", [n], [7 + n % 2, 2], WORDS[n % 2], False, False, False) for n in range(6)]  # fmt: skip
    write_examples(tmp_path / "test.arrow", examples)
    (tmp_path / "answers.json").write_text(json.dumps({"words": WORDS, "ids": [[7, 2], [8, 2]]}))
    task = {"type": "classification", "system": "", "prompt": "{text}", "labels": {"0": "差", "1": "好"}, "template_options": {}}  # fmt: skip

    def evaluate(stage: str, sharpness: float, **paths: Path | None) -> dict[str, Any]:
        @contextmanager
        def open_runtime(_: Namespace, rows: Sequence[Example]) -> Iterator[stages.Runtime]:
            def compute(prompts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
                yield from (logits[prompt[0]] * sharpness for prompt in prompts)

            yield stages.Runtime(compute, [row.prompt_ids for row in rows], 50)

        arguments = Namespace(
            stage=stage, tokens=tmp_path, metrics=tmp_path / f"{stage}.json",
            predictions=tmp_path / f"{stage}.parquet",
            settings={"task": task, "dataset": {"text_column": "t", "label_column": "l"},
                      "evaluate": {"split": "test", "limit": None}},
            **{"reference": None, "write_reference": None, **paths},
        )  # fmt: skip
        stages.evaluate(arguments, open_runtime)
        result: dict[str, Any] = json.loads((tmp_path / f"{stage}.json").read_text())
        return result

    reference = tmp_path / "f16.npy"
    assert "kl_vocabulary" not in evaluate("f16", 1.0, write_reference=reference)
    assert np.load(reference).shape == (6, 50)
    same = evaluate("same", 1.0, reference=reference)
    # The reference is kept in 16 bits.
    assert same["kl_vocabulary"]["p999"] < 1e-5
    assert same["noise"] == {"rows": 6, "largest_difference": 0.0, "flips": 0}
    first = np.exp(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    assert same["off_labels"] == {
        "rows": pytest.approx(np.mean(~np.isin(logits.argmax(axis=1), [7, 8]))),
        "mass": pytest.approx(1 - first[:, [7, 8]].sum(axis=1).mean(), rel=1e-5),
    }
    assert "greedy" not in same, "this runtime cannot write"
    sharper = evaluate("sharper", 2.0, reference=reference)
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (logits, logits * 2))
    expected = (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert sharper["kl_vocabulary"]["mean"] == pytest.approx(expected, rel=1e-2)
