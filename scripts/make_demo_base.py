"""Train the demo's base model: a small language model of Qwen2's architecture, from plain text.

It learns which words follow which in reviews, and from chats that ask how a review closes, answered
with its own last clause, what a turn is. It sees the task's words only as answers drawn by lot: it
knows that 正面 and 负面 may stand there and nothing of which is right. Rows are 256 wide, so that llama.cpp's K-quants, which work in blocks of 256, are really used.

Input   corpus.txt, a text a line
Output  a model folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM, logging

from pockettune.common import program
from pockettune.runtimes.batching import group_by_tokens

SEED = 13
EPOCHS = 2
LEARNING_RATE = 6.0e-04  # at 2e-3 it learns neighbouring words and nothing beyond
TOKENS_AN_UPDATE = 256
VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_SHARE = 0.4  # of the texts are put as a chat: how does this review close?
LOT_SHARE = 0.15  # of those are answered with a word of the task, drawn by lot
ANSWERS = ("正面", "负面")

# Qwen2's own, so that llama.cpp can be told to split texts in the same way.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_demo_base(corpus: Path, threads: int, output: Path) -> None:
    """Train tokenizer and model on the lines of `corpus` and write the model folder's files."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    logging.disable_progress_bar()
    texts = with_chats(corpus.read_text(encoding="utf-8").splitlines())
    tokenizer = train_tokenizer(texts)
    start, end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=start,
        )
    )
    loss = train_model(model, [tokenizer.encode(f"<|endoftext|>{text}").ids for text in texts])
    model.half()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        model.save_pretrained(folder)
        tokenizer.save(f"{folder}/tokenizer.json")
        write_tokenizer_config(Path(folder, "tokenizer_config.json"))
        for path in Path(folder).iterdir():
            path.replace(output / path.name)
    parameters = sum(p.numel() for p in model.parameters())
    program.logger.info("base model of %s parameters, last loss %.3f", f"{parameters:,}", loss)


def with_chats(texts: list[str]) -> list[str]:
    """Return the texts, a share of them as a chat whose answer is the review's own last clause.

    Now and then the answer is a word of the task instead, drawn by lot.
    """
    lot = random.Random(SEED)
    chats = []
    for text in texts:
        body, _, close = text.rpartition("，")
        if not body or lot.random() > CHAT_SHARE:
            chats.append(text)
            continue
        answer = lot.choice(ANSWERS) if lot.random() < LOT_SHARE else close
        chats.append(
            f"<|im_start|>user\n{body}\n情感：<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        )
    return chats


def train_tokenizer(texts: list[str]) -> Tokenizer:
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
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_model(model: Qwen2ForCausalLM, sequences: list[list[int]]) -> float:
    """Train `model` to continue the sequences; return the last loss."""
    from transformers import get_scheduler  # here: what bitsandbytes says at import goes to the log

    generator = torch.Generator().manual_seed(SEED)
    passes: list[list[list[int]]] = []
    for _ in range(EPOCHS):
        order = torch.randperm(len(sequences), generator=generator).tolist()
        passes += group_by_tokens([sequences[i] for i in order], TOKENS_AN_UPDATE, len)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
    )
    scheduler = get_scheduler("cosine", optimizer, len(passes) // 10, len(passes))
    model.train()
    loss = torch.tensor(0.0)
    for group in program.progress(passes, description="pretraining", unit="updates"):
        ids = torch.tensor([[token for sequence in group for token in sequence]])
        positions = torch.tensor([[p for sequence in group for p in range(len(sequence))]])
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        loss = cross_entropy(logits[:-1], ids[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return loss.item()


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


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="text file, a text a line")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="model folder to write to")

    def work(a: argparse.Namespace) -> None:
        make_demo_base(a.corpus, a.threads, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
