"""The base model, where it is here already, and whether llama.cpp's converter will know its tokenizer."""

from pockettune.common.errors import UserError, list_faults
from pockettune.common.formats import GGUF, LARGEST_TFLITE, LITERT, variants_of
from pockettune.gguf.recipes import REMEDY
from pockettune.machine.findings import Finding, judge
from pockettune.machine.hardware import LATE
from pockettune.machine.probe import Answer
from pockettune.machine.quantized import misfits
from pockettune.machine.run import Run
from pockettune.machine.shape import Shape


def check_model(run: Run) -> list[Finding]:
    """The fetched base, or the local model, as fetch_model checks it."""
    from pockettune.models.folder import check_model_folder

    place = run.base if run.base.is_dir() else run.own_model
    name = run.settings["model"]["path"] or run.settings["model"]["name"]
    shape: Shape | None = run.facts["shape"]()
    size = f", {shape.parameters / 1e6:,.1f} M parameters" if shape else ""
    if place is None or not place.exists():
        missing = "made by the run itself" if place else "not here yet"
        told = f" ({shape.source})" if shape else "; its shape is not known until it is here"
        return [Finding("model", "ok", f"{name}: {missing}{size}{told}")]
    try:
        if place.is_dir():
            check_model_folder(place)
    except UserError as error:
        remedy = (
            "remove the folder, so that it is fetched anew"
            if place == run.base
            else "mend the folder"
        )
        return [Finding("model", "problem", str(error), remedy)]
    where = "fetched" if place == run.base else "local"
    return [Finding("model", "ok", f"{name}: {where}{size}")]


def check_tokenizer(run: Run) -> list[Finding]:
    """Whether the converter knows the tokenizer: else a run stops after the training."""
    if "tokenizer" not in run.facts:
        lacking = "the model" if run.converter.is_dir() else "llama.cpp's converter"
        return [
            Finding(
                "tokenizer",
                "ok",
                f"not known until {lacking} is here whether the converter knows it",
            )
        ]
    answer: Answer = run.facts["tokenizer"]()
    if answer.failure and "unknown" not in answer.facts:
        return [
            Finding(
                "tokenizer",
                "warning",
                f"the converter could not be asked: {answer.failure}",
                LATE if answer.late else "`make setup`",
            )
        ]
    return [judge("tokenizer", answer.facts.get("unknown"), f"llama.cpp's converter knows it as {answer.facts.get('name')}",
                  "another base model, or a tokenizer of a published model")]  # fmt: skip


def check_recipes(run: Run) -> list[Finding]:
    """Whether this model's rows can hold what the recipes force on them: else a run stops after the training."""
    shape: Shape | None = run.facts["shape"]()
    if shape is None:
        return [Finding("recipes", "ok", "not known until the model's shape is")]
    faults = [
        f"quantize.{variant} forces {', '.join(found)}"
        for variant, recipe in run.settings["quantize"].items()
        if recipe.get("format", GGUF) == GGUF and (found := misfits(shape, recipe))
    ]
    litert = variants_of(run.settings["quantize"], LITERT)
    if litert and 4 * shape.parameters > LARGEST_TFLITE:
        return [
            Finding(
                "recipes",
                "problem",
                f"quantize.{litert[0]}: a .tflite file holds {LARGEST_TFLITE / 1e9:.2f} GB, the model takes"
                f" {4 * shape.parameters / 1e9:.2f} in fp32, in which it is exported first",
                "vocabulary.keep: task, model.keep_layers, or the formats gguf and onnx",
            )
        ]
    return [
        judge(
            "recipes",
            list_faults(faults) if faults else None,
            "the model's rows can hold their types",
            REMEDY,
        )
    ]
