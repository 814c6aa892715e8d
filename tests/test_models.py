"""What is found wrong with a model folder before anything long is started."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from pockettune.common.errors import UserError
from pockettune.models.folder import (
    check_model_folder,
    embedding_shape,
    load_tokenizer,
    weight_files,
)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def ask_for_own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))


def quantize_for_another_library(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    told = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(told))


def shrink_embedding(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file({**weights, name: weights[name][:100].clone()}, folder / "model.safetensors")


def add_token(folder: Path, content: str) -> None:
    """Cut the embedding to the tokenizer's size, then add a token, whose id lies beyond it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    name, weights = "model.embed_tokens.weight", load_file(folder / "model.safetensors")
    rows = weights[name][: tokenizer.get_vocab_size()].clone()
    save_file({**weights, name: rows}, folder / "model.safetensors")
    tokenizer.add_special_tokens([content])
    tokenizer.save(str(folder / "tokenizer.json"))


def name_a_token_beyond_as_end(folder: Path) -> None:
    add_token(folder, "<|beyond|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|beyond|>"}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{}"), r"adapter_config\.json: an adapter lies beside"),
        (name_a_token_beyond_as_end, r"does not fit: its ids go up to \d+, the embedding has"),
        (truncate, r"model\.safetensors is truncated: [\d,]+ of [\d,]+ bytes"),
        (replace_by_pickle, r"no \*\.safetensors weights \(pytorch_model\.bin is refused"),
        (ask_for_own_code, r"asks to run the model's own code \(auto_map\)"),
        (quantize_for_another_library, r"its weights are quantized \(gptq\); take the model's 16-bit"),
        (shrink_embedding, r"the tokenizer does not fit: its ids go up to \d+, the embedding has 100 rows"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), r"is not a safetensors file"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json cannot be read"),
        (lambda f: [(f / n).unlink() for n in ("config.json", "tokenizer.json")],
         r"config\.json is missing; tokenizer\.json is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_unusable_folder_is_refused(
    harm: Callable[[Path], object], message: str, folder: Path
) -> None:
    check_model_folder(folder)
    harm(folder)
    with pytest.raises(UserError, match=message):
        check_model_folder(folder)


def test_model_without_chat_template_is_refused(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no chat template; take the Instruct version"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
        ("transformer.wte.weight", "transformer.wpe.weight"),
        ("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ],
)
def test_embedding_of_other_architectures(name: str, other: str) -> None:
    assert embedding_shape({other: [7, 4], name: [9, 4]}) == [9, 4]
    assert embedding_shape({other: [7, 4]}) is None


def test_added_token_beyond_the_embedding_is_left_out(folder: Path) -> None:
    """Gemma 3's text models have one for images, which no text holds."""
    add_token(folder, "<image_soft_token>")
    check_model_folder(folder)


def test_weights_beside_those_that_are_loaded_are_left_alone(folder: Path) -> None:
    """Mistral's folders hold the same weights once more, under other names."""
    weights = load_file(folder / "model.safetensors")
    save_file(
        {"tok_embeddings.weight": next(iter(weights.values()))}, folder / "consolidated.safetensors"
    )
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert [path.name for path in weight_files(folder)] == ["model-00001-of-00001.safetensors"]
    check_model_folder(folder)
