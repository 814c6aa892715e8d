"""Which layers to keep: what is measured is what the cut model computes, and tail is kept where it is as good."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from measure_layers import choose_way, label_kl, measure_layers, score_without_each
from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, write_examples
from pockettune.evaluation.scoring import score_answers
from pockettune.models.layers import find_layers
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.packing import next_token_logits, packed_logits
from pockettune.runtimes.skipping import Skipping
from shrink_model import shrink_model
from test_recipes import make_prompts
from test_shrink import KINDS, make_base

PROMPTS = make_prompts(12)
LAST = [[len(prompt) - 1] for prompt in PROMPTS]
ANSWERS = [[20, 2], [30, 2]]


def load_cut(base: Path, removed: Collection[int], folder: Path) -> torch.nn.Module:
    """Load a model of six layers that was really cut."""
    shrink_model(base, [layer for layer in range(6) if layer not in removed], folder / "cut")
    return load_exact(folder / "cut")


def silence(base: Path, layers: Collection[int]) -> None:
    """Make layers add nothing to what passes through them."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    for layer in layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"].zero_()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    source = program.read_json(base / "source.json")
    (base / "source.json").write_text(json.dumps({**source, "sha256": {}}))


def measured(base: Path, folder: Path, count: int, rows: int = 40) -> dict[str, Any]:
    """Return layers.json of a base, made from validation's prompts alone."""
    examples = [Example(str(n), "", ids, [1], "a", False, False, False) for n, ids in enumerate(make_prompts(rows))]  # fmt: skip
    (folder / "tokens").mkdir(exist_ok=True)
    write_examples(folder / "tokens/validation.arrow", examples)
    program.write_json(folder / "tokens/answers.json", {"words": ["a", "b"], "ids": ANSWERS})
    measure_layers(base, folder / "tokens", count, 1, folder / "layers.json")
    found: dict[str, Any] = program.read_json(folder / "layers.json")
    return found


