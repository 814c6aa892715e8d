"""What trimming the vocabulary to a task keeps, and how many more tokens other texts then have.

    python benchmarks/vocabulary.py --train train.txt --texts test.txt weibo.txt -- [MODEL_FOLDER ...]

Texts stand one a line. Qwen2's vocabulary, which llama.cpp tests with, is counted first, then those of the folders.
Writes benchmarks/vocabulary.md. No model is run; minutes.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common import WORK, program, write_page, write_tokenizer

SCRIPTS: tuple[list[str], ...] = ([], ["han"])
RANDOM_TEXTS, LONGEST = 3000, 24
# Unicode's blocks: ASCII, Latin, Greek to Cyrillic, Arabic, India's, signs, CJK, Hangul, private use, beyond 16 bits.
BLOCKS = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0x2000, 0x2FFF),
          (0x3000, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]  # fmt: skip

Ids = list[list[int]]


@dataclass
class Case:
    """A tokenizer, and the ids of all texts in its whole vocabulary."""

    name: str
    content: dict[str, Any]
    whole: Tokenizer
    texts: dict[str, list[str]]
    ids: dict[str, Ids]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    return [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def open_case(folder: Path, name: str, texts: dict[str, list[str]]) -> Case:
    content = program.read_json(folder / "tokenizer.json")
    whole = Tokenizer.from_str(json.dumps({**content, "padding": None, "truncation": None}))
    return Case(
        name, content, whole, texts, {key: encode(whole, own) for key, own in texts.items()}
    )


def random_texts() -> list[str]:
    source = random.Random(0)
    characters = lambda: chr(source.randint(*source.choice(BLOCKS)))  # noqa: E731
    return [
        "".join(characters() for _ in range(source.randint(1, LONGEST)))
        for _ in range(RANDOM_TEXTS)
    ]


def count(case: Case) -> Iterator[str]:
    """Yield a row of the page for each choice of scripts."""
    from pockettune.models.kept_tokens import Vocabulary, choose_tokens
    from pockettune.models.trimming import trim_tokenizer

    vocabulary = Vocabulary(case.content, case.name)
    emitted = {number for ids in case.ids["train"] for number in ids}
    rows = max([*vocabulary.ids.values(), *vocabulary.added.values()]) + 1
    for scripts in SCRIPTS:
        wanted = {"scripts": scripts, "frequent": 0}
        kept, _ = choose_tokens(vocabulary, emitted, wanted, rows)
        content = trim_tokenizer(case.content, {old: new for new, old in enumerate(kept)})
        trimmed = Tokenizer.from_str(json.dumps({**content, "padding": None, "truncation": None}))
        yield compare(case, scripts, rows, kept, trimmed)


def compare(case: Case, scripts: list[str], rows: int, kept: list[int], trimmed: Tokenizer) -> str:
    """Return the row: what is kept, texts whose ids differ though all are kept, texts lost, and tokens a text."""
    own, of_kept, differing, lengths = set(kept), 0, 0, []
    for key, texts in case.texts.items():
        before, after = case.ids[key], encode(trimmed, texts)
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if own.issuperset(b)]
        of_kept += len(pairs)
        differing += sum([kept[number] for number in a] != b for b, a in pairs)
        if key == "train":
            assert len(pairs) == len(texts) and not differing, "train has other tokens"
        elif key != "random":
            lengths.append(
                f"{mean(before):.1f}, {mean(after):.1f} ({mean(after) / mean(before) - 1:+.1%})"
            )
        else:
            lost = sum(case.whole.decode(b, skip_special_tokens=False) != trimmed.decode(a, skip_special_tokens=False)
                       for b, a in zip(before, after, strict=True))  # fmt: skip
    told = [
        case.name,
        ", ".join(scripts) or "–",
        f"{rows:,}",
        f"{len(kept):,}",
        f"{differing} of {of_kept:,}",
        str(lost),
    ]
    return f"| {' | '.join([*told, *lengths])} |"


def mean(ids: Ids) -> float:
    return sum(map(len, ids)) / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--train", type=Path, required=True, help="texts that decide, one a line")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="other texts")
    parser.add_argument("folders", type=Path, nargs="*", help="folders with a tokenizer.json")
    arguments = parser.parse_args()
    from pockettune.data.texts import read_texts

    paths = {"train": arguments.train, **{path.stem: path for path in arguments.texts}}
    texts = {name: read_texts(path, "text") for name, path in paths.items()} | {
        "random": random_texts()
    }
    qwen = WORK / "vocabulary"
    qwen.mkdir(parents=True, exist_ok=True)
    write_tokenizer(qwen)
    cases = {"Qwen2": qwen} | {f.name.partition("@")[0]: f for f in arguments.folders}
    rows = []
    for name, folder in cases.items():
        for row in count(open_case(folder, name, texts)):
            rows.append(row)
            print(row, flush=True)
    program.remove(qwen)
    names = [f"{path.stem}, {len(texts[path.stem]):,}" for path in arguments.texts]
    head = [
        "vocabulary",
        "scripts",
        "tokens",
        "kept",
        "of kept tokens alone: read otherwise",
        "random texts lost",
        *names,
    ]
    write_page("vocabulary", [
        "# What a trimmed vocabulary keeps", "",
        f"Made by `python benchmarks/vocabulary.py`: trimmed to {len(texts['train']):,} texts of train, without and with"
        f" all tokens of a script. Behind each kind of texts, with their number: mean tokens of one before, after. Of"
        f" kept tokens alone: all texts of all kinds that the whole vocabulary reads in kept tokens, and how many of"
        f" these have others now. Lost: of {RANDOM_TEXTS:,} texts of characters from all over Unicode, those that decode"
        " otherwise than before.", "",
        f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
