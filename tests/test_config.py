"""config.yaml, its schema, and what a user is told about a mistake in it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT, run_snakemake
from pockettune.common.errors import UserError
from pockettune.workflow.config import check_config, check_files, drop_idle
from pockettune.workflow.pins import check_fetched, pinned_files, unpin_others

SCHEMA = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text())
CONFIG = yaml.safe_load((ROOT / "config.yaml").read_text())


def merged(run: Path) -> dict[str, Any]:
    from snakemake.utils import update_config

    config = copy.deepcopy(CONFIG)
    update_config(config, yaml.safe_load(run.read_text()))
    return config


def overlaid(given: dict[str, Any]) -> dict[str, Any]:
    """Return config.yaml with `given` over it, its pins where they belong."""
    from snakemake.utils import update_config

    config = copy.deepcopy(CONFIG)
    update_config(config, given)
    return config


def test_another_name_takes_none_of_the_pins_of_config_yaml() -> None:
    given = {"model": {"name": "a/b"}, "dataset": {"name": "c/d"}}
    config = overlaid(given)
    message = unpin_others(config, CONFIG, given)
    assert (config["model"]["revision"], config["model"]["sha256"]) == ("main", None)
    assert config["dataset"]["revision"] == "main"
    assert message == (
        "not pinned: model.revision, model.sha256, dataset.revision; the run takes what main of a/b,"
        " main of c/d is on the day, set them to keep it"
    )
    check_config(config, SCHEMA)


def test_pins_of_a_run_file_are_kept_though_they_are_those_of_config_yaml() -> None:
    given = {"model": {**CONFIG["model"], "name": "a/copy"}}
    config = overlaid(given)
    assert unpin_others(config, CONFIG, given) is None
    assert config["model"] == given["model"]


def test_checksum_alone_is_missing() -> None:
    given = {"model": {"name": "a/b", "revision": "v1"}}
    config = overlaid(given)
    assert unpin_others(config, CONFIG, given) == (
        "not pinned: model.sha256; the run takes what v1 of a/b is on the day, set them to keep it"
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": {"name": CONFIG["model"]["name"]}, "train": {"rank": 4}},
        {"model": {"name": "a/b", "path": "data/base"}},
        {"dataset": {"name": "a/b", "files": {"all": "a.csv"}}},
        {"model": None, "dataset": 7},
    ],
)
def test_own_names_and_local_files_need_no_other_pins(given: dict[str, Any]) -> None:
    assert unpin_others(overlaid(given), CONFIG, given) is None


def test_checksum_pinned_after_the_model_was_fetched(tmp_path: Path) -> None:
    check_fetched(tmp_path / "absent", pinned_files("0" * 64))
    source = {"origin": "a/b@main", "sha256": {"model.safetensors": "1" * 64}}
    (tmp_path / "source.json").write_text(json.dumps(source))
    check_fetched(tmp_path, pinned_files(None))
    check_fetched(tmp_path, pinned_files("1" * 64))
    with pytest.raises(UserError) as caught:
        check_fetched(tmp_path, pinned_files({"a.safetensors": "0" * 64}))
    assert str(caught.value) == (
        f"config: model.sha256 does not fit {tmp_path}: a.safetensors has no such file, pinned is"
        f" {'0' * 64}; model.safetensors has {'1' * 64}, pinned is none; correct it, or remove the"
        " folder to fetch the model anew"
    )


def test_config_is_valid() -> None:
    check_config(copy.deepcopy(CONFIG), SCHEMA)


@pytest.mark.parametrize("run", sorted((ROOT / "runs").glob("*.yaml")), ids=lambda p: p.name)
def test_run_file_is_valid(run: Path) -> None:
    check_config(merged(run), SCHEMA)


def test_every_schema_key_is_in_config() -> None:
    for section, rules in SCHEMA["properties"].items():
        if section != "pathvars" and "required" in rules:
            told = set(CONFIG[section])
            for task in ("entities", "answer", "chat"):  # whose own keys stand in their run files
                told |= set(
                    yaml.safe_load((ROOT / f"runs/{task}.yaml").read_text()).get(section, {})
                )
            assert set(rules["properties"]) == told, section


def test_task_has_its_own_keys_alone() -> None:
    def settled(run: str) -> dict[str, Any]:
        config = merged(ROOT / "runs" / run)
        check_config(config, SCHEMA)
        return config

    assert settled("demo.yaml")["task"].keys() == CONFIG["task"].keys()
    assert "question_column" not in settled("demo.yaml")["dataset"]
    chat, answer = settled("chat.yaml")["task"], settled("answer.yaml")
    assert chat["labels"] == {} and chat["prompt"] == "" and chat["max_answer_tokens"] == 256
    assert set(answer["task"]) - set(CONFIG["task"]) == {"no_answer", "count", "stride", "max_answer_tokens"}  # fmt: skip
    assert answer["dataset"]["question_column"] == "question"


def test_words_of_types_can_be_told_apart() -> None:
    config = merged(ROOT / "runs/entities.yaml")
    config["task"]["types"] = {"a": "人名", "b": "地名", "c": "地名"}
    told = r"task\.types answers the same word for two values: 人名, 地名, 地名"
    with pytest.raises(UserError, match=told):
        check_config(config, SCHEMA)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *sections, key = path.split(".")
        for section in sections:
            config = config[section]
        config[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("train.lerning_rate", 1), "unknown key train.lerning_rate; did you mean learning_rate?"),
        (put("quantise", {}), "unknown key quantise; did you mean quantize?"),
        (put("train.learning_rate", "2e-4"), "'2e-4', not a number; write 2.0e-04"),
        (put("task.labels", {True: "a", "n": "b"}), "the boolean True, which YAML reads from yes, on or true"),
        (put("train.rank", 0), "train.rank is 0: 0 is less than the minimum of 1"),
        (put("train.rank", True), "train.rank is True, not a whole number"),
        (put("quantize.q4", {"type": "Q4_KM"}), "did you mean Q4_K_M? (known: Q2_K, "),
        (put("quantize.f16", {"type": "Q8_0"}), "the name 'f16'"),
        (put("quantize.tfidf", {"type": "Q8_0"}), "the name 'tfidf'"),
        (put("evaluate.split", "validation"), "on whose rows train.eval_every chooses the adapter"),
        (put("evaluate.margin", 0), "evaluate.margin is 0: 0 is less than or equal to the minimum of 0"),
        (put("choose", {"size_gb": 1}), "unknown key choose.size_gb; did you mean size_mb?"),
        (put("choose", {"size_mb": 0}), "choose.size_mb is 0: 0 is less than or equal to the minimum of 0"),
        (put("choose", {"margin": 1}), "choose.margin is 1: 1 is greater than or equal to the maximum of 1"),
        (put("choose", 200), "choose is 200, not a section or null"),
        (put("model.keep_layers", {"count": 0, "choose": "auto"}), "model.keep_layers.count is 0: 0 is less than the minimum of 1"),
        (put("model.keep_layers", {"count": 16, "choose": "best"}), "model.keep_layers.choose is 'best'; known: auto"),
        (put("model.keep_layers", {"count": 16}), "model.keep_layers.choose is missing"),
        (put("model.keep_layers", {"count": 16, "chose": "auto"}), "unknown key model.keep_layers.chose; did you mean choose?"),
        (put("choose", {"margin": 0}), "choose.margin is 0: 0 is less than or equal to the minimum of 0"),
        (put("choose", {"memory_mb": -1}), "choose.memory_mb is -1: -1 is less than or equal to the minimum of 0"),
        (put("quantize.best", {"type": "Q8_0"}), "the name 'best'"),
        (put("model.keep_layers", 0), "model.keep_layers is 0: 0 is less than the minimum of 1"),
        (put("model.keep_layers", []), "model.keep_layers is []: [] should be non-empty"),
        (put("model.keep_layers", [3, 1, 1]), "model.keep_layers is [3, 1, 1]: give each layer once, ascending"),
        (put("task.prompt", "no place"), "task.prompt does not hold {text}"),
        (put("task.labels", {"0": "好", "1": "好"}), "the same word for two values"),
        (put("task.labels", {"0": "好"}), "task.labels has 1 labels, not two or more"),
        (put("task.types", {"a": "b"}), "task.types is for task.type entities, not classification; take it out"),
        (put("task.no_answer", "无"), "task.no_answer is for task.type answer, not classification"),
        (put("task.type", "entities"), "task.types is missing, without which task.type entities cannot be asked"),
        (put("task.type", "answer"), "task.prompt does not hold {question}, the place of the record's question"),
        (put("dataset.label_column", None), "dataset.label_column is null, which is for task.type chat, not classification"),
        (put("dataset.question_column", "q"), "dataset.question_column is for task.type answer, not classification"),
        (put("task.labels", {"0": "差", "1": "差 ", "2": "\u3000好"}), "'差 ', '\\u3000好' begins or ends with a space"),
        (put("task.template_options", {"tools": ["a"]}), "task.template_options.tools is ['a'], not"),
        (put("dataset.files", {"train": "a.csv"}), "needs train, validation and test, or all alone"),
        (put("train", None), "train is None, not a section"),
        (put("hub.endpoint", "https://a.b"), "unknown key hub.endpoint; it is an entry of hub.sources now"),
        (put("hub.source", "modelscope"), "unknown key hub.source; it is an entry of hub.sources now"),
        (put("hub.sources", ["hf-mirror.com"]), "hub.sources.0 is 'hf-mirror.com', not huggingface"),
        (put("hub.send_token_to", ["https://a.b"]), "'https://a.b', not the name of a host"),
        (put("dataset.splits", {"test": "test"}), "dataset.splits.train is missing; dataset.splits.validation is missing"),
    ],
)  # fmt: skip
def test_mistake_is_told_in_one_line(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    config = copy.deepcopy(CONFIG)
    change(config)
    with pytest.raises(UserError) as caught:
        check_config(config, SCHEMA)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    config = copy.deepcopy(CONFIG)
    put("train.rank", -1)(config)
    put("report.titel", "x")(config)
    with pytest.raises(UserError, match=r"unknown key report\.titel.*train\.rank is -1"):
        check_config(config, SCHEMA)


@pytest.mark.parametrize("idle", [put("train.eval_every", None), put("train.adapter", "mine")])
def test_validation_may_be_scored_where_nothing_was_chosen_on_it(
    idle: Callable[[dict[str, Any]], None],
) -> None:
    config = copy.deepcopy(CONFIG)
    put("evaluate.split", "validation")(config)
    idle(config)
    check_config(config, SCHEMA)


def test_null_leaves_a_variant_out_and_number_keys_become_text() -> None:
    config = copy.deepcopy(CONFIG)
    put("quantize.q8_0", None)(config)
    put("task.labels", {0: "坏", 1: "好"})(config)
    check_config(config, SCHEMA)
    assert list(config["quantize"]) == ["q4_k_m"]
    assert config["task"]["labels"] == {"0": "坏", "1": "好"}


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    there = tmp_path / "there.csv"
    there.touch()
    with pytest.raises(UserError, match=r"model\.path /no/a; dataset\.files\.test /no/b"):
        check_files(
            {"model.path": "/no/a", "dataset.files.all": str(there), "dataset.files.test": "/no/b"}
        )


def test_keys_that_another_makes_idle_do_not_count() -> None:
    config = copy.deepcopy(CONFIG)
    config["model"]["path"] = "my/model"
    drop_idle(config)
    idle = {"name": None, "revision": None, "sha256": None}
    assert config["model"] == {
        **idle, "path": "my/model", "keep_layers": None, "chat_template": None,
    }  # fmt: skip
    assert config["dataset"]["split"] is None
    assert config["dataset"]["name"] == CONFIG["dataset"]["name"]


def test_numbers_are_spelled_one_way_and_defaults_filled_in() -> None:
    config = overlaid(
        {
            "model": {"keep_layers": 4.0},
            "train": {"alpha": 16.0, "rank": 8.0, "dropout": 0},
            "quantize": {"q8_0": {"type": "Q8_0"}},
        }
    )
    config["task"]["template_options"] = {"threshold": 1.0}
    check_config(config, SCHEMA)
    assert (
        repr([config["train"][key] for key in ("alpha", "rank", "dropout", "learning_rate")])
        == "[16, 8, 0, 0.0002]"
    )
    assert repr(config["model"]["keep_layers"]) == "4"
    assert config["quantize"]["q8_0"] == {
        "type": "Q8_0",
        "pure": False,
        "importance": False,
        "tensors": {},
    }
    assert repr(config["task"]["template_options"]["threshold"]) == "1.0", "a template prints it"


@pytest.mark.parametrize(
    ("train", "idle"),
    [
        ({"batch_tokens": 4096}, {"batch_size"}),
        ({"batch_tokens": 4096, "eval_every": None}, {"batch_size", "eval_limit", "metric", "patience"}),
        ({"eval_every": None}, {"eval_limit", "metric", "patience"}),
        ({}, set()),
    ],
)  # fmt: skip
def test_idle_keys_of_training_do_not_count(train: dict[str, Any], idle: set[str]) -> None:
    config = overlaid({"train": train})
    before = copy.deepcopy(config["train"])
    drop_idle(config)
    assert {key for key in before if config["train"][key] != before[key]} == idle
    assert all(config["train"][key] is None for key in idle)


def test_parts_of_a_hubs_dataset_are_idle_beside_files() -> None:
    config = copy.deepcopy(CONFIG)
    config["dataset"].update(files={"all": "a.csv"}, subset="x", splits={"train": "train"})
    drop_idle(config)
    assert config["dataset"]["subset"] is config["dataset"]["splits"] is None


@pytest.mark.parametrize("elsewhere", ["a Snakefile elsewhere", "--directory"])
def test_run_from_another_folder_is_refused_in_one_line(elsewhere: str, tmp_path: Path) -> None:
    if elsewhere == "--directory":
        result = run_snakemake(ROOT, "--dry-run", "--directory", str(tmp_path))
    else:
        result = run_snakemake(tmp_path, "--dry-run", "--snakefile", str(ROOT / "Snakefile"))
    assert result.returncode == 2
    assert f"error: run in {tmp_path}, where the Snakefile is not: cd {ROOT}" in result.stdout
    assert "Traceback" not in result.stdout and "WorkflowError" not in result.stdout


def test_every_offered_type_is_known_to_llama_cpp() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    recipe = SCHEMA["$defs"]["gguf"]["properties"]
    offered = recipe["type"]["enum"]
    assert [t for t in offered if not hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{t}")] == []
    of_tensors = recipe["tensors"]["additionalProperties"]["enum"]
    assert [t for t in of_tensors if t not in gguf.GGMLQuantizationType.__members__] == []
