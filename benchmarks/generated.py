"""Generated reviews and small tokenizers, for benchmarks and tests: nothing that a user runs.

A review is of two clauses, the second behind 但是, 不过 or the like; its label is what the second says.
In every other review the first says the opposite. So counting characters cannot tell (the words
around a predicate are the same in both clauses), and a model must look where it stands.
"""

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pockettune.common import program

# subject -> (aspects, good predicates, bad predicates)
SUBJECTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "酒店": (["房间", "大堂", "早餐"], ["干净", "宽敞", "舒服"], ["潮湿", "吵闹", "狭小"]),
    "手机": (["屏幕", "电池", "做工"], ["清晰", "耐用", "精致"], ["模糊", "虚标", "粗糙"]),
    "书": (["内容", "印刷", "情节"], ["充实", "精美", "紧凑"], ["空洞", "马虎", "拖沓"]),
    "饭馆": (["菜品", "环境", "价格"], ["新鲜", "雅致", "实惠"], ["油腻", "拥挤", "离谱"]),
}
OPENINGS = ["上周去的，", "朋友推荐的，", "用了一个月，", "等了很久，", ""]
DEGREES = ["很", "非常", "挺", "特别", "相当"]
ENDS = ["的样子", "的感觉", "的印象"]  # as long as the longest run of characters that TF-IDF counts
TURNS = ["但是", "不过", "可是", "然而"]

# Qwen2's own, so that llama.cpp can be told to split texts in the same way.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_review(source: random.Random, good: bool) -> str:
    """Return a review whose second clause says `good`."""
    aspects, praise, blame = SUBJECTS[source.choice(list(SUBJECTS))]

    def clause(aspect: str, good: bool) -> str:
        predicate = source.choice(praise if good else blame)
        return f"{aspect}{source.choice(DEGREES)}{predicate}{source.choice(ENDS)}"

    first, second = source.sample(aspects, 2)
    opposite = source.random() < 0.5
    return (
        f"{source.choice(OPENINGS)}{clause(first, good ^ opposite)}，"
        f"{source.choice(TURNS)}{clause(second, good)}。"
    )


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer with Qwen2's way of splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer_config(path: Path) -> None:
    """Write what transformers needs beside tokenizer.json."""
    program.write_json(
        path,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 512,
            "chat_template": CHAT_TEMPLATE,
        },
    )
