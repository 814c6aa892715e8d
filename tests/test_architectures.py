"""What docs/models.md says of architectures: some of them once more, from training to scoring."""

import re
import subprocess
import sys

import pytest

from architectures import ARCHITECTURES
from conftest import ROOT
from models import BEGIN, END, PAGES

# Why each is here: soft cap, window, and no sdpa; tensors that the converter adds; other names,
# transposed weights, learned positions; and two that are refused.
EXPECTED = {
    "Gemma 2": "works",
    "Phi-3, Phi-4-mini (longrope)": "works",
    "GPT-2": "works",
    "LFM2": r"check_base model lfm2 cannot be trained here: .* mix the sequences of a pass",
    "Helium": r"check_base model helium cannot be taken to the end: .*\(HeliumForCausalLM\): llama.cpp's converter does not know its architecture",
}


@pytest.mark.parametrize("page", PAGES)
def test_page_has_all_that_the_benchmark_runs(page: str) -> None:
    table = (ROOT / page).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    told = re.findall(r"^\| (.+?) \| (\w+) \|", table.partition("|---|")[2], re.MULTILINE)
    assert told == [(architecture.name, architecture.kind) for architecture in ARCHITECTURES]
    assert len(re.findall(r"\| (works|可用) \|$", table, re.MULTILINE)) >= 24


def test_architectures() -> None:
    """In a process of their own: the benchmark forks, which PyTorch's threads do not survive."""
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks/models.py", *EXPECTED],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name, result in EXPECTED.items():
        assert re.search(f"^{re.escape(name)}: {result}", found, re.MULTILINE), found
