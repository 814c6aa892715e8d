"""Tasks of text on real data: entities, questions, conversations, from the base to the smallest file.

    python benchmarks/tasks.py data     # writes the rows into benchmarks/scratch/tasks/
    python benchmarks/tasks.py runs     # makes the runs of benchmarks/tasks/
    python benchmarks/tasks.py check    # scores the same predictions by seqeval and CMRC 2018's script
    python benchmarks/tasks.py page     # writes benchmarks/tasks.md of those that have an F16 file

Put or link into benchmarks/scratch/ first: tasks/weibo_ner/ (train, dev, test.json: a text's characters and their
BIO labels a line), tasks/cmrc2018/ (dev.json, trial.json in SQuAD's layout, and cmrc2018_evaluate.py of its folder
squad-style-data, made to run on Python 3), chnsenticorp/ as published, small/gemma-3-270m-q4_k_m.gguf as
benchmarks/small.py says, and reviews-12m/, the base of benchmarks/chnsenticorp.md. check needs `pip install seqeval`.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from common import ROOT, WORK, machine, program, write_page
from pockettune.evaluation.verdict import say
from pockettune.tasks.answer_scores import score_answer
from small import read_reviews, read_stages

FOLDER = WORK / "tasks"
RESULTS = ROOT / "results/tasks"
CHECKED = FOLDER / "checked.json"
SEED = 11
LONGEST = 400  # characters of a text of CMRC 2018
RUNS = {
    "weibo-gemma": "Entities of Weibo NER, Gemma 3 270M",
    "weibo-12m": "Entities of Weibo NER, the base of 12.6 M parameters",
    "cmrc-gemma": "Questions of CMRC 2018, Gemma 3 270M",
    "chat-12m": "Conversations, the base of 12.6 M parameters",
}

Paragraph = dict[str, Any]


def read_paragraphs(name: str) -> list[Paragraph]:
    """Return the texts of a file of CMRC 2018 with their questions, in an order drawn once."""
    articles = program.read_json(FOLDER / f"cmrc2018/{name}.json")["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    order = np.random.default_rng(SEED).permutation(len(paragraphs))
    return [paragraphs[place] for place in order]


def take_questions(paragraphs: Iterator[Paragraph], count: int) -> list[Paragraph]:
    """Return the next texts that hold `count` questions, of the last no more than are wanted."""
    taken: list[Paragraph] = []
    while count:
        paragraph = next(paragraphs)
        questions = paragraph["qas"][:count]
        taken.append({**paragraph, "qas": questions})
        count -= len(questions)
    return taken


def write_questions() -> None:
    """Write questions on short texts to learn, choose by and score, no text in two of them."""
    dev, trial = (
        iter([p for p in read_paragraphs(name) if len(p["context"]) <= LONGEST])
        for name in ("dev", "trial")
    )
    splits = {
        "test": take_questions(dev, 300),
        "train": take_questions(dev, 320),
        "validation": take_questions(trial, 60),
    }
    for split, paragraphs in splits.items():
        data = {"version": "v1.0", "data": [{"paragraphs": [p]} for p in paragraphs]}
        program.write_json(FOLDER / f"cmrc-{split}.json", data)


def write_conversations() -> None:
    """Write 2,000 conversations of three turns: a review is gone on with twice, then judged."""
    table = read_reviews("train").drop_duplicates("text_a").sample(frac=1, random_state=SEED)
    lines = []
    for text, label in zip(table["text_a"], table["label"], strict=True):
        first, second, third, *_ = [*re.findall(r"[^。！？!?]{4,40}[。！？!?]", text), "", "", ""]
        if not third:
            continue
        turns = [
            f"接着写这条评论，只写一句：{first}", second, "再写一句。", third,
            "这是好评还是差评？", "好评。" if label else "差评。",
        ]  # fmt: skip
        roles = ("user", "assistant") * 3
        messages = [{"role": r, "content": t.strip()} for r, t in zip(roles, turns, strict=True)]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    assert len(lines) >= 2000, len(lines)
    (FOLDER / "conversations.jsonl").write_text("".join(lines[:2000]), encoding="utf-8")


def run_all() -> None:
    """Make every run, one after another; what is here already is not made again."""
    for name in RUNS:
        command = f"-m snakemake --configfile benchmarks/tasks/{name}.yaml --cores all results/tasks/{name}/metrics.json"
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)


def scored() -> dict[str, dict[str, Any]]:
    """Return the stages of every run by its name; of one that was stopped those that it had scored."""
    stages = {name: read_stages(RESULTS / name) for name in RUNS}
    return {name: found for name, found in stages.items() if "f16" in found}


def label_characters(entities: Sequence[Sequence[Any]], length: int) -> list[str]:
    """Return the BIO labels of a text of `length` characters; entities without a place have none."""
    labels = ["O"] * length
    for kind, _, start, end in entities:
        if start >= 0:
            labels[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return labels


def check_entities(name: str, stage: str) -> tuple[float, float]:
    """Return micro and macro F1 of a stage's predictions as seqeval counts them."""
    from seqeval.metrics import f1_score

    table = pd.read_parquet(RESULTS / name / f"predictions/{stage}.parquet")
    texts = pd.read_json(RESULTS / name / "dataset/test.jsonl", lines=True).set_index("id")["text"]
    right, found = (
        [
            label_characters(json.loads(entities) or [], len(texts[row]))
            for row, entities in zip(table["id"], table[column], strict=True)
        ]
        for column in ("reference", "prediction")
    )
    return tuple(float(f1_score(right, found, average=kind)) for kind in ("micro", "macro"))  # type: ignore[return-value]


