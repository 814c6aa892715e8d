"""Export the merged model to a folder that ONNX Runtime and its apps load, with onnxruntime-genai's builder.

Input   a model folder; the recipe
Output  <variant>.onnx/: model.onnx and its weights, genai_config.json (stop tokens, greedy answers), the
        model's own tokenizer, the chat template of card.template, pockettune.json (task, recipe, the least
        version of ONNX Runtime)
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.common.extras import as_numbers, use_extra
from pockettune.common.formats import BITS
from pockettune.data.chat import end_of_answer
from pockettune.data.serving import context_tokens
from pockettune.data.task_template import find_frame, write_template
from pockettune.evaluation.metrics import provenance
from pockettune.models.folder import count_parameters, load_tokenizer
from pockettune.runtimes.onnx import (
    CHAT_TEMPLATE,
    CONFIG,
    MADE,
    WEIGHTS,
    import_genai,
    stop_tokens,
)
from pockettune.tasks import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The oldest ONNX Runtime that was seen to load what this exporter writes, of all types; 1.22.1 refuses it.
NEEDS = "1.23.2"
LEAST_CONTEXT = 1024


def export_onnx(settings: Mapping[str, Any], model: Path, threads: int, output: Path) -> None:
    """Write `model` by the recipe to the folder `output`."""
    recipe = settings["recipe"]
    torch.set_num_threads(threads)
    parameters = count_parameters(model)
    context = max(context_tokens(settings["tokenize"]["max_length"]), LEAST_CONTEXT)
    with program.staged(output, needed=parameters * BITS[recipe["type"]] // 8) as partial:
        build(model, recipe, context, partial)
        tokenizer = load_tokenizer(model)
        finish_config(partial, context, tokenizer)
        write_chat_template(tokenizer, settings, partial)
        shutil.copyfile(model / "tokenizer.json", partial / "tokenizer.json")
        program.write_json(partial / MADE, describe(settings, parameters))
        size = (partial / WEIGHTS).stat().st_size
    program.logger.info(
        "%s: %.1f MB, %.2f bits a weight", output, size / 1e6, 8 * size / parameters
    )


def build(model: Path, recipe: Mapping[str, Any], context: int, output: Path) -> None:
    """Run the builder in this process; what it prints goes into the log."""
    check_version()
    import_genai()
    cache = output / "cache"
    place = ("", str(model), str(output), recipe["type"], "cpu", str(cache))
    with printed_to_log():
        from onnxruntime_genai.models import builder

        try:
            options = builder.parse_extra_options(*place, builder_options(recipe))
            prepare(options["hf_details"]["hf_config"], context)
            with mock.patch.multiple(builder.Model, **mends(builder.Model)):
                builder.create_model(*place, **options)
        except (NotImplementedError, KeyError, AttributeError) as error:
            config = program.read_json(model / "config.json")
            raise UserError(
                f"model {model} ({', '.join(config.get('architectures') or ['unknown'])}):"
                f" onnxruntime-genai's exporter does not know it ({type(error).__name__}: {error}); take"
                " recipes of format gguf"
            ) from error
    shutil.rmtree(cache, ignore_errors=True)


def mends(builder: Any) -> dict[str, Any]:
    """Return what takes the place of methods of the builder (0.18.0), by their names."""
    return {
        "has_lm_head": is_head,
        "load_weights": in_full_precision(builder.load_weights),
        "make_tied_embeddings_init": share_int8(builder.make_tied_embeddings_init),
        "make_tied_quantized_embedding_input_names": name_int8(
            builder.make_tied_quantized_embedding_input_names
        ),
    }


def check_version() -> None:
    """Raise UserError where the ONNX Runtime that is here could not load what is made."""
    use_extra("onnx")
    found = version("onnxruntime")
    if as_numbers(found) < as_numbers(NEEDS):
        raise UserError(
            f"onnxruntime {found} is here, exporting needs {NEEDS} or newer: rm -r .packages/onnx && make onnx"
        )


def is_head(self: Any, module: torch.nn.Module) -> bool:
    """Whether a module is the output head, for the builder, which takes any matrix with as many rows.

    A vocabulary that was trimmed may have as many tokens as an MLP has rows.
    """
    return module is self.weights.get_output_embeddings()


def in_full_precision(load: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Return the builder's reader of weights, mended for Gemma.

    Gemma's norms multiply by 1 + weight. The builder adds the 1 in the file's FP16, where PyTorch adds it in
    fp32, and rounds the factor of embeddings, the root of their width, to two decimals.
    """

    def load_mended(self: Any, place: str) -> Any:
        model = load(self, place)
        if self.layernorm_attrs["add_offset"]:
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data = parameter.data.float()
        exact = math.sqrt(self.hidden_size)
        if self.embed_attrs["scale"] == round(exact, 2):
            self.embed_attrs["scale"] = exact
        return model

    return load_mended


