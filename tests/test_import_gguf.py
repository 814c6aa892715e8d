"""A GGUF file as base model: the folder made of it is the model that was put in, or it is refused."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import CONVERTER, LINEAGE, copy_checkout, run_program, run_snakemake
from generated import CHAT_TEMPLATE, SPECIAL
from import_gguf import import_gguf
from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.prompts import encode, encode_plain
from pockettune.data.trial_texts import HARD_TEXTS
from pockettune.gguf import dequantize
from pockettune.gguf.files import read_gguf
from pockettune.gguf.tokenizer import (
    PRE_TOKENIZERS,
    byte_level_tokenizer,
    sentencepiece_model,
    sentencepiece_tokenizer,
)
from pockettune.models.folder import load_tokenizer
from pockettune.runtimes.llama import LlamaModel
from pockettune.workflow.config import check_files
from quantize_model import quantize_model

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "dtype": "float16",
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
GEMMA_ROPE = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
              "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}  # fmt: skip
# Name: transformers' architecture, the pre-tokenizer (None is SentencePiece), what is its own. Head
# widths that are not hidden_size / heads, an epsilon and bases that are not the default.
KINDS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", "smollm", {"num_hidden_layers": 3, "rms_norm_eps": 1e-3, "tie_word_embeddings": True,
                                  "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}),
    "llama3": ("llama", "llama-bpe", {"num_hidden_layers": 3, "max_position_embeddings": 16384, "attention_bias": True, "head_dim": 32,
                                      "rope_parameters": LLAMA3_ROPE}),
    "llama2": ("llama", None, {"num_hidden_layers": 3}),
    "qwen2": ("qwen2", "qwen2", {"num_hidden_layers": 3, "tie_word_embeddings": True,
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", "qwen2", {"num_hidden_layers": 3, "head_dim": 32,
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma3": ("gemma3_text", None, {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32,
                                     "sliding_window": 16, "rope_parameters": GEMMA_ROPE}),
}  # fmt: skip
SENTENCES = [*HARD_TEXTS, "房间很干净，但是服务很差。正面 负面 情感：", "The room was clean, but the service was bad."] * 3  # fmt: skip
USER_DEFINED = ["\n", "\n\n", "▁▁", "▁▁▁", "<b>"]
GEMMA_SPECIAL = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}


def make_byte_level(folder: Path, pre: str) -> int:
    """Write a byte-level BPE tokenizer and return how many tokens it has."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    steps = json.dumps({"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]})
    split = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "pre_tokenizer": json.loads(steps)}))  # fmt: skip
    tokenizer.pre_tokenizer = split.pre_tokenizer
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[2],
              "pad_token": SPECIAL[0], "chat_template": CHAT_TEMPLATE}  # fmt: skip
    if pre == "llama-bpe":
        config["add_bos_token"] = True  # type: ignore[assignment]
    program.write_json(folder / "tokenizer_config.json", config)
    return int(tokenizer.get_vocab_size())


def make_sentencepiece(folder: Path, prefix: bool) -> int:
    """Write a SentencePiece vocabulary as Gemma has it, or as Llama 2 with a space put before a text.

    Returns how many tokens it has.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=700, byte_fallback=True, user_defined_symbols=USER_DEFINED,
        control_symbols=["<start_of_turn>", "<end_of_turn>"], pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        bos_piece="<bos>", eos_piece="<eos>", normalization_rule_name="identity",
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    vocabulary = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    added = {
        number: vocabulary.id_to_piece(number)
        for number in range(vocabulary.vocab_size())
        if vocabulary.is_control(number) or vocabulary.id_to_piece(number) in USER_DEFINED
    }
    config = {
        **{f"{name}_token": token for name, token in GEMMA_SPECIAL.items()},
        "add_bos_token": True,
        "chat_template": CHAT_TEMPLATE.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>"),
        "added_tokens_decoder": {str(number): {"content": text, "special": text not in USER_DEFINED}
                                 for number, text in added.items()},
    }  # fmt: skip
    program.write_json(folder / "tokenizer_config.json", config)
    # All that the converter asks of it beside tokenizer.model: the ids of special tokens.
    entries = [{"id": number, "content": text} for number, text in (added | {3: "<unk>"}).items()]
    program.write_json(folder / "tokenizer.json", {"added_tokens": entries})
    return int(vocabulary.vocab_size())


def make_model(folder: Path, kind: str) -> Path:
    """Write a small random model of an architecture, none of whose vectors is all alike."""
    architecture, pre, own = KINDS[kind]
    folder.mkdir()
    tokens = (
        make_byte_level(folder, pre) if pre else make_sentencepiece(folder, architecture == "llama")
    )
    torch.manual_seed(3)
    config = AutoConfig.for_model(architecture, vocab_size=tokens, **{**COMMON, **own})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.half().save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Made:
    """A small model and its GGUF files."""

    model: Path
    f16: Path
    quantized: Path


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return what makes the files of a kind, once each: converting takes seconds."""
    folder, made = tmp_path_factory.mktemp("gguf"), dict[str, Made]()

    def make(kind: str) -> Made:
        if kind not in made:
            model = make_model(folder / kind, kind)
            files = [folder / f"{kind}-{name}.gguf" for name in ("f16", "q4_0")]
            result = run_program("convert_model.py", "--model", model, "--converter", CONVERTER,
                                 "--settings", LINEAGE, "--output", files[0])  # fmt: skip
            assert result.returncode == 0, result.stdout
            quantize_model({"type": "Q4_0"}, files[0], 1, files[1])
            made[kind] = Made(model, *files)
        return made[kind]

    return make


