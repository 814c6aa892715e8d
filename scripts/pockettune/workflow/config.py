"""Checks config.yaml against its schema and says what is wrong in a user's words."""

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from pockettune.common.errors import UserError, list_faults
from pockettune.common.formats import GGUF, variants_of

Config = dict[str, Any]

TYPE_NAMES = {
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "object": "a section",
    "array": "a list",
    "null": "null",
}

# Keys of earlier versions, and what took their place.
RENAMED = {
    "hub.source": "it is an entry of hub.sources now: [modelscope, huggingface]",
    "hub.endpoint": "it is an entry of hub.sources now: [https://hf-mirror.com, huggingface]",
}

# Types whose grid is so coarse that llama.cpp refuses them without an importance matrix, as recipes and
# as types of tensors.
NEED_IMPORTANCE = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}  # fmt: skip

# Besides what _unusable_paths explains: line breaks and other control characters, which would
# break the one line of a message, and halves of characters, which no file system takes.
UNUSABLE = re.compile(r"[{}<>\x00-\x1f\x7f\ud800-\udfff]|^-")


# What section task holds for every task, and what each has besides with the value of a key that is left
# out; for MUST there is none. A task of the user's own may take any of them.
COMMON_KEYS = ("type", "system", "prompt", "labels", "template_options")
MUST = object()
TASK_KEYS: dict[str, dict[str, Any]] = {
    "classification": {},
    "entities": {"types": MUST, "max_answer_tokens": 64},
    "answer": {"no_answer": None, "count": "characters", "stride": 128, "max_answer_tokens": 64},
    "chat": {"max_answer_tokens": 256},
}
# What task.prompt must hold.
PLACES = {"answer": ("{text}", "{question}"), "chat": ()}


def check_config(config: Config, schema: dict[str, Any]) -> None:
    """Raise UserError naming every fault of `config`; first mend what YAML and merging leave.

    Keys of `task.labels` become text (YAML reads an unquoted 0 as a number), and entries of
    `quantize` and `task.labels` that a run file sets to null are dropped. Afterwards numbers are
    spelled one way and keys that were left out have their default, so that neither is a reason to rerun.
    """
    faults = list(_boolean_labels(config))
    _normalise(config)
    errors = sorted(Draft202012Validator(schema).iter_errors(config), key=lambda e: list(e.path))
    faults += dict.fromkeys(fault for error in errors for fault in _describe(error))
    if not faults:
        faults = list(_contradictions(config))
    if faults:
        raise UserError(f"config: {list_faults(faults)}")
    _fill_task(config)
    config.update(_spell_alike(config, schema, schema))
    for name in variants_of(config["quantize"], GGUF):
        config["quantize"][name].pop("format", None)  # the same recipe as without


def is_gguf(path: str | None) -> bool:
    """Whether a model's path names a GGUF file and not a folder."""
    return bool(path) and str(path).lower().endswith(".gguf")


def local_files(config: Config) -> dict[str, str]:
    """Return the config's keys that name local files, without those that a rule makes."""
    files = {f"dataset.files.{k}": v for k, v in (config["dataset"]["files"] or {}).items()}
    for key in ("path", "chat_template"):
        files[f"model.{key}"] = config["model"][key]
    files["train.adapter"] = config["train"]["adapter"]
    for key in ("path", "unlabelled_texts"):
        files[f"train.teacher.{key}"] = (config["train"]["teacher"] or {}).get(key)
    return {key: path for key, path in files.items() if path and not path.startswith("resources/")}


def check_files(paths: dict[str, str]) -> None:
    """Raise UserError naming every key of `paths` whose file or folder is missing.

    Weights in such a folder become inputs of a rule too, so their names must be usable as well.
    """
    missing = [f"{key} {path}" for key, path in paths.items() if not Path(path).exists()]
    if missing:
        raise UserError(
            f"config: no such file: {list_faults(missing)}; paths count from the folder of the Snakefile"
        )
    path = paths.get("model.path")
    if path and Path(path).is_dir() == is_gguf(path):
        kind = "a folder" if is_gguf(path) else "a file whose name does not end in .gguf"
        raise UserError(
            f"config: model.path {path} is {kind}: it must be a model's folder or a .gguf file; rename it"
        )
    weights = {f"{key}, weights": file.name for key, path in paths.items()
               for file in Path(path).glob("*.safetensors")}  # fmt: skip
    if faults := list(_unusable_paths(weights)):
        raise UserError(f"config: {list_faults(faults)}")


