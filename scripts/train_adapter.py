"""Train a LoRA (or QLoRA) adapter to give the task's answer behind the prompt.

The answer is a token or two behind a prompt of about a hundred, so logits are computed where an
answer token is predicted and nowhere else, and sequences are laid end to end behind their common
start instead of padded (pockettune.runtimes.packing). Loss: cross-entropy, mean over an answer's tokens, then
over the examples. Now and then the adapter is scored on rows of validation; the best one is kept.

With a teacher it also learns how likely that finds each label (pockettune.training.teacher).

A killed run goes on from its last checkpoint, to the same adapter (pockettune.training.loop).

Input   the base model; the folder tokens/; the folder teacher/ of score_teacher.py, if any
Output  a PEFT adapter folder (adapter_config.json, adapter_model.safetensors) with training.json:
        loss and learning rate by update, validations, trainable parameters, seconds, peak memory;
        temperature and coverage: how far the adapter's probabilities can be trusted
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pockettune.common import disk, program
from pockettune.common.errors import UserError, list_faults
from pockettune.data.prompts import Examples, take_evenly
from pockettune.evaluation import calibration, metrics
from pockettune.models.adapters import add_adapter
from pockettune.models.folder import load_model, published_name, weight_files
from pockettune.runtimes import packing
from pockettune.runtimes.memory import memory_hint
from pockettune.tasks import as_text_task, load_task
from pockettune.training import checkpoints
from pockettune.training.loop import (
    Hardware,
    TextValidator,
    TrainingState,
    Validator,
    draw_batches,
    less_memory,
    run_updates,
    weigh_answers,
)
from pockettune.training.teacher import UNLABELLED_EXAMPLES, Teacher, load_teacher, teacher_files
from pockettune.workflow.imports import imported_files

LIBRARIES = ("torch", "transformers", "peft")  # whose versions decide the weights too
# What SLURM and users set where a GPU is meant to be used, and their words for none.
RESERVED = ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES")
NO_GPU = ("", "-1", "none", "NoDevFiles")


def train_adapter(
    settings: Mapping[str, Any],
    base: Path,
    tokens: Path,
    threads: int,
    scratch: Path,
    output: Path,
    save_every: float = 60.0,
    teacher: Path | None = None,
) -> None:
    """Train on tokens/train.arrow, and on the texts of teacher/, and write the adapter folder."""
    train = settings["train"]
    torch.set_num_threads(threads)
    torch.manual_seed(train["seed"])
    device = choose_device(train["device"])
    hardware = Hardware(device, choose_precision(train["precision"], device))
    labelled = Examples(tokens / "train.arrow")
    examples, taught = add_teacher(labelled, settings, tokens, teacher)
    batches = draw_batches(examples.count_tokens(), train)
    weights = weigh_answers(
        labelled.count_references(),
        float(labelled.count_answer_tokens().mean()),
        balanced=train["class_weights"] == "balanced",
    )
    validator = make_validator(settings, tokens, len(batches))
    with memory_hint(less_memory(train)):
        model = add_adapter(load_base(base, train, hardware), train, base)
    adapter = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in adapter)
    program.logger.info(
        "%d examples, %s trainable parameters, %s on %s",
        len(examples), f"{trainable:,}", hardware.precision, device,
    )  # fmt: skip
    disk.require_space(output, sum(p.numel() * p.element_size() for p in adapter))
    checkpoint = scratch / deciding_digest(settings, base, tokens, teacher, hardware, threads)
    state = run_updates(
        model,
        examples,
        batches,
        train,
        weights,
        hardware,
        validator,
        checkpoint,
        save_every,
        taught,
    )
    with program.staged(output) as partial:
        model.save_pretrained(partial)  # type: ignore[operator]  # PEFT wraps a Module
        name_base(partial, base)
        summary = {
            "examples": len(labelled),
            "unlabelled_examples": len(examples) - len(labelled),
            "teacher": train["teacher"],
            "trainable_parameters": trainable,
            "precision": hardware.precision,
            "quantization": train["quantization"],
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "seconds": round(state.seconds, 2),
            "peak_memory_bytes": peak_memory(device),
            "provenance": metrics.provenance(*LIBRARIES),
            **describe_course(state, validator, len(batches)),
        }
        program.write_json(partial / "training.json", summary)
    program.remove(checkpoint)
    program.logger.info("loss %.4f after %d updates", state.updates[-1]["loss"], len(state.updates))


def add_teacher(
    labelled: Examples, settings: Mapping[str, Any], tokens: Path, folder: Path | None
) -> tuple[Examples, Teacher | None]:
    """Return what is trained on, the texts that the teacher alone labels at its end; and the teacher."""
    if folder is None:
        return labelled, None
    unlabelled = folder / UNLABELLED_EXAMPLES
    examples = Examples(tokens / "train.arrow", *([unlabelled] if unlabelled.exists() else []))
    answers = program.read_json(tokens / "answers.json")
    return examples, load_teacher(folder, settings["train"]["teacher"], examples, answers)


def name_base(adapter: Path, base: Path) -> None:
    """Let a saved adapter name its base as others know it, not by its folder on this machine.

    Not before it is saved: PEFT would ask the hub for that name's config.json.
    """
    path = adapter / "adapter_config.json"
    config = program.read_json(path)
    program.write_json(path, config | {"base_model_name_or_path": published_name(base)})
    program.remove(adapter / "README.md")  # PEFT's unfilled form, which names the folder too


def make_validator(
    settings: Mapping[str, Any], tokens: Path, updates: int
) -> Validator | TextValidator | None:
    """Return what scores the model while it is trained; None where eval_every is null.

    Rows whose text stands in train are left out, unless all do: knowing them by heart is no merit.
    """
    train = settings["train"]
    if train["eval_every"] is None:
        return None
    rows = Examples(tokens / "validation.arrow")
    unseen = [row for row in rows if not row.seen]
    if not unseen:
        program.logger.warning(
            "every row of validation stands in train: the best adapter is chosen on what it was"
            " trained on, and its scores there say nothing; take other rows for validation"
        )
    answers = program.read_json(tokens / "answers.json")
    task = load_task(settings["task"], settings["dataset"])
    examples = take_evenly(unseen or list(rows), train["eval_limit"])
    interval = max(round(train["eval_every"] * updates / train["epochs"]), 1)
    if as_text_task(task):
        return TextValidator(examples, interval)
    return Validator(
        task=task,
        examples=examples,
        words=answers["words"],
        answer_ids=answers["ids"],
        metric=train["metric"],
        interval=interval,
    )


def describe_course(
    state: TrainingState, validator: Validator | TextValidator | None, planned: int
) -> dict[str, Any]:
    """Return what happened from update to update, for training.json."""
    metric = validator.metric if validator else None
    best = state.best_validation(metric) if metric else None
    return {
        "planned_updates": planned,
        "resumed": state.resumed,
        "metric": metric,
        "exported_update": best["update"] if best else len(state.updates),
        "validation_rows": len(validator.examples) if validator else 0,
        "validation_seen": any(e.seen for e in validator.examples) if validator else False,
        "validations": state.validations,
        "updates": state.updates,
        **describe_trust(state, validator),
    }


def describe_trust(
    state: TrainingState, validator: Validator | TextValidator | None
) -> dict[str, Any]:
    """Return how far the kept adapter's probabilities of labels are right, as its validation shows it."""
    if not isinstance(validator, Validator) or state.best_scores is None:
        return {"temperature": None, "coverage": None}
    scores, true = state.best_scores.numpy(), validator.true_answers()
    temperature = calibration.fit_temperature(scores, true)
    value = temperature["value"] if temperature else 1.0
    return {"temperature": temperature, "coverage": calibration.cover(scores, true, value)}


