"""Convert the merged model to a GGUF file with 16-bit weights, with llama.cpp's own converter.

The file explains itself: base model, dataset, licence and languages stand in its general.* metadata,
the task's prompt and labels in pockettune.*, or its grammar where it answers with text, with the temperature
by which log probabilities are to be divided, where training found one; quantizing carries them on. It asks rightly by itself, too: its chat
template is the task's own, and its sampling takes the likeliest token.

Input   a model folder, and the one it was trimmed from, if it was; the folder that fetch_converter.py made
Output  f16.gguf
"""

import argparse
import json
import logging
import math
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.chat import DAY, day_options
from pockettune.data.task_template import find_frame, write_template
from pockettune.gguf.files import check_tensors
from pockettune.gguf.tokenizer import name_pre_tokenizer
from pockettune.models.folder import load_tokenizer, tensor_shapes
from pockettune.tasks import as_text_task, load_task

# The pre-tokenizers that llama.cpp knows by name, by the pattern that tokenizer.json spells out.
# The converter itself recognises published tokenizers by a checksum; one of your own, trained
# with the same pattern, has another.
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}


def convert_model(
    model: Path,
    converter: Path,
    settings: Mapping[str, Any],
    output: Path,
    temperature: float | None = None,
    whole: Path | None = None,
) -> None:
    """Write `model` as an F16 GGUF file and read it back.

    The converter recognises a tokenizer by the ids of a test text: of a trimmed one, `whole` has them.
    """
    shapes = tensor_shapes(model)
    template = task_template(model, settings)
    # Vectors are stored as F32. The vocabulary comes on top: 6 MB of Qwen2.5's.
    needed = sum(math.prod(shape) * (2 if len(shape) > 1 else 4) for shape in shapes.values())
    with program.staged(output, needed) as partial:
        run_converter(model, converter, settings, partial, temperature, template, whole)
        check_tensors(partial, shapes)
    program.logger.info("%s: %d tensors, %.1f MB", output, len(shapes), output.stat().st_size / 1e6)