def check_text(config: Config) -> None:
    """Raise UserError naming the keys that count labels, of which a task of text has none."""
    train = config["train"]
    kept = config["model"]["keep_layers"]
    faults = {
        "train.teacher": train.get("teacher"),
        "train.class_weights: balanced": train.get("class_weights") == "balanced",
        "model.keep_layers.choose: auto": isinstance(kept, dict),
        **{
            f"quantize.{name}.format": kind
            for name, recipe in config["quantize"].items()
            if (kind := recipe.get("format", GGUF)) != GGUF
        },
    }
    if found := [key for key, given in faults.items() if given]:
        raise UserError(
            f"config: {', '.join(found)}: made for labels, and task.type {config['task']['type']} answers with"
            " text; take it out"
        )


def drop_idle(config: Config, text: bool = False) -> None:
    """Set to null, or drop, what another key makes idle, so that changing it is no reason to rerun.

    `text`: the task's answers are text, of which the labels, and the metric that counts them, say nothing.
    """
    model, dataset, train = config["model"], config["dataset"], config["train"]
    if train["batch_tokens"]:
        train["batch_size"] = None
    if train["eval_every"] is None:
        train.update(eval_limit=None, metric=None, patience=None)
    if text:
        train["metric"] = None
        config["task"]["labels"] = {}
    if train["teacher"] and train["teacher"]["weight"] == 0:
        train["teacher"] = None
    if config["vocabulary"]["keep"] == "full":
        config["vocabulary"] = {"keep": "full"}
    for recipe in config["quantize"].values():
        if recipe["type"] == "int8":  # has one way
            recipe.pop("algorithm", None)
    if train["adapter"]:
        config["train"] = {"adapter": train["adapter"]}
    if model["path"]:
        model.update(name=None, revision=None, sha256=None)
    if dataset["files"]:
        dataset.update(name=None, revision=None, subset=None, splits=None)
    if not dataset["files"] or "all" not in dataset["files"]:
        dataset["split"] = None


def set_environment(hub: dict[str, Any], pins: dict[str, str]) -> None:
    """Set what the programs find in their environment.

    PATH: the interpreter that runs Snakemake comes first, so that a virtual environment need not
    be activated; a rule's conda environment still comes before it. Where to fetch from, and who gets
    the token, and the checksums that fetched weights must have: as a parameter of a rule it would be
    a reason to rerun.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ["POCKETTUNE_HUB_SOURCES"] = " ".join(hub["sources"])
    os.environ["POCKETTUNE_SEND_TOKEN_TO"] = " ".join(hub["send_token_to"])
    os.environ["POCKETTUNE_MODEL_SHA256"] = json.dumps(pins)


def _normalise(config: Config) -> None:
    quantize, task = config.get("quantize"), config.get("task")
    if isinstance(quantize, dict):
        config["quantize"] = {
            str(key): value for key, value in quantize.items() if value is not None
        }
    for key in ("labels", "types"):
        if isinstance(task, dict) and isinstance(task.get(key), dict):
            words = task[key].items()
            task[key] = {str(value): word for value, word in words if word is not None}


def _boolean_labels(config: Config) -> Iterator[str]:
    """Yield the labels whose spelling is lost: YAML reads yes, no, on and off as booleans."""
    task = config.get("task")
    labels = task.get("labels") if isinstance(task, dict) else None
    for key in labels if isinstance(labels, dict) else {}:
        if isinstance(key, bool):
            words = "yes, on or true" if key else "no, off or false"
            yield (
                f"task.labels has the boolean {key}, which YAML reads from {words} without quotes; write"
                f' the value as in the data, in quotes ("{key}" for a boolean of jsonl or parquet)'
            )


def _spell_alike(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """Return a valid value with 16.0 as 16, where the schema has a number, and with defaults filled in.

    A key that may be text too is left alone: a chat template prints its 16.0 as it is. `root` is the
    schema that references lead into.
    """
    schema = _applying(schema, value, root)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties")
        others = others if isinstance(others, dict) else {}
        defaults = {key: rules["default"] for key, rules in known.items() if "default" in rules}
        return {
            key: _spell_alike(entry, known.get(key, others), root)
            for key, entry in (defaults | value).items()
        }
    types = schema.get("type")
    types = {types} if isinstance(types, str) else set(types or ())
    is_number = bool(types & {"number", "integer"}) and "string" not in types
    return int(value) if is_number and isinstance(value, float) and value.is_integer() else value


def _applying(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a schema that a value is held to, conditions and references followed."""
    while "if" in schema or "$ref" in schema:
        if "$ref" in schema:
            schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        else:
            fits = Draft202012Validator(schema["if"]).is_valid(value)
            schema = schema["then" if fits else "else"]
    return schema