def deciding_digest(
    settings: Mapping[str, Any],
    base: Path,
    tokens: Path,
    teacher: Path | None,
    hardware: Hardware,
    threads: int,
) -> str:
    """Return a digest of all that decides the weights: this program's own lines, the libraries'
    versions and the number of threads, which orders sums, included."""
    program_file = Path(__file__)
    code = [program_file, *imported_files(program_file, root=program_file.parent)]
    inputs = [tokens / name for name in ("train.arrow", "validation.arrow", "answers.json")]
    inputs += [*teacher_files(teacher), base / "config.json", *weight_files(base)]
    versions = {name: version(name) for name in LIBRARIES}
    deciding = [settings, hardware.device, hardware.precision, threads, versions]
    return checkpoints.digest(deciding, [*code, *inputs])


def choose_device(wanted: str) -> str:
    """Return what to train on; `auto` takes a GPU where there is one.

    Raises UserError where one is asked for, or was reserved for this job, and PyTorch sees none: the
    job would hold it for hours and compute on the CPU.
    """
    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    reserved = next((name for name in RESERVED if os.environ.get(name, "") not in NO_GPU), None)
    if wanted == "auto" and reserved is None:
        if shutil.which("nvidia-smi"):
            program.logger.warning(
                "training on the CPU: this machine has nvidia-smi, but PyTorch %s sees no GPU",
                torch.__version__,
            )
        return "cpu"
    why = f"{reserved} is {os.environ[reserved]}" if reserved else "train.device is cuda"
    raise UserError(
        f"{why}, but PyTorch {torch.__version__} sees no GPU: it is a build for the CPU (conda chooses"
        " one where it is installed on a machine without a GPU: docs/cluster.md) or the driver is too"
        " old for it; to train on the CPU all the same, set train.device to cpu"
    )


