"""What docs/models.md says of architectures: some of them once more, from training to scoring."""

import re

import pytest

from architectures import ARCHITECTURES
from conftest import ROOT
from models import BEGIN, END, PAGES, import_all, prepare, try_architecture


@pytest.fixture(scope="module")
def texts() -> list[str]:
    import_all()
    return prepare()


@pytest.mark.parametrize("page", PAGES)
def test_page_has_all_that_the_benchmark_runs(page: str) -> None:
    table = (ROOT / page).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    table = table.partition("|---|---|---|---|\n")[2]
    told = re.findall(r"^\| (.+?) \| (\w+) \|", table, re.MULTILINE)
    assert told == [(architecture.name, architecture.kind) for architecture in ARCHITECTURES]
    assert len(re.findall(r"\| (works|可用) \|$", table, re.MULTILINE)) >= 24


@pytest.mark.parametrize(
    ("name", "step", "line"),
    [
        ("Gemma 2", None, ""),  # soft cap, window, and no sdpa
        ("Phi-3, Phi-4-mini (longrope)", None, ""),  # tensors that the converter adds
        ("GPT-2", None, ""),  # other names, transposed weights, learned positions
        ("LFM2", "check_base", "model lfm2 cannot be trained here: .* mix the sequences"),
        ("Helium", "convert", r"\(HeliumForCausalLM\): llama.cpp's converter does not know its arch"),
    ],
)  # fmt: skip
def test_architecture(name: str, step: str | None, line: str, texts: list[str]) -> None:
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    result = try_architecture(architecture, texts)
    assert result["step"] == step, result["line"]
    assert re.search(line, result["line"] or "")
