"""Report and card in two languages: every sentence is in the table, with the same values in it."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from jinja2 import Environment, nodes

from conftest import ROOT
from pockettune.common.words import english, read_words
from pockettune.evaluation.choice import Limits, choose
from pockettune.evaluation.intervals import compare_changes
from pockettune.evaluation.plots import spread_heights
from pockettune.evaluation.verdict import judge, say

CHINESE = ROOT / "report/zh.json"
TEMPLATES = [ROOT / f"report/{name}.j2" for name in ("report.html", "text.html", "card.md")]
PROGRAMS = [
    ROOT / "scripts/write_report.py",
    *(ROOT / "scripts/pockettune/evaluation").glob("*.py"),
]
# Names, units and files that are the same in both languages.
NOT_TRANSLATED = {"gguf", "kl", "mb", "sha", "llama", "cpp", "python", "f16"}


def placeholders(sentence: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(sentence) if name is not None}


def said_in_template(path: Path) -> Iterator[tuple[str, set[str] | None]]:
    """Yield each sentence with the names of its values; None where these are not written out."""
    for call in Environment().parse(path.read_text(encoding="utf-8")).find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == "_":
            (sentence,) = call.args
            assert isinstance(sentence, nodes.Const), f"{path.name}:{call.lineno}"
            names = {keyword.key for keyword in call.kwargs}
            yield sentence.value, None if call.dyn_kwargs else names


def constant(node: ast.expr, path: Path) -> str:
    assert isinstance(node, ast.Constant) and isinstance(node.value, str), f"{path}:{node.lineno}"
    return node.value


def said_in_program(path: Path) -> Iterator[tuple[str, set[str] | None]]:
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            continue
        if call.func.id == "say_count":
            for sentence in call.args[-2:]:
                yield constant(sentence, path), {"n"}
        if call.func.id == "words" and not isinstance(call.args[0], ast.IfExp):  # say_count's own
            (sentence,) = call.args
            names = [keyword.arg for keyword in call.keywords]
            yield (
                constant(sentence, path),
                None if None in names else {name for name in names if name},
            )


def all_said() -> list[tuple[str, set[str] | None]]:
    programs = [said for path in PROGRAMS for said in said_in_program(path)]
    return programs + [said for path in TEMPLATES for said in said_in_template(path)]


def test_table_holds_what_is_said_and_nothing_else() -> None:
    table = json.loads(CHINESE.read_text(encoding="utf-8"))
    said = {sentence for sentence, _ in all_said()}
    assert len(said) > 150
    assert (said - set(table), set(table) - said) == (set(), set())


def test_both_languages_have_the_same_values() -> None:
    table = json.loads(CHINESE.read_text(encoding="utf-8"))
    assert [e for e, zh in table.items() if placeholders(e) != placeholders(zh)] == []


def test_every_value_is_given() -> None:
    said = [(sentence, names) for sentence, names in all_said() if names is not None]
    assert [sentence for sentence, names in said if placeholders(sentence) != names] == []


def test_table_is_chinese() -> None:
    table = json.loads(CHINESE.read_text(encoding="utf-8"))
    without = [e for e, zh in table.items() if not re.search(r"[\u3000-\u9fff\uff00-\uffef]", zh)]
    assert without == [" "], "Chinese sentences have no space between them"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_no_english_stands_outside_of_the_sentences(template: Path) -> None:
    source = template.read_text(encoding="utf-8")
    text = " ".join(value for _, kind, value in Environment().lex(source) if kind == "data")
    if template.suffixes[0] == ".md":
        text = text.split("\n---\n", 1)[1]  # its head is for a hub
    text = re.sub(r"<style>.*?</style>|<code>.*?</code>|<[^>]*>", " ", text, flags=re.DOTALL)
    words = {word.lower() for word in re.findall(r"[A-Za-z]\w+", text)}
    assert words - NOT_TRANSLATED == set()


def test_sentence_that_the_table_lacks_is_not_said_in_english() -> None:
    assert english("{n} rows", n=3) == read_words(None)("{n} rows", n=3) == "3 rows"
    chinese = read_words(CHINESE)
    assert chinese("{n} rows", n=3) == "3 行"
    with pytest.raises(KeyError):
        chinese("a sentence of nobody's")


@pytest.mark.parametrize(
    ("lost", "n", "words"),
    [
        (0, 1200, "被证明一样好（差异至少 -0.30 个百分点，允许 0.5）"),
        (10, 1200, "被证明更差（差异至多 -0.47 个百分点）"),
        (0, 300, "这些行数无法判定，它们本可显出 2.37 个百分点的差异"),
    ],
)
def test_verdict_in_chinese(lost: int, n: int, words: str) -> None:
    assert say(judge(compare_changes(lost, 0, n), 0.005), read_words(CHINESE)) == words


def test_choice_in_chinese_is_the_same_choice() -> None:
    def stage(size: int, lost: int) -> dict[str, Any]:
        compared = {"against_f16": compare_changes(lost, 0, 10_000)}
        return {"size_bytes": size, "score": 0.9 - lost / 10_000, "stored": {}, **compared}

    stages = {"f16": {"size_bytes": 9e6, "score": 0.9, "stored": {}}, "q8_0": stage(5_000_000, 0),
              "q4_0": stage(3_000_000, 400)}  # fmt: skip
    rate = {"prompt": {"mean": 1.0}, "resident_bytes": 9_000_000}
    speed = {name: rate for name in stages}
    for limits in (Limits(None, None, 0.005), Limits(4, None, 0.005), Limits(1, 8, 0.005)):
        ours, theirs = (choose(stages, speed, limits, w) for w in (english, read_words(CHINESE)))
        assert (ours["chosen"], ours["proved"]) == (theirs["chosen"], theirs["proved"])
        assert not re.search(r"[A-Za-z]{4}", re.sub(r"choose\.\w+|MB", "", theirs["why"]))
    assert "内存 9.0 MB，choose.memory_mb 是 8" in theirs["files"]["q4_0"]["over"]


def test_names_of_files_of_one_size_do_not_write_over_each_other() -> None:
    points = [(92.0, 90.7), (91.7, 89.8), (91.7, 89.8), (271.0, 89.8)]
    heights = spread_heights(points, near=80, gap=0.5)
    assert heights == [pytest.approx(90.8), 89.8, pytest.approx(90.3), 89.8]
