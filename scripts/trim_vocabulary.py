"""Leave out of the merged model the tokens that its task does not need, which loses nothing.

Kept are the tokens that train's texts, prompts and answers consist of, both halves of every merge that
makes one of these, a token for every byte, special tokens, and what `vocabulary` names. A kept token's
row is the same, so its logit is the same, and so are the probabilities among labels of one token each;
any other text falls apart into smaller tokens, down to bytes. Chosen by train alone; how many tokens a
text then has is told of test and of texts of another domain too.

Input   merged model; the folder tokens/; the records of train and test
Output  a model folder; vocabulary.json: {"kept": ids in the merged model's vocabulary, "of", "reasons",
        "texts": that were checked, "tokens_a_text": {texts: {"before", "after"}}}
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.chat import added_bos
from pockettune.data.prompts import Example, Examples, begin_with
from pockettune.data.records import read_records
from pockettune.data.trial_texts import HARD_TEXTS, OTHER_TEXTS
from pockettune.models.folder import embedding_rows, load_tokenizer
from pockettune.models.kept_tokens import Vocabulary, choose_tokens
from pockettune.models.trimming import named_ids, trim_files, trim_weights, trimmed_bytes
from pockettune.tasks import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # texts encoded together


def trim_vocabulary(
    settings: Mapping[str, Any],
    model: Path,
    tokens: Path,
    records: Mapping[str, Path],
    output: Path,
    told: Path,
) -> None:
    """Write the folder `output` and, as `told`, what was kept and what it does to texts."""
    texts = {split: read_own(settings, path) for split, path in records.items()}
    examples = Examples(tokens / "train.arrow")
    whole = read_tokenizer(model)
    kept, reasons = choose(settings, model, whole, tokens, texts["train"])
    with program.staged(output, trimmed_bytes(model, kept)) as partial:
        partial.mkdir()
        trim_files(model, kept, partial)
        check_tokens(whole, partial, kept, texts["train"], examples)
        trim_weights(model, kept, partial)
    lengths = count_tokens(whole, read_tokenizer(output), texts | OTHER_TEXTS)
    program.write_json(told, {"kept": kept, "of": embedding_rows(model), "reasons": reasons,
                              "texts": len(texts["train"]) + len(examples), "tokens_a_text": lengths})  # fmt: skip
    for name, mean in lengths.items():
        program.logger.info("tokens a text, %s: %.1f before, %.1f after", name, *mean.values())


def read_own(settings: Mapping[str, Any], path: Path) -> list[str]:
    """Return the texts of a split's records."""
    field = load_task(settings["task"], settings["dataset"]).text_field
    return [record[field] for record in read_records(path)]


def choose(
    settings: Mapping[str, Any],
    model: Path,
    whole: Tokenizer,
    tokens: Path,
    texts: Sequence[str],
) -> tuple[list[int], dict[str, int]]:
    """Return the ids to keep, ascending, and how many each reason added.

    `whole` is the model's tokenizer, `texts` are those of train.
    """
    answers = program.read_json(tokens / "answers.json")
    warn_of_long_answers(answers)
    vocabulary = Vocabulary(program.read_json(model / "tokenizer.json"), model.name)
    examples = Examples(tokens / "train.arrow")
    emitted = emitted_ids(whole, texts, examples, answers)
    rows, wanted = embedding_rows(model), settings["vocabulary"]
    kept, reasons = choose_tokens(
        vocabulary, emitted, wanted, rows, read_names(model), special_ids(model)
    )
    program.logger.info("%d of %d tokens kept: %s", len(kept), rows, reasons)
    return kept, reasons


def check_tokens(
    whole: Tokenizer,
    trimmed: Path,
    kept: Sequence[int],
    texts: Sequence[str],
    examples: Sequence[Example],
) -> None:
    """Raise UserError where train is read otherwise in the trimmed folder, or a hard text is lost."""
    after = read_tokenizer(trimmed)
    check_texts(whole, after, kept, texts)
    check_prompts(load_tokenizer(trimmed), kept, examples)
    check_round_trip(whole, after)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return a folder's tokenizer, which neither fills up nor cuts what it is given.

    One that was saved after a training often does: then a long text's last tokens would not be kept.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_ids(model: Path) -> set[int]:
    """Return the ids that a folder's configurations and transformers' own tokenizer have for something."""
    configs = (model / name for name in ("config.json", "generation_config.json"))
    named = {n for path in configs if path.is_file() for n in named_ids(program.read_json(path))}
    return named.union(load_tokenizer(model).all_special_ids)