def _describe(error: ValidationError) -> Iterator[str]:
    where = ".".join(str(part) for part in error.path)
    rule: Any = error.validator_value
    section: Any = error.schema
    value: Any = error.instance
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = list(section.get("properties", {}))
        for key in error.instance:
            if key not in known:
                name = _join(where, str(key))
                yield f"unknown key {name}; {RENAMED.get(name) or _nearest(str(key), known)}"
    elif error.validator == "required":
        for key in rule:
            if key not in value:
                yield f"{_join(where, key)} is missing"
    elif error.validator == "type":
        yield f"{where} is {error.instance!r}, not {_type_names(error)}{_float_hint(error)}"
    elif error.validator == "enum":
        known = [str(value) for value in rule]
        yield f"{where} is {error.instance!r}; {_nearest(str(error.instance), known)}"
    elif error.validator == "oneOf":
        yield f"{where} needs train, validation and test, or all alone"
    elif where.startswith("hub.sources.") and error.validator == "pattern":
        yield (
            f"{where} is {error.instance!r}, not huggingface, modelscope, the address of a mirror"
            " (https://…) or modelscope:https://…"
        )
    elif where.startswith("hub.send_token_to.") and error.validator == "pattern":
        yield f"{where} is {error.instance!r}, not the name of a host"
    elif (
        str(error.validator) in ("not", "pattern") and error.parent is None and where == "quantize"
    ):
        yield f"quantize: the name {error.instance!r} is not lower-case letters, digits and _, or is a stage's"
    else:
        yield f"{where} is {error.instance!r}: {error.message}"


def _contradictions(config: Config) -> Iterator[str]:
    """Yield what the schema cannot say."""
    teacher = config["train"]["teacher"] or {}
    files = {
        f"dataset.files.{key}": path for key, path in (config["dataset"]["files"] or {}).items()
    }
    yield from _unusable_paths(
        {
            **files,
            "model.path": config["model"]["path"],
            "model.chat_template": config["model"]["chat_template"],
            "train.adapter": config["train"]["adapter"],
            "train.teacher.path": teacher.get("path"),
            "train.teacher.unlabelled_texts": teacher.get("unlabelled_texts"),
            "pathvars.results": config.get("pathvars", {}).get("results"),
        }
    )
    if config["model"]["chat_template"] and not is_gguf(config["model"]["path"]):
        yield (
            "model.chat_template is for a .gguf file of model.path alone; a model's folder holds"
            " its own, chat_template.jinja"
        )
    kept = config["model"].get("keep_layers")
    if isinstance(kept, list) and kept != sorted(set(kept)):
        yield f"model.keep_layers is {kept}: give each layer once, ascending"
    train = config["train"]
    if config["evaluate"]["split"] == "validation" and train["eval_every"] and not train["adapter"]:
        yield (
            "evaluate.split is validation, on whose rows train.eval_every chooses the adapter: a score"
            " on them is too high; set evaluate.split to test, or train.eval_every to null"
        )
    yield from _unusable_recipes(config["quantize"])
    shipped = variants_of(config["quantize"], GGUF)
    if not shipped:
        yield (
            "quantize has no recipe of format gguf, with which files of other formats are compared; add"
            " one, such as q8_0: {type: Q8_0}"
        )
    bundled = (config.get("bundle") or {}).get("file", "best")
    if bundled not in (known := ["best", "f16", *shipped]):
        yield f"bundle.file is {bundled!r}; {_nearest(bundled, known)}"
    yield from _unusable_task(config["task"], config["dataset"])