@pytest.mark.parametrize("removed", [(), (1, 4)], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_left_out_on_trial_computes_as_really_cut(
    kind: str, removed: tuple[int, ...], tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base(kind, tiny_model, tmp_path)
    model = load_exact(base)
    with torch.inference_mode():
        whole = packed_logits(model, PROMPTS, LAST)
    found = dict(Skipping(model).without_each(PROMPTS, removed))
    assert list(found) == [layer for layer in range(6) if layer not in removed]
    for layer, logits in found.items():
        cut = load_cut(base, {*removed, layer}, tmp_path)
        with torch.inference_mode():
            assert torch.equal(packed_logits(cut, PROMPTS, LAST), logits), layer
    with torch.inference_mode():
        assert torch.equal(packed_logits(model, PROMPTS, LAST), whole), "the model is whole again"


def test_layers_before_the_one_left_out_are_not_computed_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = load_exact(make_base("qwen2", tiny_model, tmp_path))
    skipping, computed = Skipping(model), [0] * 6
    for number, layer in enumerate(find_layers(model)):

        def count(*_: Any, number: int = number) -> None:
            computed[number] += 1

        layer.get_submodule("mlp").register_forward_hook(count)
    for _ in skipping.without_each(PROMPTS, [2]):
        pass
    # Once with all that remain; then layer n for each remaining layer before it.
    assert computed == [1, 2, 0, 3, 4, 5]


def test_scores_are_those_of_the_cut_model_whatever_the_answers_share(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("measure_layers.TOKENS_A_PASS", {"cpu": 30})
    base = make_base("qwen2", tiny_model, tmp_path)
    answers: Sequence[list[int]] = [[20, 30, 2], [20, 40, 2], [50, 2]]
    scores = score_without_each(Skipping(load_exact(base)), [5], PROMPTS, answers)
    for layer in (0, 3):
        cut = load_cut(base, {layer, 5}, tmp_path)
        expected = score_answers(lambda p, cut=cut: next_token_logits(cut, p), PROMPTS, answers)  # type: ignore[misc]
        assert np.allclose(scores[layer], expected, atol=1e-5)


def test_layer_that_does_nothing_goes_first_and_greedy_is_chosen(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("qwen2", tiny_model, tmp_path)
    silence(base, [2])
    found = measured(base, tmp_path, count=4)
    first, second = found["greedy"]["removed"]
    assert first["layer"] == 2 and first["label_kl"] < 1e-9 < second["label_kl"]
    assert found["chosen"] == "greedy" and found["bound"] > 0
    assert found["greedy"]["kept"] == sorted({0, 1, 3, 4, 5} - {second["layer"]})
    assert found["greedy"]["label_kl"] < found["tail"]["label_kl"]
    assert found["rows"] == {"chosen_on": 20, "compared_on": 20}


def test_tail_is_chosen_where_its_layers_are_missed_as_little(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("qwen2", tiny_model, tmp_path)
    silence(base, [1, 4, 5])
    found = measured(base, tmp_path, count=4)
    assert found["chosen"] == "tail" and found["tail"]["kept"] == [0, 1, 2, 3]
    assert [entry["layer"] for entry in found["greedy"]["removed"]] == [5, 4], "the last goes first"
    found = measured(base, tmp_path, count=6)
    assert found["chosen"] == "tail" and found["greedy"]["removed"] == []
    found = measured(base, tmp_path, count=5, rows=1)
    assert found["chosen"] == "tail" and found["bound"] is None, "nothing to compare on"


@pytest.mark.parametrize(
    ("lower", "chosen"),
    [
        ([0.5, 0.4, 0.6, 0.5], "greedy"),
        ([3.0, -0.5, 0.1, -0.2], "tail"),  # lower on average, by one row
        ([1e-4, 1e-4, 1e-4, 1e-4], "tail"),
        ([-0.5, -0.4, -0.6, -0.5], "tail"),
        ([5.0], "tail"),
    ],
)
def test_greedy_must_be_better_beyond_the_noise(lower: list[float], chosen: str) -> None:
    greedy = np.full(len(lower), 1.0)
    assert choose_way({"tail": greedy + lower, "greedy": greedy})["chosen"] == chosen


def test_label_kl_is_of_the_answers_alone() -> None:
    whole = np.log([[0.08, 0.02], [0.5, 0.5]])
    assert np.allclose(label_kl(whole, whole - 3.0), 0.0)
    cut = np.log([[0.1, 0.1], [0.5, 0.5]])
    expected = 0.8 * np.log(0.8 / 0.5) + 0.2 * np.log(0.2 / 0.5)
    assert np.allclose(label_kl(whole, cut), [expected, 0.0])


def test_chosen_layers_are_kept_and_told(tiny_model: Path, tmp_path: Path) -> None:
    base = make_base("qwen2", tiny_model, tmp_path)
    silence(base, [2])
    found = measured(base, tmp_path, count=5)
    shrink_model(base, found["greedy"]["kept"], tmp_path / "short", found)
    source = program.read_json(tmp_path / "short/source.json")
    assert source["kept_layers"] == [0, 1, 3, 4, 5]
    label_kl = {way: found[way]["label_kl"] for way in ("tail", "greedy")}
    assert source["layers_choice"] == {"chosen": "greedy", "rows": 20, "label_kl": label_kl}


# --- what cannot be measured ---


def test_more_layers_than_there_are(tiny_model: Path, tmp_path: Path) -> None:
    base = make_base("qwen2", tiny_model, tmp_path)
    with pytest.raises(UserError, match="keep_layers 99: the model has 6 layers"):
        measured(base, tmp_path, count=99)
    assert not (tmp_path / "layers.json").exists()


def test_layers_weighed_by_their_number(tiny_model: Path, tmp_path: Path) -> None:
    base = make_base("qwen2", tiny_model, tmp_path)
    config = program.read_json(base / "config.json")
    program.write_json(base / "config.json", {**config, "scale_depth": 1.4})
    with pytest.raises(UserError, match="a qwen2 model weighs each layer by how many there are"):
        measured(base, tmp_path, count=4)


def test_layers_of_an_unknown_name(tiny_model: Path, tmp_path: Path) -> None:
    model: Any = load_exact(make_base("qwen2", tiny_model, tmp_path))
    model.model.floors = model.model.layers
    del model.model.layers
    with pytest.raises(UserError, match="of a qwen2 model are not found under a known name"):
        find_layers(model)


def test_layers_that_pass_on_more_than_a_tensor(tiny_model: Path, tmp_path: Path) -> None:
    model: Any = load_exact(make_base("qwen2", tiny_model, tmp_path))
    model.model.layers[3].register_forward_pre_hook(lambda _, given: (given[0] * 2, *given[1:]))
    with pytest.raises(UserError, match="layers pass on more than one tensor") as caught:
        Skipping(model)
    assert "\n" not in str(caught.value)