def task_template(model: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template to store instead of the model's own, if there is one to be."""
    if settings["card"]["template"] == "base":
        return None
    task = load_task(settings["task"], settings["dataset"])
    return write_template(find_frame(load_tokenizer(model), task))


def run_converter(
    model: Path,
    converter: Path,
    settings: Mapping[str, Any],
    output: Path,
    temperature: float | None,
    template: str | None,
    whole: Path | None,
) -> None:
    """Run convert_hf_to_gguf.py in this process, teaching it tokenizers of one's own."""
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import conversion.base  # type: ignore[import-not-found]
    import gguf

    text_model = conversion.base.TextModel
    recognise = named_by_pattern(model, text_model.get_vocab_base_pre, whole)
    arguments = ["convert_hf_to_gguf.py", str(model), "--outtype", "f16",
                 "--outfile", str(output)]  # fmt: skip
    with (
        mock.patch.object(gguf.Metadata, "load", lambda *_, **__: lineage(settings)),
        mock.patch.object(
            gguf.Metadata,
            "set_gguf_meta_model",
            with_task(gguf.Metadata, settings, temperature),
        ),
        mock.patch.object(gguf.GGUFWriter, "add_chat_template", storing(gguf.GGUFWriter, template)),
        mock.patch.object(text_model, "get_vocab_base_pre", recognise),
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(logging, "basicConfig"),  # our handlers stay
    ):
        try:
            runpy.run_path(str(converter / "convert_hf_to_gguf.py"), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise UserError(refusal(model, "does not know its architecture")) from ended
        except KeyError as missing:
            raise UserError(
                refusal(model, f"asks its config.json or tokenizer for {missing}")
            ) from missing


def refusal(model: Path, reason: str) -> str:
    """Return the line by which a model is refused that the converter cannot convert."""
    config = program.read_json(model / "config.json")
    kind = ", ".join(config.get("architectures") or ["unknown"])
    return (
        f"model {model} ({kind}): llama.cpp's converter {reason}; take another model"
        " (docs/models.md lists those that work)"
    )


def lineage(settings: Mapping[str, Any]) -> Any:
    """Return the general.* metadata, instead of what the converter guesses from folder names."""
    import gguf

    model, dataset, card = (settings[section] for section in ("model", "dataset", "card"))
    base = model["path"] or model["name"]
    base_model = {"name": Path(base).name.removesuffix(".gguf")}
    if model["name"]:
        base_model |= {
            "organization": base.split("/")[0],
            "version": model["revision"],
            "repo_url": f"https://huggingface.co/{base}",
        }
    data = {"name": dataset["name"] or "local files"}
    if dataset["name"]:
        data |= {
            "version": dataset["revision"],
            "repo_url": f"https://huggingface.co/datasets/{dataset['name']}",
        }
    return gguf.Metadata(
        name=f"{base_model['name']}, {settings['task']['type']}",
        finetune=settings["task"]["type"],
        license=card["license"],
        languages=card["languages"],
        tags=["text-generation", settings["task"]["type"]],
        base_models=[base_model],
        datasets=[data],
        # The likeliest answer is what was scored; llama.cpp's chat programs take these unless told
        # otherwise, and else sample at a temperature of 0.8.
        sampling_temp=0.0,
        sampling_top_k=1,
        sampling_penalty_repeat=1.0,
    )


def with_task(
    metadata: Any, settings: Mapping[str, Any], temperature: float | None
) -> Callable[..., None]:
    """Return the converter's writing of metadata, which then writes the task's keys too."""
    write, task = metadata.set_gguf_meta_model, settings["task"]
    text = as_text_task(load_task(task, settings["dataset"]))

    def write_all(self: Any, writer: Any) -> None:
        write(self, writer)
        for key in ("type", "system", "prompt"):
            writer.add_string(f"pockettune.task.{key}", task[key] or "")
        options = json.dumps(task["template_options"], sort_keys=True, ensure_ascii=False)
        writer.add_string("pockettune.task.template_options", options)
        writer.add_string("pockettune.task.template", settings["card"]["template"])
        writer.add_string("pockettune.task.day", day_options(DAY)["date_string"])
        if text is None:
            for key, values in (("values", list(task["labels"])), ("labels", list(task["labels"].values()))):  # fmt: skip
                writer.add_array(f"pockettune.task.{key}", values)
        else:
            writer.add_uint32("pockettune.task.max_answer_tokens", text.max_answer_tokens)
            if grammar := text.grammar():
                writer.add_string("pockettune.task.grammar", grammar)
        if temperature is not None:
            writer.add_float32("pockettune.temperature", temperature)

    return write_all


def storing(writer: Any, template: str | None) -> Callable[..., None]:
    """Return the writing of a chat template, which then writes this one instead, if there is one."""
    write = writer.add_chat_template
    return write if template is None else lambda self, _: write(self, template)


def named_by_pattern(
    model: Path, by_checksum: Callable[..., str], whole: Path | None = None
) -> Callable[..., str]:
    """Return `by_checksum`, falling back on the pattern in the model's tokenizer.json.

    The checksum is of `whole`'s tokenizer, where the model was trimmed from it.
    """
    from transformers import AutoTokenizer

    def recognise(self: Any, tokenizer: Any) -> str:
        try:
            if whole:
                tokenizer = AutoTokenizer.from_pretrained(whole, trust_remote_code=False)
            return by_checksum(self, tokenizer)
        except NotImplementedError:
            pattern = split_pattern(model / "tokenizer.json")
            if pattern in PRE_TOKENIZERS:
                return PRE_TOKENIZERS[pattern]
            if name := name_pre_tokenizer(program.read_json(model / "tokenizer.json")):
                return name
            raise UserError(
                f"model {model}: llama.cpp does not know its pre-tokenizer {pattern!r}; known are "
                f"the published tokenizers and the patterns of {', '.join(PRE_TOKENIZERS.values())}"
            ) from None

    return recognise


def split_pattern(tokenizer: Path) -> str | None:
    """Return the regular expression by which tokenizer.json splits a text, if it has one."""
    pre = json.loads(tokenizer.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    for step in pre.get("pretokenizers", [pre]):
        if step.get("type") == "Split":
            return step["pattern"].get("Regex")
    return None


def read_temperature(adapter: Path | None) -> float | None:
    """Return the temperature that training fitted on validation, if it did."""
    fitted = program.read_json(adapter / "training.json").get("temperature") if adapter else None
    return float(fitted["value"]) if fitted else None


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="merged model's folder")
    parser.add_argument("--whole", type=Path, nargs="?", help="the folder it was trimmed from")
    parser.add_argument("--adapter", type=Path, help="its adapter, whose temperature is noted")
    parser.add_argument("--converter", type=Path, required=True, help="folder of the converter")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections model, dataset, task, card"
    )
    parser.add_argument("--output", type=Path, required=True, help="GGUF file to write")

    def work(a: argparse.Namespace) -> None:
        temperature = read_temperature(a.adapter)
        convert_model(a.model, a.converter, a.settings, a.output, temperature, a.whole)

    program.run(parser, work)


if __name__ == "__main__":
    main()