def read_questions() -> list[tuple[Paragraph, dict[str, Any]]]:
    """Return the questions that are scored, each with its text."""
    articles = program.read_json(FOLDER / "cmrc-test.json")["data"]
    return [(p, q) for article in articles for p in article["paragraphs"] for q in p["qas"]]


def ask_script(answers: dict[str, str]) -> tuple[float, float]:
    """Return exact match and F1 of answers, by the questions' ids, as CMRC 2018's own script counts them."""
    asked = [{"paragraphs": [{**p, "qas": [q]}]} for p, q in read_questions() if q["id"] in answers]
    files = FOLDER / "asked.json", FOLDER / "answered.json"
    for path, content in zip(files, ({"version": "v1.0", "data": asked}, answers), strict=True):
        program.write_json(path, content)
    script = [sys.executable, str(FOLDER / "cmrc2018/cmrc2018_evaluate.py"), *map(str, files)]
    told = json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    assert int(told["TOTAL"]) == len(answers) and int(told["SKIP"]) == 0, told
    return float(told["EM"]) / 100, float(told["F1"]) / 100


def check_questions(name: str, stage: str) -> tuple[float, float]:
    """Return exact match and F1 of a stage's predictions as CMRC 2018's own script counts them."""
    table = pd.read_parquet(RESULTS / name / f"predictions/{stage}.parquet")
    names = {f"test-{n}": q["id"] for n, (_, q) in enumerate(read_questions(), start=1)}
    found = map(json.loads, table["prediction"])
    return ask_script({names[row]: f or "" for row, f in zip(table["id"], found, strict=True)})


def make_answers(text: str, question: str, right: str, source: random.Random) -> dict[str, str]:
    """Return answers that are right, nearly right and wrong, by what they are."""
    begin, end = text.find(right), text.find(right) + len(right)
    more, place = source.randrange(1, 6), source.randrange(len(text) - 20)
    return {
        "right": right,
        "wider": text[max(begin - more, 0) : end + more],
        "narrower": right[more // 2 : len(right) - more // 3],
        "upper case": f"{right.upper()}。 ",
        "a piece": text[place : place + 20],
        "a sentence": text[begin : begin + 60],
        "the question": question,
        "nothing": "",
    }


def largest_difference(found: Sequence[float], ours: Sequence[float]) -> float:
    """Return by how many points two scripts' numbers differ; CMRC 2018's rounds to 0.001."""
    return float(100 * np.abs(np.subtract(found, ours)).max())


def check_made_answers() -> dict[str, float]:
    """Return by how many points exact match or F1 of made answers differ, by what the answers are."""
    source = random.Random(SEED)
    made: dict[str, dict[str, str]] = {}
    counted: dict[str, list[tuple[float, float]]] = {}
    for paragraph, question in read_questions():
        golds = [answer["text"] for answer in question["answers"]]
        answers = make_answers(paragraph["context"], question["question"], golds[0], source)
        for kind, answer in answers.items():
            made.setdefault(kind, {})[question["id"]] = answer
            counted.setdefault(kind, []).append(score_answer(golds, answer, "characters"))
    told = {}
    for kind, answers in made.items():
        ours = np.mean(counted[kind], axis=0)
        told[kind] = largest_difference(ask_script(answers), ours)
    return told


def check_all() -> None:
    """Score the finished runs' predictions by the scripts of others and keep what they say."""
    checked = {"made": check_made_answers()}
    for name, stages in scored().items():
        if name.startswith("chat"):
            continue
        for stage, entry in stages.items():
            if name.startswith("weibo"):
                found, ours = check_entities(name, stage), (entry["micro_f1"], entry["macro_f1"])
            else:
                found, ours = check_questions(name, stage), (entry["exact_match"], entry["f1"])
            print(name, stage, found, ours)
            checked.setdefault(name, {})[stage] = largest_difference(found, ours)
    program.write_json(CHECKED, checked)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}"