def share_int8(tie: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Return the builder's choice of one matrix for embeddings and head, mended for int8.

    It makes the choice for int4 alone, and leaves int8 the table of embeddings in fp32 beside the head.
    """

    def tie_mended(self: Any, config: Any) -> None:
        tie(self, config)
        if self.extra_options["shared_embeddings"] and self.is_lm_head_quantized():
            self.tied_quantized_embeddings = True

    return tie_mended


def name_int8(names: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the builder's names of the shared matrix, mended for int8: it takes those of another algorithm."""

    def names_mended(self: Any) -> Any:
        bits, *others = names(self)
        if bits == 8 and self.quantization_algo == "default":
            others = ["lm_head.MatMul.weight_Q8", "lm_head.MatMul.weight_scales", ""]
        return bits, *others

    return names_mended


def builder_options(recipe: Mapping[str, Any]) -> list[str]:
    """Return the builder's options: nothing is asked of a hub, logits of the last token alone.

    Layers with a window (Gemma 2 and 3) keep all keys and values: a cache of the window's own size takes no
    empty past, and so no prompt in two parts.
    """
    options = ["hf_token=false", "prune_lm_head=true", "windowed_kv_cache=false"]
    if recipe["type"] != "fp32":
        options += [f"block_size={recipe['block']}", f"accuracy_level={recipe['accuracy_level']}"]
    if recipe.get("algorithm", "default") != "default":
        options.append(f"algo_config={recipe['algorithm']}")
    return options


def prepare(config: Any, context: int) -> None:
    """Mend a model's configuration, in place, where the builder misreads it.

    Gemma 3: transformers 5 keeps rotations by kind of layer, the builder (0.18.0) reads transformers
    4's layout. The tables of rotations are stored for every position that a model could ever take, 67 MB
    of Gemma 3's; those of `context` are enough for the task.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        rope = config.rope_parameters = dict(rope["full_attention"])
        config.rope_theta = rope["rope_theta"]
    if rope.get("rope_type") == "default":
        config.max_position_embeddings = min(config.max_position_embeddings, context)


def finish_config(folder: Path, context: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Have answers be the likeliest ones, in room for the task, and end where the task's do.

    onnxruntime-genai takes memory for all tokens at once. Of a base out of a GGUF file the builder knows
    eos_token alone, and Gemma ends an answer with another.
    """
    config = program.read_json(folder / CONFIG)
    config["search"] |= {
        "do_sample": False,
        "max_length": min(context, config["model"]["context_length"]),
    }
    config["model"]["eos_token_id"] = sorted({*stop_tokens(folder), end_of_answer(tokenizer)})
    program.write_json(folder / CONFIG, config)


def write_chat_template(
    tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any], output: Path
) -> None:
    """Write the chat template of card.template where onnxruntime-genai looks for it."""
    template = tokenizer.get_chat_template()
    if settings["card"]["template"] == "task":
        task = load_task(settings["task"], settings["dataset"])
        template = write_template(find_frame(tokenizer, task), has_replace=False)
    (output / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def describe(settings: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """Return what a folder says of itself beside what the apps read."""
    return {
        "task": settings["task"],
        "card": settings["card"],
        "recipe": settings["recipe"],
        "parameters": parameters,
        "needs": {"onnxruntime": NEEDS},
        "made_with": provenance("onnxruntime", "onnxruntime-genai", "torch", "transformers"),
    }


@contextmanager
def printed_to_log() -> Iterator[None]:
    """Send what a library prints to the log while the block runs, without its bars."""
    with redirect_stdout(_Lines()), redirect_stderr(_Lines()):
        yield


class _Lines:
    """A stream whose whole lines are logged; what is drawn over itself is not."""

    def __init__(self) -> None:
        self.open, self.logging = "", False

    def write(self, text: str) -> int:
        if self.logging:  # by a handler that a library has put onto this stream
            return len(text)
        *lines, self.open = (self.open + text).split("\n")
        self.logging = True
        for line in lines:
            if line.strip() and "\r" not in line:
                logging.getLogger("onnxruntime_genai").info(line)
        self.logging = False
        return len(text)

    def flush(self) -> None:
        pass


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True,
        help="recipe; sections task, dataset, tokenize, card",
    )  # fmt: skip
    parser.add_argument("--model", type=Path, required=True, help="merged model's folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    program.run(parser, lambda a: export_onnx(a.settings, a.model, a.threads, a.output))


if __name__ == "__main__":
    main()
