"""Time generation against llama.cpp's own llama-parallel, on the same prompts, in turn.

    python benchmarks/generation.py --llama-parallel PATH FILE.gguf ...

llama-parallel (examples/parallel, of the source release that llama-cpp-python is built from) keeps the
same number of clients busy: a shared start, prompts and single tokens in one batch, the likeliest token
each time, and no end before the last token. Writes benchmarks/generation.md.

On a machine that computes something else beside, --threads 1: threads that wait for one another would be
measured, which one answer at a time does more often.
"""

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import machine, write_page
from pockettune.runtimes.generation import generate
from pockettune.runtimes.llama import LlamaModel

PARALLEL, TOKENS = 16, 64
QUESTIONS = [
    f"{ask} {what}?"
    for ask in ("What do you know about", "Where would one look for", "Who needs")
    for what in ("rivers", "copper wire", "a good night's sleep", "the tides of the sea and the moon", "old maps", "bread and salt")
]  # fmt: skip
# Any answer at all, a character at a time: the cost of asking a grammar, not of what it forbids.
GRAMMAR = "root ::= [^\\x00]*"


def llama_parallel(
    tool: Path, gguf: Path, never: Sequence[int], answers: int, threads: int
) -> tuple[float, int, int]:
    """Return generated tokens a second, the tokens of its shared start, and of all prompts behind it."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(QUESTIONS))
        file.flush()
        command = [tool, "-m", gguf, "-f", file.name, "-t", threads, "-np", PARALLEL, "-ns", answers, "-n", TOKENS,
                   "-c", 8192, "-pps", "-kvu", "--samplers", "top_k", "--top-k", 1]  # fmt: skip
        command += [x for token in never for x in ("--logit-bias", f"{token}-inf")]
        output = subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
        ).stdout.decode(errors="replace")
    start, prompts, count, rate = (
        re.findall(pattern, output)[-1]
        for pattern in (r"system tokens = (\d+)", r"Total prompt tokens: +(\d+)", r"Total gen tokens: +(\d+)", r"Total gen tokens: .*speed: +([\d.]+)")
    )  # fmt: skip
    assert int(count) == answers * TOKENS, output[-2000:]
    return float(rate), int(start), int(prompts)


def asked(model: LlamaModel, start: int, answers: int) -> list[list[int]]:
    """Return the prompts of llama-parallel: as many tokens of a start, and the questions it draws."""
    shared = model.tokenize(" ".join(QUESTIONS * 8))[:start]
    assert len(shared) == start
    # std::mt19937 of its seed; each client draws a question and a number that is not used.
    source = np.random.MT19937()
    source._legacy_seeding(1234)
    drawn = [int(source.random_raw()) for _ in range(2 * answers)][::2]
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in drawn]
    tails = [model.tokenize(f"User:\n{question}\nAssistant:\n") for question in questions]
    return [[*shared, *tail[model.adds_bos() :]] for tail in tails]


def ours(
    model: LlamaModel, prompts: Sequence[list[int]], parallel: int, grammar: str | None = None
) -> tuple[float, list[list[int]]]:
    """Return generated tokens a second, and the answers."""
    started = time.perf_counter()
    # One more than is computed: behind the last token llama-parallel computes nothing either.
    answers = [
        answer.ids
        for answer in generate(
            model, prompts, ends=(), max_tokens=TOKENS + 1, parallel=parallel, grammar=grammar
        )
    ]
    seconds = time.perf_counter() - started
    assert all(len(ids) == TOKENS + 1 for ids in answers)
    return len(prompts) * TOKENS / seconds, answers


def compare(gguf: Path, tool: Path, answers: int, rounds: int, threads: int) -> str:
    """Run both in turn; return a table's row."""
    theirs, together, alone, bound = [], [], [], []
    with LlamaModel(gguf, threads) as model:
        # llama-parallel ends an answer with such a token, and where it reads "User:".
        colons = {t for t in range(model.vocabulary_size) if b":" in model.piece(t, special=True)}
        never = sorted(model.end_tokens() | colons)
        for _ in range(rounds):
            rate, start, computed = llama_parallel(tool, gguf, never, answers, threads)
            theirs.append(rate)
            prompts = asked(model, start, answers)
            behind = sum(map(len, prompts)) - start * answers
            assert abs(behind - computed) <= 0.02 * computed, (behind, computed)
            rate, said = ours(model, prompts, PARALLEL)
            together.append(rate)
            few = prompts[:: answers // 8]
            rate, said_alone = ours(model, few, 1)
            alone.append(rate)
            bound.append(ours(model, prompts, PARALLEL, GRAMMAR)[0])
        again = ours(model, prompts, PARALLEL)[1]
    pairs = list(zip(said[:: answers // 8], said_alone, strict=True))
    same = sum(a == b for a, b in pairs)
    parted = [next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y) for a, b in pairs if a != b]  # fmt: skip
    row = (
        f"| {gguf.stem} | {ratio(together, theirs)} | {ratio(together, alone)} | {ratio(bound, together)}"
        f" | {same} of {len(pairs)}{f' ({statistics.median(parted):.0f})' if parted else ''} | {'yes' if again == said else 'no'} |"
    )
    print(row, flush=True)
    return row


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the median and the range of ratios, round by round."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--llama-parallel", type=Path, required=True, help="llama.cpp's own tool")
    parser.add_argument("--answers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("gguf", type=Path, nargs="+")
    a = parser.parse_args()
    lines = [compare(gguf, a.llama_parallel, a.answers, a.rounds, a.threads) for gguf in a.gguf]
    write_page("generation", [
        "# Generation against llama-parallel", "",
        f"Made by `python benchmarks/generation.py --llama-parallel PATH FILE.gguf ...` on {machine()}: {a.answers} answers of"
        f" {TOKENS} tokens, {PARALLEL} at a time, behind a shared start, --threads {a.threads}; {a.rounds} rounds in turn; ratios of generated tokens a second,"
        " median (range). The tool is llama.cpp's own, built from the source release of llama-cpp-python.", "",
        "| file | against llama-parallel | against one at a time | with a grammar, against without | answers that are the same one at a time (else from which token not, median) | runs alike |",
        "|---|---|---|---|---|---|", *lines, "",
        "Answers are not ended by a token here, so that a small model runs on long after it has nothing more to say: more of them part"
        " than in a task of short answers. Where two tokens are nearly as likely, the size of the batch decides: it chooses the order of"
        " sums, and for quantized weights the kernel.",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
