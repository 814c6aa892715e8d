"""Recipes: types by pattern, importance, what cannot work, and the sizes that are predicted."""

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from gguf.quants import dequantize

from conftest import ROOT, run_program
from measure_importance import measure_importance
from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, write_examples
from pockettune.gguf.files import list_tensors, read_gguf
from pockettune.gguf.importance import (
    Inputs,
    name_in_file,
    read_importance,
    write_importance,
)
from pockettune.gguf.recipes import choose_types
from pockettune.machine import quantized
from pockettune.machine.shape import shape_of_gguf
from pockettune.models.folder import load_model
from pockettune.runtimes.activations import sum_squares
from pockettune.runtimes.llama import LlamaModel, start_backend
from pockettune.runtimes.packing import ATTENTION
from pockettune.runtimes.quantizing import (
    make_parameters,
    plan_tensors,
    refuse_without_importance,
)
from pockettune.workflow.config import check_config
from quantize_model import quantize_model

SCHEMA = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text())
RECIPE = SCHEMA["$defs"]["gguf"]["properties"]
COARSE = {"Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"}

QWEN = {"layers": 24, "hidden": 896, "inner": 4864, "heads": 14, "keys": 2, "vocabulary": 151_936}


def write_shape(path: Path, shape: dict[str, int], tied: bool = True) -> Path:
    """Write an F16 file of a shape, its weights a hole: for a dry run alone."""
    hidden, inner = shape["hidden"], shape["inner"]
    keys = hidden // shape["heads"] * shape["keys"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["keys"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    matrices = {"attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, hidden),
                "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner), "attn_norm": (hidden,),
                "ffn_norm": (hidden,)}  # fmt: skip
    whole: dict[str, tuple[int, ...]] = {
        "token_embd": (shape["vocabulary"], hidden),
        "output_norm": (hidden,),
    }
    if not tied:
        whole["output"] = (shape["vocabulary"], hidden)
    for layer in range(shape["layers"]):
        whole |= {f"blk.{layer}.{name}": size for name, size in matrices.items()}
    for name, size in whole.items():
        kind = np.dtype(np.float16 if len(size) > 1 else np.float32)
        size_bytes = int(np.prod(size)) * kind.itemsize
        writer.add_tensor_info(f"{name}.weight", size, kind, size_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(3_000_000_000)
    return path


def plan(source: Path, recipe: dict[str, Any], importance: dict[str, np.ndarray]) -> list[Any]:
    """Return the tensors as a dry run tells them, or raise what refuses the recipe."""
    start_backend()
    tensors = read_gguf(source)[1]
    overrides = choose_types(recipe.get("tensors", {}), tensors)
    parameters = make_parameters(recipe, overrides, importance, 1)
    planned = plan_tensors(source, parameters, recipe, tensors, overrides)
    refuse_without_importance(planned, importance)
    return planned


def ones(source: Path) -> dict[str, np.ndarray]:
    """Return an importance of every matrix of a file, all columns alike."""
    matrices = [tensor for tensor in read_gguf(source)[1] if len(tensor.shape) > 1]
    return {tensor.name: np.ones(tensor.shape[0], np.float32) for tensor in matrices}


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of different lengths that share their first three tokens."""
    random = np.random.default_rng(seed)
    tails = [random.integers(10, 500, size=n % 9 + 2) for n in range(count)]
    return [[5, 6, 7, *map(int, tail)] for tail in tails]


@pytest.fixture(scope="module")
def importance(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's importance, of 40 prompts."""
    folder = tmp_path_factory.mktemp("importance")
    made = [Example(str(n), "", ids, [1], "a", False, False, False) for n, ids in enumerate(make_prompts(40))]  # fmt: skip
    (folder / "tokens").mkdir()
    write_examples(folder / "tokens/train.arrow", made)
    measure_importance(tiny_model, folder / "tokens", 1, folder / "importance.gguf")
    return folder / "importance.gguf"


# --- types by pattern ---


def test_types_by_pattern_are_stored_and_the_file_runs(f16: Path, tmp_path: Path) -> None:
    tensors = {"token_embd": "Q8_0", "ffn_down": "Q3_K", r"blk\.1\.ffn_down": "IQ4_NL", "attn_q": "F16"}  # fmt: skip
    output = tmp_path / "x.gguf"
    quantize_model({"type": "Q4_K_M", "tensors": tensors}, f16, 1, output)
    stored = {name: kind for name, (kind, _) in list_tensors(output).items()}
    assert stored["token_embd.weight"] == "Q8_0"
    assert stored["blk.0.ffn_down.weight"] == "Q3_K"
    assert stored["blk.1.ffn_down.weight"] == "IQ4_NL", "the longest pattern counts"
    assert stored["blk.0.attn_q.weight"] == "F16"
    assert stored["blk.0.ffn_up.weight"] == "Q4_K", (
        "what no pattern names gets what the recipe gives"
    )
    with LlamaModel(output, threads=1) as model:
        assert np.isfinite(next(iter(model.next_token_logits([[5, 6, 7]])))).all()


def test_order_of_patterns_decides_nothing(f16: Path) -> None:
    tensors = read_gguf(f16)[1]
    patterns = {"ffn": "Q4_0", r"blk\.1": "Q5_0", "ffn_down": "Q8_0"}
    turned = dict(reversed(patterns.items()))
    assert choose_types(patterns, tensors) == choose_types(turned, tensors)
    assert choose_types(patterns, tensors)["blk.1.ffn_down.weight"] == "Q8_0"


def test_pattern_that_names_nothing_is_refused(f16: Path, tmp_path: Path) -> None:
    recipe = (
        '{"type": "Q4_0", "tensors": {"down_proj": "Q8_0", "attn_norm": "Q8_0", "ffn_up": "Q8_0"}}'
    )
    result = run_program("quantize_model.py", "--settings", recipe, "--source", f16,
                         "--importance", "--threads", "1", "--output", tmp_path / "x.gguf")  # fmt: skip
    assert result.returncode == 2
    assert "no matrix's name holds down_proj; attn_norm; names are attn_k.weight" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"type": "Q4_K_M", "pure": True}, "Q4_K has blocks of 256, rows of 896 are no multiple of it (token_embd.weight and 144 more)"),
        ({"type": "IQ4_NL", "tensors": {"ffn": "Q3_K"}}, "Q3_K has blocks of 256, rows of 896 are no multiple of it (blk.0.ffn_gate.weight and 47 more)"),
        ({"type": "Q4_0", "tensors": {"token_embd": "Q6_K", "attn_k": "Q4_K"}}, "Q4_K has blocks of 256, rows of 896"),
    ],
)  # fmt: skip
def test_type_that_rows_cannot_hold_is_refused(
    recipe: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """llama.cpp would store another type without a word."""
    source = write_shape(tmp_path / "qwen.gguf", QWEN)
    with pytest.raises(UserError, match=re.escape(named)) as refusal:
        quantize_model(recipe, source, 1, tmp_path / "x.gguf")
    assert "blocks of 32 (Q4_0, IQ4_NL" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["qwen.gguf"]


def test_recipe_may_fall_back_where_nothing_is_forced(tmp_path: Path) -> None:
    source = write_shape(tmp_path / "qwen.gguf", QWEN)
    stored = {tensor.name: tensor.kind_name for tensor in plan(source, {"type": "Q4_K_M"}, {})}
    assert stored["blk.0.ffn_up.weight"] == "Q5_0" and stored["blk.3.ffn_down.weight"] == "Q4_K"
    assert plan(source, {"type": "IQ4_NL", "tensors": {"ffn_down": "Q3_K"}}, {})


# --- sizes ---

SHAPES = {
    "tied": (QWEN, True),
    "untied": (QWEN, False),
    "rows of 256, two heads a key": ({"layers": 16, "hidden": 1024, "inner": 3072, "heads": 16, "keys": 8, "vocabulary": 5000}, True),
    "30 layers": ({"layers": 30, "hidden": 576, "inner": 1536, "heads": 9, "keys": 3, "vocabulary": 49_152}, True),
}  # fmt: skip
PATTERNS: tuple[dict[str, str], ...] = (
    {},
    {"ffn_down": "Q3_K"},
    {r"blk\.[0-5]\.attn_v": "Q8_0", r"blk\.[2-9]\.ffn_down": "Q8_0"},
)


@pytest.mark.parametrize("name", SHAPES)
def test_predicted_size_is_that_of_a_dry_run(name: str, tmp_path: Path) -> None:
    """To the byte, of every recipe of the schema, with and without importance and patterns."""
    source = write_shape(tmp_path / "x.gguf", *SHAPES[name])
    shape, all_alike = shape_of_gguf(source), ones(source)
    compared = 0
    for kind, pure, weighed, tensors in itertools.product(
        RECIPE["type"]["enum"], (False, True), (False, True), PATTERNS
    ):
        recipe = {"type": kind, "pure": pure, "importance": weighed, "tensors": tensors}
        if kind in COARSE and not weighed:
            continue
        try:
            planned = plan(source, recipe, all_alike if weighed else {})
        except UserError:
            assert pure, "forced on rows that it does not fit"
            continue
        told = quantized.tensor_bytes(shape, recipe)
        assert told == sum(tensor.size for tensor in planned), recipe
        compared += 1
    assert compared >= 150


def test_size_of_a_written_file_is_the_one_that_was_planned(f16: Path, tmp_path: Path) -> None:
    recipe = {"type": "Q4_K_M", "tensors": {"ffn_up": "Q5_1"}}
    quantize_model(recipe, f16, 1, tmp_path / "x.gguf")
    expected = sum(tensor.size for tensor in plan(f16, recipe, {}))
    assert sum(tensor.size for tensor in read_gguf(tmp_path / "x.gguf")[1]) == expected


# --- importance ---


def test_importance_is_what_each_layer_was_given(tiny_model: Path) -> None:
    """Against every prompt computed alone, without packing, the head at the last position."""
    prompts = make_prompts(300)  # more than a pass
    model = load_model(tiny_model, dtype=torch.float32).eval()
    expected: dict[str, torch.Tensor] = {}

    def watch(name: str, rows: slice) -> Any:
        def add(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            squares = arguments[0][0, rows].double().square().sum(0)
            expected[name] = expected.get(name, torch.zeros(())) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows = slice(-1, None) if name == "lm_head" else slice(None)
            module.register_forward_pre_hook(watch(name, rows))
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor([prompt]))

    packed = load_model(tiny_model, attention=ATTENTION, dtype=torch.float32).eval()
    found = sum_squares(packed, prompts)
    assert len(found) == len(expected) == 2 * 7 + 1
    tokens = sum(map(len, prompts))
    for name, inputs in found.items():
        np.testing.assert_allclose(inputs.sums, expected[name], rtol=1e-5, err_msg=name)
        assert inputs.count == (len(prompts) if name == "lm_head" else tokens), name
    assert not any(module._forward_pre_hooks for module in packed.modules()), "nothing is left"


def test_importance_is_in_llama_cpps_format(importance: Path, f16: Path) -> None:
    reader = gguf.GGUFReader(importance)
    told = {key: field.contents() for key, field in reader.fields.items() if key.startswith(("general.type", "imatrix."))}  # fmt: skip
    prompts = make_prompts(40)
    assert told == {
        "general.type": "imatrix",
        "imatrix.datasets": ["prompts of train"],
        "imatrix.chunk_count": 40,
        "imatrix.chunk_size": sum(map(len, prompts)) // 40,
    }
    shapes = {tensor.name: list(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.in_sum2"] == [512, 1]
    assert shapes["blk.1.ffn_down.weight.counts"] == [1, 1]
    matrices = {tensor.name for tensor in read_gguf(f16)[1] if len(tensor.shape) > 1}
    assert read_importance(importance).keys() == matrices, "the head too, which is the embedding"


def test_importance_is_read_back_as_a_mean_over_tokens(tmp_path: Path) -> None:
    inputs = {"a": Inputs(np.array([6.0, 3.0, 0.0]), 3), "b": Inputs(np.array([4.0]), 8)}
    write_importance(tmp_path / "x.gguf", inputs, [[1, 2, 3], [4]])
    read = read_importance(tmp_path / "x.gguf")
    assert {name: list(values) for name, values in read.items()} == {"a": [2, 1, 0], "b": [0.5]}


def test_names_are_those_that_the_converter_gives() -> None:
    modules = ["model.layers.11.self_attn.o_proj", "model.layers.0.mlp.down_proj", "lm_head", "x.y"]
    for kind in ("qwen2", "llama", "mistral", "gemma3_text", "smollm3", "hunyuan_v1_dense"):
        assert name_in_file(modules, kind, tied=False) == {
            "model.layers.11.self_attn.o_proj": "blk.11.attn_output.weight",
            "model.layers.0.mlp.down_proj": "blk.0.ffn_down.weight",
            "lm_head": "output.weight",
        }
    assert name_in_file(["lm_head"], "qwen2", tied=True) == {"lm_head": "token_embd.weight"}
    assert name_in_file(["transformer.h.3.attn.c_attn"], "gpt2", tied=True) == {
        "transformer.h.3.attn.c_attn": "blk.3.attn_qkv.weight"
    }
    assert name_in_file(["model.layers.3.self_attn.qkv_proj"], "phi3", tied=True) == {
        "model.layers.3.self_attn.qkv_proj": "blk.3.attn_qkv.weight"
    }


def skewed(f16: Path) -> dict[str, np.ndarray]:
    """Return an importance under which few columns count for most."""
    random = np.random.default_rng(1)
    return {
        name: random.lognormal(sigma=2, size=len(x)).astype("f4") for name, x in ones(f16).items()
    }


def weighed_errors(path: Path, f16: Path, importance: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the error of each matrix, squared, each column weighed by its importance."""
    exact = {tensor.name: tensor.data.astype(np.float32) for tensor in gguf.GGUFReader(f16).tensors}
    return {
        tensor.name: float(
            np.square(dequantize(tensor.data, tensor.tensor_type) - exact[tensor.name]).mean(axis=0)
            @ importance[tensor.name]
        )
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name in importance
    }


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q4_K_S", "Q2_K"])
def test_importance_lowers_the_error_of_what_counts(kind: str, f16: Path, tmp_path: Path) -> None:
    importance = skewed(f16)
    prompts = make_prompts(3)
    inputs = {name: Inputs(values * 7, 7) for name, values in importance.items()}
    write_importance(tmp_path / "importance.gguf", inputs, prompts)
    recipe = {"type": kind, "pure": True}
    quantize_model(recipe, f16, 1, tmp_path / "plain.gguf")
    quantize_model(recipe, f16, 1, tmp_path / "weighed.gguf", tmp_path / "importance.gguf")
    plain, weighed = (weighed_errors(tmp_path / f"{name}.gguf", f16, importance) for name in ("plain", "weighed"))  # fmt: skip
    assert plain.keys() == weighed.keys() == importance.keys()
    lower = [weighed[name] / plain[name] for name in plain]
    assert max(lower) < 0.95, dict(zip(plain, lower, strict=True))


@pytest.mark.parametrize("kind", ["Q2_K_S", "IQ2_XXS", "IQ3_XS"])
def test_coarse_types_can_be_made_with_importance(
    kind: str, f16: Path, importance: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.gguf"
    result = run_program("quantize_model.py", "--settings", f'{{"type": "{kind}", "importance": true}}', "--source", f16,
                         "--importance", importance, "--threads", "1", "--output", output)  # fmt: skip
    assert result.returncode == 0, result.stdout
    base = quantized.BASE.get(kind, kind)
    assert base in {stored for stored, _ in list_tensors(output).values()}
    with LlamaModel(output, threads=1) as model:
        assert np.isfinite(next(iter(model.next_token_logits([[5, 6, 7]])))).all()


def test_coarse_type_of_a_tensor_without_importance_is_refused(tmp_path: Path) -> None:
    """llama.cpp ends the process at an embedding that is no head: no layer is given its columns."""
    shape = {**QWEN, "hidden": 1024, "inner": 3072, "heads": 16, "keys": 8, "vocabulary": 5000}
    source = write_shape(tmp_path / "x.gguf", shape, tied=False)
    measured = ones(source)
    del measured["token_embd.weight"]
    with pytest.raises(UserError, match=r"of token_embd\.weight \(IQ2_XXS\), whose type needs it"):
        plan(source, {"type": "IQ2_XXS", "pure": True, "importance": True}, measured)
    assert plan(source, {"type": "IQ2_XXS", "importance": True}, measured)


def test_importance_of_another_model_is_refused(f16: Path, tmp_path: Path) -> None:
    other = {"blk.0.attn_q.weight": Inputs(np.ones(128), 5), "blk.9.attn_q.weight": Inputs(np.ones(256), 5)}  # fmt: skip
    write_importance(tmp_path / "importance.gguf", other, make_prompts(3))
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight has 128 columns there, 256 here; blk\.9\.attn_q\.weight has 256 columns there, none here"):  # fmt: skip
        quantize_model({"type": "Q4_0"}, f16, 1, tmp_path / "x.gguf", tmp_path / "importance.gguf")


# --- config ---


def faults(recipe: dict[str, Any]) -> str:
    """Return what a config with this recipe alone is refused for."""
    config = copy.deepcopy(yaml.safe_load((ROOT / "config.yaml").read_text()))
    config["quantize"] = {"x": recipe}
    with pytest.raises(UserError) as refusal:
        check_config(config, SCHEMA)
    return str(refusal.value)


@pytest.mark.parametrize("kind", sorted(COARSE))
def test_coarse_type_without_importance_is_refused_before_anything(kind: str) -> None:
    assert f"quantize.x: {kind} is too coarse" in faults({"type": kind})
    assert "set importance: true" in faults({"type": kind, "importance": False})


def test_faults_of_types_by_pattern() -> None:
    assert "quantize.x: IQ2_S is too coarse" in faults(
        {"type": "Q4_0", "tensors": {"ffn_up": "IQ2_S"}}
    )
    assert "did you mean Q4_K?" in faults({"type": "Q4_0", "tensors": {"ffn_up": "Q4_K_M"}})
    assert "'ffn(' is no regular expression" in faults(
        {"type": "Q4_0", "tensors": {"ffn(": "Q4_K"}}
    )
    assert "quantize.x.tensors is 'Q4_K', not a section" in faults(
        {"type": "Q4_0", "tensors": "Q4_K"}
    )