def describe_scores(stages: dict[str, Any]) -> list[str]:
    """Return a table of what each stage scores, and whether a file is as good as F16."""
    second = {"micro_f1": "macro_f1", "f1": "exact_match"}.get(stages["f16"]["metric"])
    names = {"micro_f1": "micro F1", "f1": "F1", "token_accuracy": "token accuracy",
             "macro_f1": "macro F1", "exact_match": "exact match"}  # fmt: skip
    titles = [names[stages["f16"]["metric"]] + ", % (95 %)"]
    titles += [names[second] + ", %"] if second else []
    lines = [
        f"| stage | size, MB | rows | {' | '.join(titles)} | perplexity | against F16 |",
        "|---" * (5 + len(titles)) + "|",
    ]
    for stage, entry in stages.items():
        scores = [percent(entry[entry["metric"]])]
        if "interval" in entry:
            scores[0] += " ({} to {})".format(*map(percent, entry["interval"]))
        scores += [percent(entry[second])] if second else []
        verdict = say(entry["verdict"]) if "verdict" in entry else "–"
        lines.append(
            f"| {stage} | {entry['size_bytes'] / 1e6:.1f} | {entry['n']} | {' | '.join(scores)} |"
            f" {entry['reading']['perplexity']:,.2f} | {verdict} |"
        )
    return lines


def describe_fidelity(stages: dict[str, Any]) -> list[str]:
    """Return a table of how far each stage is from F16, and what of its answers could be read."""
    lines = [
        "| stage | KL from F16, nats: mean | 99.9 % | likeliest token equal, % | answers equal to the end | the others part at token | changed alone | ended | read | read, under the grammar |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, entry in stages.items():
        reading, parting, free = entry["reading"], entry.get("parting"), entry["generated"]
        apart = ["–"] * 3
        if divergence := reading.get("kl_vocabulary"):
            apart = [f"{divergence['mean']:.1e}", f"{divergence['p999']:.1e}", percent(reading["likeliest_equal"])]  # fmt: skip
        equal = share(parting["equal"], parting["rows"]) if parting else "–"
        first = parting["first_token"] if parting else None
        noise, held = entry["noise"], entry.get("constrained")
        lines.append(
            f"| {stage} | {' | '.join(apart)} | {equal} | {f'{first:g}' if first else '–'} |"
            f" {share(noise['changed'], noise['rows'])} | {share(free['ended'], free['rows'])} |"
            f" {share(free['understood'], free['rows'])} | {share(held['understood'], held['rows']) if held else '–'} |"
        )
    return lines


def describe_errors(stages: dict[str, Any]) -> list[str]:
    """Return a table of a run of entities: the errors by kind, a row a stage."""
    kinds = list(stages["f16"]["errors"])
    lines = [
        f"| stage | precision, % | recall, % | {' | '.join(k.replace('_', ' ') for k in kinds)} |",
        "|---" * (3 + len(kinds)) + "|",
    ]
    for stage, entry in stages.items():
        counts = " | ".join(str(entry["errors"][kind]) for kind in kinds)
        lines.append(
            f"| {stage} | {percent(entry['precision'])} | {percent(entry['recall'])} | {counts} |"
        )
    return lines


def describe_check(name: str, checked: dict[str, dict[str, float]]) -> str:
    """Return by how much the script of others differs at each stage."""
    who = "seqeval" if name.startswith("weibo") else "CMRC 2018's own script"
    stages = ", ".join(f"{stage} {points:.3f}" for stage, points in checked[name].items())
    return f"Difference from {who} on the same predictions, the larger of both scores, in points: {stages}."


def write_tasks_page() -> None:
    """Write benchmarks/tasks.md: what was found, by hand, and the tables that it was found in."""
    checked = program.read_json(CHECKED) if CHECKED.is_file() else {}
    lines = [
        "# Tasks of text on real data", "",
        f"Made by `python benchmarks/tasks.py`, which also makes the rows and the runs, on {machine()}.", "",
        (ROOT / "benchmarks/tasks/found.md").read_text(encoding="utf-8"),
    ]  # fmt: skip
    for name, stages in scored().items():
        lines += [f"## {RUNS[name]}", "", *describe_scores(stages), ""]
        if name in checked:
            lines += [describe_check(name, checked), ""]
        lines += [*describe_fidelity(stages), ""]
        if "errors" in stages["f16"]:
            lines += [*describe_errors(stages), ""]
    write_page("tasks", lines[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=["data", "runs", "check", "page"])
    what = parser.parse_args().what
    if what == "data":
        write_questions()
        write_conversations()
    else:
        {"runs": run_all, "check": check_all, "page": write_tasks_page}[what]()


if __name__ == "__main__":
    main()
