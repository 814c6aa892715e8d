"""A trimmed vocabulary: the same tokens for what train says, the same numbers for each, every text whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from check_vocabulary import check_vocabulary
from conftest import CONVERTER, LINEAGE, run_program
from import_gguf import import_gguf
from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.prompts import Examples
from pockettune.data.trial_texts import HARD_TEXTS
from pockettune.models.folder import check_model_folder, embedding_rows, load_model, load_tokenizer
from pockettune.models.kept_tokens import MULTIPLE, Vocabulary, choose_tokens
from pockettune.models.shards import list_stored
from pockettune.models.trimming import renumber, trim_files, trimmed_bytes
from pockettune.parity import stored
from pockettune.runtimes.llama import LlamaModel
from test_import_gguf import make_model
from tokenize_dataset import tokenize_dataset
from trim_vocabulary import check_prompts, check_texts, encode, trim_vocabulary

KINDS = ("qwen2", "llama3", "gemma3", "llama2")
TEXTS = ["房间很干净，但是服务很差。", "The room was clean.", "早餐不错，the staff too"]
TASK = {"type": "classification", "system": "", "prompt": "{text}\n情感：", "labels": {"0": "差", "1": "好"},
        "template_options": {}}  # fmt: skip
COLUMNS = {"text_column": "text", "label_column": "label", "files": None}
NONE: dict[str, Any] = {"keep": "task", "scripts": [], "frequent": 0}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the tokenizer of an architecture, as the workflow has it of a GGUF file."""
    folder = tmp_path_factory.mktemp(request.param)
    made, gguf = make_model(folder / "made", request.param), folder / "f16.gguf"
    result = run_program("convert_model.py", "--model", made, "--converter", CONVERTER,
                         "--settings", LINEAGE, "--output", gguf)  # fmt: skip
    assert result.returncode == 0, result.stdout
    import_gguf({"path": str(gguf)}, 1, folder / "base")
    return folder / "base"


