"""Exact match and F1 of an answer, as the scripts of CMRC 2018 and of SQuAD count them.

Sources: baseline/cmrc2018_evaluate.py of ymcui/cmrc2018 at c0eb1b6 for Chinese, which splits what is not
Chinese by nltk's word_tokenize; SQuAD 2.0's evaluate-v2.0.py (arXiv 1806.03822) for English.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from pockettune.tasks.shared import ratio

# What CMRC's script leaves out; other marks count there, such as . and ( and, for it looks for a pair
# of them in single characters, the dots of an ellipsis.
MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
CHINESE = re.compile("[\u4e00-\u9fa5]")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)

# The steps of nltk's NLTKWordTokenizer (3.10.4) that can touch a lower-case text without MARKS, in their
# order. word_tokenize cuts the text into sentences first, by a trained model; here it is one sentence.
WORD_SPLITS = [
    (re.compile(pattern), split)
    for pattern, split in (
        (r"([«‘„])", r" \1 "),
        (r"^\"", r"``"),
        (r"(``)", r" \1 "),
        (r"([ \(\[{<])(\"|'{2})", r"\1 `` "),
        (r"(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", r"\1 "),
        (r"([^\.])(\.)([\]\)}>\"' »]*)\s*$", r"\1 \2 \3 "),
        (r"(,)([^\d])", r" \1 \2"),
        (r"(,)$", r" \1 "),
        (r"\.{2,}", r" \g<0> "),
        (r"[;@#$%&]", r" \g<0> "),
        ("[\u2012-\u2015]", r" \g<0> "),
        (r"([^\.])(\.)([\]\)}>\"']*)\s*$", r"\1 \2\3 "),
        (r"[?!]", r" \g<0> "),
        (r"([^'])' ", r"\1 ' "),
        (r"[\]\[\(\)\{\}\<\>]", r" \g<0> "),
        (r"\A|\Z", " "),
        (r"(»)", r" \1 "),
        (r"''", " '' "),
        (r"\"", " '' "),
        (r"\s+", " "),
        (r"([^' ])('[smd]|') ", r"\1 \2 "),
        (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
        (r"\b(can)(not)\b", r" \1 \2 "),
        (r"\b(d)('ye)\b", r" \1 \2 "),
        (r"\b(gim|lem)(me)\b", r" \1 \2 "),
        (r"\b(gon)(na)\b", r" \1 \2 "),
        (r"\b(got)(ta)\b", r" \1 \2 "),
        (r"\b(more)('n)\b", r" \1 \2 "),
        (r"\b(wan)(na)(?=\s)", r" \1 \2 "),
        (r" ('t)(is|was)\b", r" \1 \2 "),
    )
]


def split_words(text: str) -> list[str]:
    """Return the words of lower-case text that is not Chinese, as nltk's tokenizer splits them."""
    for pattern, split in WORD_SPLITS:
        text = pattern.sub(split, text)
    return text.split()


def split_mixed(text: str) -> list[str]:
    """Return a text's Chinese characters one by one and the words of what is between them.

    MARKS are left out first, so that "a-b" is one word.
    """
    kept = "".join(character for character in text.lower().strip() if character not in MARKS)
    parts: list[str] = []
    for part in re.split(f"({CHINESE.pattern})", kept):
        parts += [part] if CHINESE.match(part) else split_words(part)
    return parts


def longest_common_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest run of items that stands in both."""
    longest, before = 0, [0] * (len(b) + 1)
    for item in a:
        row = [0] * (len(b) + 1)
        for place, other in enumerate(b, start=1):
            if item == other:
                row[place] = before[place - 1] + 1
        longest, before = max(longest, *row), row
    return longest


def compare_characters(gold: str, answer: str) -> tuple[float, float]:
    """Return exact match and F1 of an answer against one right answer, as CMRC counts them.

    It has no questions without an answer; of these both are as SQuAD counts them.
    """
    if not gold or not answer:
        return float(gold == answer), float(gold == answer)
    plain = ["".join(c for c in text.lower().strip() if c not in MARKS) for text in (gold, answer)]
    right, said = split_mixed(gold), split_mixed(answer)
    return float(plain[0] == plain[1]), ratio(
        2 * longest_common_run(right, said), len(right) + len(said)
    )


def compare_words(gold: str, answer: str) -> tuple[float, float]:
    """Return exact match and F1 of an answer against one right answer, as SQuAD counts them."""
    right, said = (
        ARTICLES.sub(" ", "".join(c for c in text.lower() if c not in PUNCTUATION)).split()
        for text in (gold, answer)
    )
    if not right or not said:
        return float(right == said), float(right == said)
    common = (Counter(right) & Counter(said)).total()
    return float(right == said), 2 * common / (len(right) + len(said))


COMPARE: dict[str, Callable[[str, str], tuple[float, float]]] = {
    "characters": compare_characters,
    "words": compare_words,
}


def score_answer(golds: Sequence[str], answer: str | None, count: str) -> tuple[float, float]:
    """Return exact match and F1 against the right answer that is nearest, each for itself.

    No `golds`: the question has no answer, for which the answer is ""; None is no answer at all. `count`
    is a key of COMPARE.
    """
    if answer is None:
        return 0.0, 0.0
    pairs = [COMPARE[count](gold, answer) for gold in golds or [""]]
    return max(em for em, _ in pairs), max(f1 for _, f1 in pairs)
