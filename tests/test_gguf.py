"""Conversion and quantization: the files are read back and run."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import CONVERTER, LINEAGE, run_program
from pockettune.common.errors import UserError
from pockettune.data.prompts import encode
from pockettune.gguf.files import check_tensors, describe_file, read_gguf
from pockettune.models.folder import load_model, load_tokenizer, read_header
from pockettune.runtimes.batching import common_prefix, group_by_tokens
from pockettune.runtimes.greedy import answer_greedily, as_text
from pockettune.runtimes.llama import PROMPTS_A_BATCH, LlamaModel
from pockettune.runtimes.packing import ATTENTION, next_token_logits

# llama.cpp keeps keys and values in FP16 and sums in another order than PyTorch in fp32; logits
# of the tiny model reach 3.
F16_LOGIT_BOUND = 0.02
# Largest error of one weight over the largest weight of its tensor, for weights drawn from one
# normal distribution: about half a step of the type's grid.
QUANTIZATION_BOUND = {"F16": 2**-11, "F32": 0.0, "Q8_0": 0.01, "Q6_K": 0.04, "Q5_0": 0.07, "Q4_K": 0.14}  # fmt: skip

TEXTS = ["房间很干净。", "服务很差！\n\n  两个空格", "😀 emoji, English and 123", "<|im_start|>user\n好<|im_end|>\n"]  # fmt: skip


@pytest.fixture(scope="module")
def q4_k_m(f16: Path) -> Path:
    path = f16.with_name("q4_k_m.gguf")
    result = run_program("quantize_model.py", "--settings", '{"type": "Q4_K_M"}', "--source", f16,
                         "--threads", "2", "--output", path)  # fmt: skip
    assert result.returncode == 0, result.stdout
    return path


def prompts(model: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    return [encode(tokenizer, text * n) for text in TEXTS for n in (1, 5)]


def test_tokenizers_agree(tiny_model: Path, f16: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    with LlamaModel(f16, threads=2) as model:
        assert [model.tokenize(text) for text in TEXTS] == [encode(tokenizer, t) for t in TEXTS]


def test_f16_computes_what_the_merged_model_computes(tiny_model: Path, f16: Path) -> None:
    reference = load_model(tiny_model, attention=ATTENTION, dtype=torch.float32).eval()
    expected = np.stack(list(next_token_logits(reference, prompts(tiny_model))))
    with LlamaModel(f16, threads=2) as model:
        actual = np.stack(list(model.next_token_logits(prompts(tiny_model))))
    assert (actual.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert np.abs(actual - expected).max() < F16_LOGIT_BOUND


def test_f16_stores_the_merged_weights(tiny_model: Path, f16: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(f16).tensors}
    assert len(stored) == len(weights)
    embedding = torch.from_numpy(stored["token_embd.weight"].data.copy())
    assert torch.equal(embedding, weights["model.embed_tokens.weight"])
    down = torch.from_numpy(stored["blk.1.ffn_down.weight"].data.copy())
    assert torch.equal(down, weights["model.layers.1.mlp.down_proj.weight"])


def test_q4_k_m_holds_k_quants_within_their_error(f16: Path, q4_k_m: Path) -> None:
    stored = describe_file(q4_k_m)
    assert {"Q4_K", "Q6_K", "F32"} <= stored["tensor_types"].keys()
    assert 4.5 < stored["bits_per_weight"] < 6
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(f16).tensors}
    for tensor in gguf.GGUFReader(q4_k_m).tensors:
        weights = exact[tensor.name].data.astype(np.float32)
        error = np.abs(dequantize(tensor.data, tensor.tensor_type) - weights).max()
        bound = QUANTIZATION_BOUND[tensor.tensor_type.name] * np.abs(weights).max()
        assert error <= bound, (tensor.name, tensor.tensor_type.name, error, bound)


def test_files_explain_themselves(f16: Path, q4_k_m: Path) -> None:
    for path in (f16, q4_k_m):
        metadata = describe_file(path)["metadata"]
        assert metadata["general.base_model.0.name"] == "tiny"
        assert metadata["general.base_model.0.repo_url"] == "https://huggingface.co/somebody/tiny"
        assert metadata["general.dataset.0.name"] == "local files"
        assert metadata["general.license"] == "apache-2.0"
        assert metadata["general.languages"] == ["zh"]
        assert metadata["pockettune.task.prompt"] == "{text}"
        assert metadata["pockettune.task.labels"] == ["差", "好"]
        assert metadata["pockettune.task.template_options"] == "{}"
        assert metadata["pockettune.task.day"] == "26 Jul 2024"


def test_what_fell_back_is_told(tiny_model: Path, q4_k_m: Path, tmp_path: Path) -> None:
    """The tiny model is 256 wide: nothing falls back. At 192, all but the rows of 512 do."""
    stored = describe_file(q4_k_m)
    assert stored["fallback_share"] == 0
    assert 0 < stored["embedding_share"] < 0.5 and stored["embedding_type"] == "Q6_K"

    narrow = Path(shutil.copytree(tiny_model, tmp_path / "narrow"))
    shape = AutoConfig.from_pretrained(tiny_model)
    shape.hidden_size = 192
    AutoModelForCausalLM.from_config(shape).half().save_pretrained(narrow)
    f16, quantized = tmp_path / "f16.gguf", tmp_path / "q4_k_m.gguf"
    run_program("convert_model.py", "--model", narrow, "--converter", CONVERTER,
                "--settings", LINEAGE, "--output", f16)  # fmt: skip
    run_program("quantize_model.py", "--settings", '{"type": "Q4_K_M"}', "--source", f16,
                "--threads", "1", "--output", quantized)  # fmt: skip
    shapes = {name: entry["shape"] for name, entry in read_header(narrow / "model.safetensors").items()}  # fmt: skip
    weights = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    fell = sum(n for name, n in weights.items() if len(shapes[name]) > 1 and shapes[name][1] % 256)
    assert fell / sum(weights.values()) > 0.5
    stored = describe_file(quantized)
    assert stored["fallback_share"] == pytest.approx(fell / sum(weights.values()), abs=1e-4)
    assert describe_file(f16)["fallback_share"] == 0, "16 bits need no blocks"


@pytest.mark.parametrize("file", ["f16", "q4_k_m", "vocabulary"])
def test_files_are_read_as_the_gguf_package_reads_them(
    file: str, request: pytest.FixtureRequest
) -> None:
    vocabulary = CONVERTER / "models/ggml-vocab-qwen2.gguf"
    path = vocabulary if file == "vocabulary" else request.getfixturevalue(file)
    reader = gguf.GGUFReader(path)
    metadata, tensors = read_gguf(path)
    bookkeeping = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert metadata == {k: f.contents() for k, f in reader.fields.items() if k not in bookkeeping}
    theirs = [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, int(t.n_bytes), int(t.data_offset))
        for t in reader.tensors
    ]
    assert [(t.name, t.shape, t.kind_name, t.size, t.start) for t in tensors] == theirs


def test_a_file_that_is_no_gguf_is_named(f16: Path, tmp_path: Path) -> None:
    for content, message in [(b"GGML" * 10, "is not a GGUF file"), (f16.read_bytes()[:900], "truncated")]:  # fmt: skip
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_gguf(tmp_path / "x.gguf")


def test_scoring_twice_gives_the_same_bytes(tiny_model: Path, q4_k_m: Path) -> None:
    runs = []
    for _ in range(2):
        with LlamaModel(q4_k_m, threads=2) as model:
            runs.append(np.stack(list(model.next_token_logits(prompts(tiny_model)))).tobytes())
    assert runs[0] == runs[1]


def test_shared_start_and_batches_change_nothing(tiny_model: Path, f16: Path) -> None:
    shared = [[5, 6, 7, *prompt] for prompt in prompts(tiny_model)] * 5  # more than one batch
    with LlamaModel(f16, threads=2) as model:
        together = np.stack(list(model.next_token_logits(shared)))
        alone = np.stack([next(iter(model.next_token_logits([prompt]))) for prompt in shared])
    np.testing.assert_allclose(together, alone, atol=F16_LOGIT_BOUND)


def test_common_prefix_and_groups() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 9]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2]]) == [1], "each prompt keeps a token of its own"
    groups = group_by_tokens([[1] * 4, [2] * 4, [3] * 9], 8, len)
    assert list(groups) == [[[1] * 4, [2] * 4], [[3] * 9]]
    groups = group_by_tokens([[1]] * 40, 100, len, PROMPTS_A_BATCH)
    assert [len(group) for group in groups] == [16, 16, 8]


def test_untied_model_is_noticed(tiny_model: Path, f16: Path, tmp_path: Path) -> None:
    names = list(load_file(tiny_model / "model.safetensors"))
    check_tensors(f16, names)
    lost = "model.layers.0.self_attn.o_norm.weight"
    with pytest.raises(UserError, match="has nothing for some of the model's " + lost):
        check_tensors(f16, [*names, lost])
    with pytest.raises(UserError, match=r"the file has blk\.\d+\..*, the model has not"):
        check_tensors(f16, [name for name in names if "layers.0.mlp.up_proj" not in name])
    untied = tmp_path / "untied"
    shutil.copytree(tiny_model, untied)
    weights = load_file(untied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, untied / "model.safetensors", metadata={"format": "pt"})
    result = run_program("convert_model.py", "--model", untied, "--converter", CONVERTER,
                         "--settings", LINEAGE, "--output", tmp_path / "x.gguf")  # fmt: skip
    assert result.returncode == 0, result.stdout
    with pytest.raises(UserError, match=r"has an output\.weight of its own"):
        check_tensors(tmp_path / "x.gguf", [n for n in weights if n != "lm_head.weight"])


def test_rotations_that_the_converter_adds_are_no_weights(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "phi3")
    writer.add_block_count(1)
    for name in ("token_embd", "rope_freqs", "rope_factors_long", "rope_factors_short"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_tensors(tmp_path / "x.gguf", ["model.embed_tokens.weight"])


def test_unknown_pre_tokenizer_is_named(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    text = (other / "tokenizer.json").read_text().replace(r"|\\p{N}|", r"|\\p{N}{1,7}|")
    (other / "tokenizer.json").write_text(text)
    result = run_program("convert_model.py", "--model", other, "--converter", CONVERTER,
                         "--settings", LINEAGE, "--output", tmp_path / "x.gguf")  # fmt: skip
    assert result.returncode == 2
    assert "llama.cpp does not know its pre-tokenizer" in result.stdout.splitlines()[-1]
    assert not (tmp_path / "x.gguf").exists()


def test_truncated_gguf_is_refused(f16: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(f16.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"is truncated: [\d,]+ of [\d,]+ bytes"):
        LlamaModel(broken, threads=1)
    result = run_program("quantize_model.py", "--settings", '{"type": "Q4_K_M"}', "--source",
                         broken, "--threads", "1", "--output", tmp_path / "x.gguf")  # fmt: skip
    assert result.returncode == 2
    assert f"error: {broken} is truncated" in result.stdout
    assert list(tmp_path.iterdir()) == [broken]


def test_greedy_answers_of_many_prompts_are_those_of_each_alone(
    f16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More prompts than fit a batch, with a common start and of different lengths."""
    random = np.random.default_rng(3)
    prompts = [
        [5, 6, *random.integers(10, 500, size=n % 7 + 1)] for n in range(PROMPTS_A_BATCH + 5)
    ]
    prompts = [list(map(int, prompt)) for prompt in prompts]
    limit = 8
    with LlamaModel(f16, threads=1) as model:
        # A random model seldom ends: let every fifth token end an answer.
        monkeypatch.setattr(model, "stops_at", lambda token: token % 5 == 0)
        alone = [model.generate_greedy(prompt, limit) for prompt in prompts]
        together = answer_greedily(model, prompts, limit)
        text = "房间很干净"
        assert as_text(model, model.tokenize(text)) == text
        expected = [as_text(model, ids[:-1]) if ids[-1] % 5 == 0 else None for ids in alone]
    assert together == expected
    assert {None, ""} == set(together), "this model writes the prompt's last token for ever"