def write_records(folder: Path, texts: list[str]) -> dict[str, Path]:
    paths = {}
    for split in ("train", "validation", "test"):
        paths[split] = folder / f"{split}.jsonl"
        rows = [
            {"id": f"{split}-{i}", "text": t, "label": "差好"[i % 2]} for i, t in enumerate(texts)
        ]
        paths[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture(scope="module")
def trimmed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The base trimmed to what a few texts need."""
    return trim(base, tmp_path_factory.mktemp("trimmed"))


def trim(base: Path, folder: Path) -> SimpleNamespace:
    sections = {"task": TASK, "dataset": COLUMNS, "tokenize": {"max_length": 128}}
    records = write_records(folder, TEXTS)
    tokenize_dataset(sections, base, records, folder / "tokens")
    told = folder / "vocabulary.json"
    trim_vocabulary({**sections, "vocabulary": NONE}, base, folder / "tokens", records, folder / "model", told)  # fmt: skip
    return SimpleNamespace(base=base, model=folder / "model", told=program.read_json(told),
                           tokens=folder / "tokens", records=records, sections=sections)  # fmt: skip


def read_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_fewer_tokens_and_a_folder_that_is_whole(trimmed: SimpleNamespace) -> None:
    kept = trimmed.told["kept"]
    assert kept == sorted(set(kept)) and len(kept) % MULTIPLE == 0
    assert embedding_rows(trimmed.model) == len(kept) < embedding_rows(trimmed.base)
    assert read_tokenizer(trimmed.model).get_vocab_size() == len(kept)
    check_model_folder(trimmed.model)
    assert load_model(trimmed.model).config.vocab_size == len(kept)  # type: ignore[union-attr]
    stored_bytes = sum(2 * stored.elements for stored in list_stored(trimmed.model))
    assert trimmed_bytes(trimmed.base, kept) == stored_bytes


def test_what_train_says_has_the_same_tokens(trimmed: SimpleNamespace) -> None:
    kept, (before, after) = trimmed.told["kept"], map(read_tokenizer, (trimmed.base, trimmed.model))
    said = [*TEXTS, *(example.prompt for example in Examples(trimmed.tokens / "train.arrow"))]
    for text, own, new in zip(said, encode(before, said), encode(after, said), strict=True):
        assert [kept[number] for number in new] == own, text
    assert trimmed.told["texts"] == len(said)
    lengths = trimmed.told["tokens_a_text"]
    assert lengths["train"]["before"] == lengths["train"]["after"] > 1
    assert lengths["en"]["before"] <= lengths["en"]["after"]


def test_any_text_survives(trimmed: SimpleNamespace) -> None:
    before, after = map(read_tokenizer, (trimmed.base, trimmed.model))

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.text())
    def survives(text: str) -> None:
        decoded = [
            t.decode(t.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            for t in (before, after)
        ]
        assert decoded[0] == decoded[1]

    survives()


def test_a_kept_token_has_the_same_logit_to_the_bit(trimmed: SimpleNamespace) -> None:
    kept = trimmed.told["kept"]
    whole, fewer = (
        load_model(f, dtype=torch.float32).eval() for f in (trimmed.base, trimmed.model)
    )
    (prompt,) = encode(read_tokenizer(trimmed.model), TEXTS[:1])
    with torch.no_grad():
        hidden = [
            model.model(torch.tensor([ids])).last_hidden_state  # type: ignore[operator]
            for model, ids in ((whole, [kept[n] for n in prompt]), (fewer, prompt))
        ]
    assert torch.equal(*hidden)
    rows = [model.get_output_embeddings().weight for model in (whole, fewer)]  # type: ignore[operator]
    assert torch.equal(rows[0][kept], rows[1])
    logits = whole.lm_head(hidden[0])[..., kept], fewer.lm_head(hidden[1])  # type: ignore[operator]
    assert torch.allclose(*logits, atol=1e-5, rtol=0)


def test_llama_cpp_reads_the_converted_model_alike(
    trimmed: SimpleNamespace, tmp_path: Path
) -> None:
    gguf = tmp_path / "f16.gguf"
    result = run_program("convert_model.py", "--model", trimmed.model, "--whole", trimmed.base,
                         "--converter", CONVERTER, "--settings", LINEAGE, "--output", gguf)  # fmt: skip
    assert result.returncode == 0, result.stdout
    tokens = tmp_path / "tokens"
    tokenize_dataset(trimmed.sections, trimmed.model, trimmed.records, tokens)
    tokenizer, examples = load_tokenizer(trimmed.model), Examples(tokens / "test.arrow")
    ends = {ids[-1] for ids in program.read_json(tokens / "answers.json")["ids"]}
    with LlamaModel(gguf, 1) as llama:
        results = [
            stored.check_token_ids(llama, tokenizer, examples),
            stored.check_made_up(llama, tokenizer),
            stored.check_vocabulary(llama, trimmed.base, trimmed.model, trimmed.told["kept"]),
            stored.check_special_tokens(llama, tokenizer, ends),
        ]
        assert [result["detail"] for result in results if not result["passed"]] == []
        untold = stored.check_vocabulary(llama, trimmed.base, trimmed.model)
    assert not untold["passed"] and "base model's embedding" in untold["detail"]


def test_sentencepieces_own_model_reads_alike(trimmed: SimpleNamespace) -> None:
    paths = [folder / "tokenizer.model" for folder in (trimmed.base, trimmed.model)]
    if not paths[0].exists():
        assert not paths[1].exists()
        pytest.skip("byte-level BPE has no tokenizer.model")
    before, after = (sentencepiece.SentencePieceProcessor(str(path)) for path in paths)
    kept = trimmed.told["kept"]
    for text in TEXTS:
        assert [kept[number] for number in after.encode(text)] == before.encode(text)
    for text in HARD_TEXTS:
        assert after.decode(after.encode(text)) == before.decode(before.encode(text)), text


def test_without_the_halves_of_merges_train_is_read_otherwise(
    trimmed: SimpleNamespace, tmp_path: Path
) -> None:
    """The closure is what keeps the tokens, and the check is what finds that they were not kept."""
    content = program.read_json(trimmed.base / "tokenizer.json")
    vocabulary = Vocabulary(content, "base")
    before = read_tokenizer(trimmed.base)
    emitted = {number for ids in encode(before, TEXTS) for number in ids}
    by_id = {number: text for text, number in vocabulary.ids.items()}
    needed = vocabulary.needed("") | {by_id[number] for number in emitted}
    closed = vocabulary.close(needed)
    assert closed > needed, "some token is made of tokens that no text shows"
    unread = []
    for tokens in (needed, closed):
        kept = vocabulary.numbers(tokens, embedding_rows(trimmed.base))
        folder = tmp_path / str(len(tokens))
        folder.mkdir()
        trim_files(trimmed.base, kept, folder)
        try:
            check_texts(before, read_tokenizer(folder), kept, TEXTS)
        except UserError as error:
            unread.append(str(error))
    assert len(unread) == 1 and "other tokens in the trimmed vocabulary" in unread[0]


@pytest.fixture
def small() -> dict[str, Any]:
    """tokenizer.json of a byte-level vocabulary of a few merges."""
    from generated import train_tokenizer

    return json.loads(train_tokenizer([*TEXTS, "好评", "Привет мир"] * 3, 700).to_str())


def test_scripts_and_frequent_tokens_are_kept(small: dict[str, Any]) -> None:
    vocabulary = Vocabulary(small, "small")
    by_id = {number: text for text, number in vocabulary.ids.items()}
    decoder = Tokenizer.from_str(json.dumps(small)).decoder

    def shown(**wanted: Any) -> set[str]:
        kept, _ = choose_tokens(vocabulary, [], {**NONE, **wanted}, len(vocabulary.ids) + 3)
        return {decoder.decode([by_id[n]]) for n in kept if n in by_id}

    assert not {"好评", " мир", "Привет"} & shown()
    assert "好评" in shown(scripts=["han"]) and "Привет" not in shown(scripts=["han"])
    assert {" мир", "Привет"} <= shown(scripts=["cyrillic"])
    assert len(shown(frequent=300)) > len(shown())


def test_reserved_tokens_and_those_without_a_row_are_left_out(small: dict[str, Any]) -> None:
    rows = len(small["model"]["vocab"]) + len(small["added_tokens"]) + 1
    more = [("<unused7>", rows - 1), ("<tool>", rows), ("<image>", rows + 1)]
    small["added_tokens"] += [{**small["added_tokens"][0], "content": t, "id": n} for t, n in more]
    kept, _ = choose_tokens(Vocabulary(small, "small"), [], NONE, rows + 1)
    assert rows in kept and rows - 1 not in kept and rows + 1 not in kept
    named = '{"pad_token": "<unused7>"}'
    kept, _ = choose_tokens(Vocabulary(small, "small"), [], NONE, rows + 1, named)
    assert rows - 1 in kept


def edit_json(path: Path, **changed: Any) -> None:
    program.write_json(path, program.read_json(path) | changed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("made") / "model", "qwen2")


def test_a_tokenizer_that_fills_up_and_cuts_keeps_whole_texts(made: Path, tmp_path: Path) -> None:
    """As transformers saves one behind a training."""
    expected = trim(made, tmp_path).told["kept"]
    cutting = shutil.copytree(made, tmp_path / "cutting")
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2,
               "pad_type_id": 0, "pad_token": "<|im_end|>"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit_json(cutting / "tokenizer.json", padding=padding, truncation=truncation)
    (tmp_path / "of_cutting").mkdir()
    trimmed = trim(cutting, tmp_path / "of_cutting")
    assert trimmed.told["kept"] == expected
    own = program.read_json(trimmed.model / "tokenizer.json")["padding"]
    assert trimmed.told["kept"][own["pad_id"]] == padding["pad_id"]


def test_what_a_configuration_names_by_number_is_kept(made: Path, tmp_path: Path) -> None:
    """Reserved, so that no text names it; and a token that only transformers takes for a special one."""
    base = shutil.copytree(made, tmp_path / "base")
    rows, content = embedding_rows(base), program.read_json(base / "tokenizer.json")
    content["added_tokens"].append(
        {**content["added_tokens"][0], "content": "<unused1>", "id": rows - 1}
    )
    (last,) = [text for text, number in content["model"]["vocab"].items() if number == rows - 1]
    del content["model"]["vocab"][last]
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != last]
    word = max(content["model"]["vocab"], key=len)
    program.write_json(base / "tokenizer.json", content)
    program.write_json(
        base / "generation_config.json", {"eos_token_id": [2, rows - 1], "pad_token_id": -1}
    )
    edit_json(base / "tokenizer_config.json", mask_token=word)
    trimmed = trim(base, tmp_path)
    assert {rows - 1, content["model"]["vocab"][word]} <= set(trimmed.told["kept"])
    told = program.read_json(trimmed.model / "generation_config.json")
    assert [trimmed.told["kept"][n] for n in told["eos_token_id"]] == [2, rows - 1]
    assert len(load_tokenizer(trimmed.model)) == len(trimmed.told["kept"])


def test_a_sequence_that_has_lost_a_token_is_dropped_whole() -> None:
    kept = {3: 0, 5: 1, 9: 2}
    config = {"bad_words_ids": [[3, 4], [5, 9]], "suppress_tokens": [4, 5], "eos_token_id": [9, 8]}
    expected = {"bad_words_ids": [[1, 2]], "suppress_tokens": [1], "eos_token_id": [2]}
    assert renumber(config, kept) == expected


def test_filling_up_brings_the_halves_of_all_merges() -> None:
    """Else a text of kept tokens could be read otherwise: here "abc" as "ab" and "c" makes it, not "bc"."""
    alphabet = [*ByteLevel.alphabet()]
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["x", "y"]]
    words = [*alphabet, "ab", "bc", "abc", "xy"]
    model = {"type": "BPE", "vocab": {t: n for n, t in enumerate(words)}, "merges": merges}
    content = {"model": model, "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel"}}
    vocabulary = Vocabulary(content, "made")
    known = {*words} - {"ab", "abc", "xy"}
    assert vocabulary.fill_up(known | {f"<{n}>" for n in range(63 - len(known) % 64)}, 999) == {
        "ab"
    }
    assert vocabulary.fill_up(
        known - {"b"} | {f"<{n}>" for n in range(62 - len(known) % 64)}, 999
    ) == {"xy"}


def test_prompts_are_compared_as_transformers_reads_them(trimmed: SimpleNamespace) -> None:
    examples, tokenizer = Examples(trimmed.tokens / "train.arrow"), load_tokenizer(trimmed.model)
    check_prompts(tokenizer, trimmed.told["kept"], examples)
    tokenizer.add_tokens("情感：")
    with pytest.raises(UserError, match="3 of 3 prompts of train have other tokens"):
        check_prompts(tokenizer, trimmed.told["kept"], examples)


def test_what_cannot_be_trimmed_is_refused_before_the_training(made: Path, tmp_path: Path) -> None:
    trimmed = trim(made, tmp_path)
    sections = {**trimmed.sections, "vocabulary": NONE}
    output = tmp_path / "out" / "check.json"
    output.parent.mkdir()
    check_vocabulary(sections, made, trimmed.tokens, trimmed.records["train"], output)
    assert program.read_json(output)["kept"] == len(trimmed.told["kept"])
    output.unlink()
    base = shutil.copytree(made, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    rows = {"model.bias_a_token": torch.zeros(embedding_rows(base)).half()}
    save_file(tensors | rows, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.bias_a_token of .* has a row for each token"):
        check_vocabulary(sections, base, trimmed.tokens, trimmed.records["train"], output)
    assert not [*output.parent.iterdir()]


def test_tensors_of_no_dimension_are_carried(made: Path, tmp_path: Path) -> None:
    base = shutil.copytree(made, tmp_path / "base")
    tensors = load_file(base / "model.safetensors") | {"model.scale": torch.tensor(2.0).half()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    trimmed = trim(base, tmp_path)
    assert load_file(trimmed.model / "model.safetensors")["model.scale"] == 2
    assert trimmed_bytes(base, trimmed.told["kept"]) == sum(
        2 * t.elements for t in list_stored(trimmed.model)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda small: small["model"].update(type="Unigram", vocab=[]), "is Unigram, not BPE"),
        (
            lambda small: small.update(pre_tokenizer={"type": "Whitespace"}),
            "does not take an unknown text apart",
        ),
        (
            lambda small: small["model"].update(continuing_subword_prefix="##"),
            "is BPE with continuing_subword_prefix, not BPE",
        ),
    ],
    ids=["unigram", "no bytes", "prefix"],
)
def test_other_tokenizers_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, small: dict[str, Any]
) -> None:
    change(small)
    with pytest.raises(
        UserError, match=r"^vocabulary.keep task: the tokenizer of small "
    ) as raised:
        Vocabulary(small, "small")
    assert message in str(raised.value) and "set vocabulary.keep to full" in str(raised.value)


def test_bytes_that_the_whole_vocabulary_lacks_are_no_reason_to_refuse(
    small: dict[str, Any],
) -> None:
    """SmolLM2, Falcon, GPT-NeoX and StarCoder have none for some that UTF-8 or their texts do not hold."""
    rows, absent = len(small["model"]["vocab"]), "ÿ"  # the byte 255
    del small["model"]["vocab"][absent]
    vocabulary = Vocabulary(small, "small")
    assert len(vocabulary.bytes) == 255
    kept, _ = choose_tokens(vocabulary, [], NONE, rows)
    shown = {number for text, number in vocabulary.ids.items() if text in vocabulary.bytes}
    assert shown <= set(kept)


def test_bytes_to_fall_back_on_must_all_be_there(small: dict[str, Any]) -> None:
    """Of a vocabulary without one, tokenizers takes no text apart."""
    small["pre_tokenizer"], small["model"]["byte_fallback"] = None, True
    for byte in range(256):
        small["model"]["vocab"][f"<0x{byte:02X}>"] = 10_000 + byte
    assert len(Vocabulary(small, "small").bytes) == 256
    del small["model"]["vocab"]["<0x7F>"]
    with pytest.raises(UserError, match="does not take an unknown text apart into bytes"):
        Vocabulary(small, "small")