def _unusable_task(task: Config, dataset: Config) -> Iterator[str]:
    """Yield the keys of another task, those that are missing, and words that cannot be told apart."""
    kind = task["type"]
    for place in PLACES.get(kind, ("{text}",)):
        if place not in task["prompt"]:
            yield f"task.prompt does not hold {place}, the place of the record's {place[1:-1]}"
    known = TASK_KEYS.get(kind)
    if known is not None:
        for key in sorted(set(task) - {*COMMON_KEYS, *known}):
            takers = [name for name, keys in TASK_KEYS.items() if key in keys]
            yield f"task.{key} is for task.type {' or '.join(takers)}, not {kind}; take it out"
        for key, default in known.items():
            if default is MUST and not task.get(key):
                yield f"task.{key} is missing, without which task.type {kind} cannot be asked"
    if kind == "classification" and len(task["labels"]) < 2:
        yield f"task.labels has {len(task['labels'])} labels, not two or more"
    if kind != "chat" and dataset["label_column"] is None:
        yield f"dataset.label_column is null, which is for task.type chat, not {kind}"
    if kind != "answer" and "question_column" in dataset:
        yield f"dataset.question_column is for task.type answer, not {kind}; take it out"
    for key in ("labels", "types"):
        words = list(task.get(key, {}).values())
        if len(set(words)) < len(words):
            yield f"task.{key} answers the same word for two values: {', '.join(words)}"
        if spaced := [repr(word) for word in words if word != word.strip()]:
            yield f"task.{key}: {', '.join(spaced)} begins or ends with a space; take it away"


def _fill_task(config: Config) -> None:
    """Give section task the keys of its type that were left out, and take away what config.yaml left."""
    task, dataset = config["task"], config["dataset"]
    known = TASK_KEYS.get(task["type"])
    if known is None:
        return
    config["task"] = {key: task[key] for key in COMMON_KEYS} | {
        key: task.get(key, default) for key, default in known.items()
    }
    if task["type"] != "classification":
        config["task"]["labels"] = {}
    if task["type"] == "answer":
        dataset.setdefault("question_column", "question")
    if task["type"] == "chat":  # whose data hold the user's messages as they are
        config["task"]["prompt"] = ""


def _unusable_recipes(quantize: Config) -> Iterator[str]:
    """Yield the recipes that need an importance matrix and ask for none, and patterns that are none."""
    for variant, recipe in quantize.items():
        if recipe["type"] == "int8" and "algorithm" in recipe:
            yield f"quantize.{variant}.algorithm chooses among ways to int4; int8 has one, take it away"
        tensors = recipe.get("tensors", {})
        coarse = sorted(NEED_IMPORTANCE & {recipe["type"], *tensors.values()})
        if coarse and not recipe.get("importance"):
            yield (
                f"quantize.{variant}: {', '.join(coarse)} is too coarse to choose without knowing which"
                " columns count; set importance: true"
            )
        for pattern in tensors:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"quantize.{variant}.tensors: {pattern!r} is no regular expression: {error}"


def _unusable_paths(paths: Mapping[str, str | None]) -> Iterator[str]:
    """Yield the paths that Snakemake or a program would misread.

    Snakemake takes {x} in a path for a wildcard and <x> for a variable, a program takes a path that
    begins with - for an option. All else works: spaces, quotes, $, backticks, any script.
    """
    for key, path in paths.items():
        if path and (found := UNUSABLE.search(path)):
            yield f"{key} is {path!r}: {found[0]!r} cannot stand there; rename it"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _nearest(value: str, known: list[str]) -> str:
    close = difflib.get_close_matches(value.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    hint = [k for k in known if close and k.lower() == close[0]]
    listed = f"known: {', '.join(known)}"
    return f"did you mean {hint[0]}? ({listed})" if hint else listed


def _type_names(error: ValidationError) -> str:
    types: Any = error.validator_value
    names = [types] if isinstance(types, str) else types
    return " or ".join(TYPE_NAMES[name] for name in names)


def _float_hint(error: ValidationError) -> str:
    """YAML 1.1 reads 2e-4 as text: show the spelling that it reads as a number."""
    try:
        return f"; write {float(error.instance):.1e}" if isinstance(error.instance, str) else ""
    except ValueError:
        return ""