def read_names(model: Path) -> str:
    """Return the text that names special tokens, without the list of all that there are."""
    files = (model / name for name in ("special_tokens_map.json", "chat_template.jinja"))
    config = program.read_json(model / "tokenizer_config.json")
    config.pop("added_tokens_decoder", None)
    texts = [path.read_text(encoding="utf-8") for path in files if path.is_file()]
    return "\n".join([json.dumps(config, ensure_ascii=False), *texts])


def warn_of_long_answers(answers: Mapping[str, Any]) -> None:
    """Say that answers of several tokens may change places: each has a softmax over fewer tokens."""
    if any(len(ids) > 2 for ids in answers["ids"]):  # the answer and the end of turn
        program.logger.warning(
            "answers of several tokens (%s): their probabilities may change among each other; labels of a"
            " single token would not",
            ", ".join(w for w, ids in zip(answers["words"], answers["ids"], strict=True) if len(ids) > 2),
        )  # fmt: skip


def emitted_ids(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    examples: Sequence[Example],
    answers: Mapping[str, Any],
) -> set[int]:
    """Return the ids that train's texts, prompts and answers consist of."""
    ids = {number for encoded in encode(tokenizer, texts) for number in encoded}
    for example in examples:
        ids.update(example.prompt_ids, example.answer_ids)
    return ids.union(*answers["ids"], answers["ends"])


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterable[list[int]]:
    """Yield the ids of each text as it stands."""
    for begin in range(0, len(texts), BATCH):
        for encoded in tokenizer.encode_batch(
            texts[begin : begin + BATCH], add_special_tokens=False
        ):
            yield encoded.ids


def check_texts(
    whole: Tokenizer, trimmed: Tokenizer, kept: Sequence[int], texts: Sequence[str]
) -> None:
    """Raise UserError where a text of train has other tokens in the new vocabulary."""
    pairs = zip(texts, encode(whole, texts), encode(trimmed, texts), strict=True)
    refuse_differing(
        [text for text, before, after in pairs if [kept[n] for n in after] != before],
        f"{len(texts)} texts",
    )


def check_prompts(
    tokenizer: "PreTrainedTokenizerBase", kept: Sequence[int], examples: Sequence[Example]
) -> None:
    """Raise UserError where a prompt of train has other tokens to transformers than it was trained on.

    transformers builds some tokenizers itself, of tokenizer.json's merges, and may add tokens to them.
    """
    old, bos, differing = dict(enumerate(kept)), added_bos(tokenizer), []
    for begin in range(0, len(examples), BATCH):
        batch = examples[begin : begin + BATCH]
        encoded = tokenizer([e.prompt for e in batch], add_special_tokens=False)["input_ids"]
        for example, ids in zip(batch, encoded, strict=True):
            if [old.get(number) for number in begin_with(bos, ids)] != example.prompt_ids:
                differing.append(example.prompt)
    refuse_differing(differing, f"{len(examples)} prompts")


def refuse_differing(differing: Sequence[str], of: str) -> None:
    if differing:
        raise UserError(
            f"vocabulary.keep task: {len(differing)} of {of} of train have other tokens in the"
            f" trimmed vocabulary, the first is {differing[0][:60]!r}: this tokenizer does more than merges"
            " tell; set vocabulary.keep to full"
        )


def check_round_trip(whole: Tokenizer, trimmed: Tokenizer) -> None:
    """Raise UserError where a text of hard characters is another behind encoding and decoding."""
    pairs = [(decoded(whole, text), decoded(trimmed, text)) for text in HARD_TEXTS]
    if lost := [before for before, after in pairs if before != after]:
        raise UserError(
            f"vocabulary.keep task: {lost[0][:60]!r} does not survive the trimmed vocabulary; set"
            " vocabulary.keep to full"
        )


def decoded(tokenizer: Tokenizer, text: str) -> str:
    return str(
        tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
    )


def count_tokens(
    whole: Tokenizer, trimmed: Tokenizer, texts: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Return the mean tokens of a text of each kind, before and after."""
    return {
        name: {
            when: sum(map(len, encode(tokenizer, own))) / max(len(own), 1)
            for when, tokenizer in (("before", whole), ("after", trimmed))
        }
        for name, own in texts.items()
    }


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections vocabulary, task, dataset"
    )
    parser.add_argument("--model", type=Path, required=True, help="merged model's folder")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    for split in ("train", "test"):
        parser.add_argument(f"--{split}", type=Path, required=True, help=f"{split}.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="model folder to make")
    parser.add_argument("--vocabulary", type=Path, required=True, help="JSON file to write")

    def work(a: argparse.Namespace) -> None:
        records = {"train": a.train, "test": a.test}
        trim_vocabulary(a.settings, a.model, a.tokens, records, a.output, a.vocabulary)

    program.run(parser, work)


if __name__ == "__main__":
    main()