def choose_precision(wanted: str, device: str) -> str:
    """Return the number format to compute in; `auto` takes bf16 where the hardware has it."""
    if wanted == "fp16" and device == "cpu":
        raise UserError("train.precision fp16 needs a GPU; on a CPU use auto, bf16 or fp32")
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Emulated bf16 is slower than fp32, so ask for the instructions themselves.
    capable = torch.cpu.get_capabilities()
    return "bf16" if capable.get("avx512_bf16") or capable.get("amx_bf16") else "fp32"


def load_base(base: Path, train: Mapping[str, Any], hardware: Hardware) -> torch.nn.Module:
    """Load the frozen base, in 4 bits if asked."""
    options: dict[str, Any] = {"dtype": hardware.dtype, "attention": packing.ATTENTION}
    if train["quantization"] == "nf4":
        from transformers import BitsAndBytesConfig  # here: what bitsandbytes says goes to the log

        options["device_map"] = hardware.device
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=hardware.dtype,
        )
    model = load_model(base, **options)
    check_loaded(model, base, hardware)
    if train["quantization"] == "none":
        model = model.to(hardware.device)
    if train["gradient_checkpointing"]:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    return model


def check_loaded(model: torch.nn.Module, base: Path, hardware: Hardware) -> None:
    """Say where the base is stored finer than it is trained on; refuse weights that fp16 cannot hold."""
    config = program.read_json(base / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored == "float32" and hardware.precision != "fp32":
        program.logger.warning(
            "the base is stored in float32 and trained on in %s, but merged and scored in full: set"
            " train.precision to fp32 if the gate or the scores of adapter and validation part",
            hardware.precision,
        )
    if hardware.precision == "fp16":
        beyond = [
            n for n, p in model.named_parameters() if p.is_floating_point() and p.isinf().any()
        ]
        if beyond:
            raise UserError(
                f"model {base.name}: {list_faults(beyond)} does not fit into fp16 (its end is 65504):"
                " set train.precision to bf16 or fp32"
            )


def peak_memory(device: str) -> int | None:
    """Return the most memory held so far, in bytes: the GPU's, or this process's; None unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections train, task, dataset"
    )
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    # nargs="?": the rule without a teacher names the option alone.
    parser.add_argument("--teacher", type=Path, nargs="?", help="folder of score_teacher.py")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for checkpoints of unfinished trainings; scratch/ beside the output if not given",
    )
    parser.add_argument(
        "--save-every", type=float, default=60.0, help="seconds between checkpoints"
    )
    parser.add_argument("--output", type=Path, required=True, help="adapter folder to make")

    def work(a: argparse.Namespace) -> None:
        scratch = a.scratch or a.output.with_name("scratch")
        train_adapter(
            a.settings, a.base, a.tokens, a.threads, scratch, a.output, a.save_every, a.teacher
        )

    program.run(parser, work)


if __name__ == "__main__":
    main()