def take(path: Path, output: Path, **settings: str) -> dict[str, Any]:
    """Import a file; return what source.json says of it."""
    import_gguf({"path": str(path), **settings}, 1, output)
    told: dict[str, Any] = program.read_json(output / "source.json")
    return told


def refusal(path: Path, folder: Path, **settings: str) -> str:
    """Return the error of an import that fails, having left nothing behind."""
    with pytest.raises(UserError) as raised:
        import_gguf({"path": str(path), **settings}, 1, folder / "taken" / "model")
    assert [*folder.glob("taken/*"), *folder.glob("taken/.*.partial")] == []
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_config_come_back_as_they_were(
    kind: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made = make(kind)
    take(made.f16, tmp_path / "model")
    before, after = (load_file(f / "model.safetensors") for f in (made.model, tmp_path / "model"))
    assert after.keys() == before.keys() - ({"lm_head.weight"} if "lm_head.weight" not in after else set())  # fmt: skip
    for name, weight in after.items():
        # The converter adds one to Gemma's norms in F16, so what it rounded off is not in the file.
        shifted = kind == "gemma3" and name.endswith("norm.weight")
        expected = before[name] + 1 - 1 if shifted else before[name]
        assert torch.equal(weight, expected), name
    keys = [*COMMON.keys() - {"initializer_range"}, *KINDS[kind][2]]
    config, own = (AutoConfig.from_pretrained(f) for f in (tmp_path / "model", made.model))
    assert {key: getattr(config, key) for key in keys} == {key: getattr(own, key) for key in keys}
    if kind == "gemma3":
        assert config.layer_types == own.layer_types


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_are_what_the_gguf_package_reads(
    kind: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    """Values are compared sorted: rows of llama's q and k were put back into another order."""
    told = take(make(kind).quantized, tmp_path / "model")
    assert told["origin"] == told["gguf"]["file"] == f"{kind}-q4_0.gguf"
    assert told["gguf"]["type"] == "Q4_0" and 4.5 <= told["gguf"]["bits_per_weight"] < 9
    found = load_file(tmp_path / "model/model.safetensors")
    tensors = {t.name: t for t in gguf.GGUFReader(make(kind).quantized).tensors}
    names = {"model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
             "model.layers.2.mlp.down_proj.weight": "blk.2.ffn_down.weight",
             "model.embed_tokens.weight": "token_embd.weight"}  # fmt: skip
    for name, stored in names.items():
        expected = gguf.dequantize(tensors[stored].data, tensors[stored].tensor_type)
        assert found[name].shape == expected.shape
        np.testing.assert_array_equal(np.sort(found[name].numpy(), None), np.sort(expected.astype(np.float16), None))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_original_tokenizer(
    kind: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made, texts = make(kind), list(HARD_TEXTS)
    take(made.quantized, tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    if kind == "llama2":
        # Behind each line break and run of spaces llama.cpp puts another space, SentencePiece does
        # not; Llama 2's own vocabulary has no such tokens.
        texts = [text for text in texts if "\n" not in text and "  " not in text]
    if KINDS[kind][1] is None:
        original = sentencepiece.SentencePieceProcessor(str(made.model / "tokenizer.model"))
        expected = [original.encode(text) for text in texts]
    else:
        own = Tokenizer.from_file(str(made.model / "tokenizer.json"))
        expected = [own.encode(text, add_special_tokens=False).ids for text in texts]
    assert [encode_plain(tokenizer, text) for text in texts] == expected
    assert [str(tokenizer.decode(ids)).strip() for ids in expected[1:4]] == texts[1:4]


@pytest.mark.parametrize("kind", ["llama2", "gemma3"])
def test_a_prompt_begins_with_one_bos_in_both_runtimes(
    kind: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    take(make(kind).f16, tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    with LlamaModel(make(kind).f16, threads=1) as llama:
        assert llama.adds_bos()
        for text in ("", "好", f"{tokenizer.bos_token}好"):
            ids = llama.tokenize(text)
            assert ids == encode(tokenizer, text)
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_an_imported_model_is_converted_back_to_the_same_file(
    make: Callable[[str], Made], tmp_path: Path
) -> None:
    """Of a SentencePiece vocabulary, whose tokens, scores and types the converter must find again."""
    take(make("gemma3").f16, tmp_path / "model")
    again = tmp_path / "again.gguf"
    result = run_program("convert_model.py", "--model", tmp_path / "model", "--converter", CONVERTER,
                         "--settings", LINEAGE, "--output", again)  # fmt: skip
    assert result.returncode == 0, result.stdout
    (before, tensors), (after, others) = (read_gguf(f) for f in (make("gemma3").f16, again))
    assert {k: v for k, v in after.items() if before.get(k) != v} == {}
    assert [t.name for t in tensors] == [t.name for t in others]
    starts = tensors[0].start, others[0].start
    assert make("gemma3").f16.read_bytes()[starts[0] :] == again.read_bytes()[starts[1] :]


def test_sentencepiece_reads_the_model_as_it_was(make: Callable[[str], Made]) -> None:
    metadata = dequantize.open_source(make("gemma3").f16).metadata
    before = sentencepiece.SentencePieceProcessor(str(make("gemma3").model / "tokenizer.model"))
    after = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(metadata))
    assert [after.encode(text) for text in HARD_TEXTS] == [before.encode(text) for text in HARD_TEXTS]  # fmt: skip
    assert (after.bos_id(), after.eos_id(), after.pad_id(), after.unk_id()) == (2, 1, 0, 3)


def small_vocabulary(*tokens: str, **entries: Any) -> dict[str, Any]:
    """Return the metadata of a tokenizer of a few tokens, the first of which is unknown."""
    common = {"tokens": ["?", *tokens], "token_type": [2] + [1] * len(tokens), "eos_token_id": 1,
              "unknown_token_id": 0}  # fmt: skip
    named = {f"tokenizer.ggml.{key}": value for key, value in {**common, **entries}.items()}
    return {"general.architecture": "llama", **named}


def test_the_higher_score_is_joined_first() -> None:
    """SentencePiece joins by score alone: not by id, not from the left, not the longer one."""
    texts = ("a", "b", "c", "ab", "bc")
    for scores, expected in (([0, -2, -1], ["a", "bc"]), ([0, -1, -2], ["ab", "c"])):
        metadata = small_vocabulary(*texts, model="llama", scores=[0.0, 0, 0, *scores], add_space_prefix=False)  # fmt: skip
        tokenizer = Tokenizer.from_str(json.dumps(sentencepiece_tokenizer(metadata)))
        assert tokenizer.encode("abc").tokens == expected


def test_llama_3_keeps_a_word_that_is_a_token() -> None:
    """Also where no merge leads to it, as llama.cpp does for llama-bpe and for no other."""
    for pre, expected in (("llama-bpe", ["abc"]), ("qwen2", ["ab", "c"])):
        metadata = small_vocabulary("a", "b", "c", "ab", "abc", model="gpt2", pre=pre, merges=["a b"])  # fmt: skip
        tokenizer = Tokenizer.from_str(json.dumps(byte_level_tokenizer(metadata, "x.gguf")))
        assert tokenizer.encode("abc").tokens == expected


WRONG: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "q and k not put back": ("llama", "unpermute", lambda source, name, weight: weight),
    "q and k put back where they were not moved": ("qwen2", "unpermute", lambda source, name, weight: (
        weight if "attn_q" not in name else np.roll(weight, 1, axis=0))),
    "norms not shifted": ("gemma3", "is_shifted", lambda source, name: False),
    "every fifth layer looks everywhere": ("gemma3", "narrow_layers", lambda pattern, layers: (
        [layer % 5 != 4 for layer in range(layers)])),
    "rope bases rounded": ("qwen3", "shortest", lambda value: 1e4 if value > 1 else float(value)),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_import_is_caught(
    fault: str, make: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, name, wrong = WRONG[fault]
    path = make(kind).quantized
    monkeypatch.setattr(dequantize, name, wrong)
    message = refusal(path, tmp_path)
    assert "dequantized logits: " in message and "is not what the file is in llama.cpp" in message


def test_swapped_layers_are_caught(
    make: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = make("llama").quantized, dequantize._read_steps
    first, second = "blk.1.ffn_down.weight", "blk.2.ffn_down.weight"

    def read_swapped(source: dequantize.Source, name: str) -> Iterator[np.ndarray]:
        return read(source, {first: second, second: first}.get(name) or name)

    monkeypatch.setattr(dequantize, "_read_steps", read_swapped)
    assert "logits: " in refusal(path, tmp_path)


def test_a_wrong_split_is_caught(
    make: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("llama3").quantized
    monkeypatch.setitem(PRE_TOKENIZERS, "llama-bpe", PRE_TOKENIZERS["gpt-2"])
    assert "token_ids: " in refusal(path, tmp_path)


def edited(source: Path, path: Path, change: Callable[[gguf.GGUFReader], None]) -> Path:
    shutil.copyfile(source, path)
    reader = gguf.GGUFReader(path, "r+")
    change(reader)
    reader.data.flush()
    return path


def rename(key: str, old: bytes, new: bytes) -> Callable[[gguf.GGUFReader], None]:
    """Replace a text of the metadata, or a key's name, by one of the same length."""

    def change(reader: gguf.GGUFReader) -> None:
        field = reader.fields[key]
        part = next(p for p in field.parts if old in p.tobytes())
        part[:] = np.frombuffer(part.tobytes().replace(old, new), np.uint8)
        assert len(old) == len(new)

    return change


def overflow(reader: gguf.GGUFReader) -> None:
    next(t.data for t in reader.tensors if t.name == "output_norm.weight")[3] = 7e4


def bend(reader: gguf.GGUFReader) -> None:
    next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")[7] *= 1.1


IN_PLACE: dict[str, tuple[str, Callable[[gguf.GGUFReader], None], str]] = {
    "architecture": ("llama", rename("general.architecture", b"llama", b"mamba"),
                     "architecture 'mamba' is not one of llama, qwen2, qwen3, gemma3; "),
    "template": ("llama", rename("tokenizer.chat_template", b"chat_template", b"chat_xemplate"),
                 "the file has no chat template"),
    "tokenizer": ("llama", rename("tokenizer.ggml.model", b"gpt2", b"bert"),
                  "tokenizer 'bert' is not one of gpt2 (byte-level BPE), llama (SentencePiece)"),
    "split": ("llama", rename("tokenizer.ggml.pre", b"smollm", b"falcon"),
              "pre-tokenizer 'falcon' (tokenizer.ggml.pre) is not one of qwen2, llama-bpe, smollm, gpt-2"),
    "entry": ("llama", rename("tokenizer.ggml.merges", b"merges", b"xerges"), "its metadata have no tokenizer.ggml.merges"),
    "scaling": ("gemma3", rename("gemma3.rope.scaling.type", b"linear", b"linxxx"), "rope scaling 'linxxx' is not supported"),
    "frequencies": ("llama3", bend, "its rope_freqs.weight are not those of Llama 3.1 or 3.2"),
    "overflow": ("llama", overflow, "weights that F16 cannot hold (NaN, or beyond 65504) in model.norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", IN_PLACE)
def test_what_cannot_be_read_is_refused_by_name(
    what: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    kind, change, message = IN_PLACE[what]
    assert message in refusal(edited(make(kind).quantized, tmp_path / "x.gguf", change), tmp_path)


def written(path: Path, kind: Any = gguf.GGMLQuantizationType.F32, **entries: int) -> Path:
    """Write a file with little more than a header."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in entries.items():
        writer.add_uint32(key.replace("__", "."), value)
    size = gguf.GGML_QUANT_SIZES[kind][1] * 2
    writer.add_tensor("token_embd.weight", np.zeros((2, size // 2), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_parts_experts_and_unknown_types_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert "it is one of 3 parts" in refusal(written(path, split__count=3), tmp_path)
    assert "a mixture of 8 experts" in refusal(written(path, llama__expert_count=8), tmp_path)
    one_bit = written(path, gguf.GGMLQuantizationType.Q1_0)
    assert "quantization Q1_0 cannot be read back; take a file of another type" in refusal(one_bit, tmp_path)  # fmt: skip
    assert "blk.0.attn_k.weight is missing" in refusal(written(path), tmp_path)


def test_damaged_files_are_refused(make: Callable[[str], Made], tmp_path: Path) -> None:
    whole = make("llama").quantized.read_bytes()
    path = tmp_path / "x.gguf"
    for content, message in (
        (whole[:-100], "is truncated: "),
        (whole[:1000], "is truncated or damaged: its header cannot be read"),
        (b"no GGUF at all, but long enough to be read", "is not a GGUF file of version 2 or 3"),
        (b"", "is empty"),
    ):
        path.write_bytes(content)
        told = refusal(path, tmp_path)
        assert message in told and "made anew" not in told


def test_a_base_model_gets_a_template(make: Callable[[str], Made], tmp_path: Path) -> None:
    change = rename("tokenizer.chat_template", b"chat_template", b"chat_xemplate")
    path = edited(make("llama").f16, tmp_path / "base.gguf", change)
    own = tmp_path / "own.jinja"
    own.write_text(CHAT_TEMPLATE.replace("assistant", "helper"))
    take(path, tmp_path / "model", chat_template=str(own))
    rendered = load_tokenizer(tmp_path / "model").apply_chat_template(
        [{"role": "user", "content": "好"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\n好<|im_end|>\n<|im_start|>helper\n"


def test_the_program_ends_in_one_line(tmp_path: Path) -> None:
    settings = json.dumps({"model": {"path": str(written(tmp_path / "x.gguf", split__count=2))}})
    result = run_program("import_gguf.py", "--settings", settings, "--threads", "1",
                         "--output", tmp_path / "model")  # fmt: skip
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1].startswith("error: model.path x.gguf: it is one of 2 parts")  # fmt: skip


def test_path_is_a_folder_or_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF")
    (tmp_path / "folder.gguf").mkdir()
    for name, message in (("blob", "does not end in .gguf"), ("folder.gguf", "is a folder")):
        with pytest.raises(UserError, match=message):
            check_files({"model.path": str(tmp_path / name)})


def test_the_workflow_takes_a_gguf_file(tmp_path: Path) -> None:
    """Another template is another base; the file's place is nobody's business."""
    folder = copy_checkout(tmp_path / "checkout")
    (folder / "a.GGUF").write_bytes(b"GGUF")
    (folder / "own.jinja").write_text("{{ messages }}")
    (folder / "data.csv").write_text("text,label\na,0\n")
    model = {"path": "a.GGUF"}
    run = {"model": model, "dataset": {"files": {"all": "data.csv"}}}
    (folder / "run.json").write_text(json.dumps(run))
    plan = run_snakemake(folder, "tokenize", "--dry-run", "--configfile", "run.json").stdout
    assert "rule import_gguf:" in plan and "fetch_model" not in plan
    model["chat_template"] = "own.jinja"
    (folder / "run.json").write_text(json.dumps(run))
    other = run_snakemake(folder, "tokenize", "--dry-run", "--configfile", "run.json").stdout
    bases = [next(w for w in text.split() if "resources/models/a@" in w) for text in (plan, other)]
    assert bases[0] != bases[1] and "own.jinja" in other


REAL = sorted(Path(os.environ.get("POCKETTUNE_MODELS", "no such folder")).glob("*.gguf"))


@pytest.mark.skipif(not REAL, reason="POCKETTUNE_MODELS names no folder with .gguf files")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_models(path: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE)
    has_template = "tokenizer.chat_template" in dequantize.open_source(path).metadata
    told = take(path, tmp_path / "model", **({} if has_template else {"chat_template": str(template)}))  # fmt: skip
    assert all(check["passed"] for check in told["gguf"]["checks"])
