"""Add an adapter's weights to the 16-bit base model.

The base is always the 16-bit original, also after QLoRA: merging Qwen2.5-0.5B onto the
dequantized NF4 base raised its perplexity by a fifth (unsloth-zoo, pull request 810).

Input   the base model; a PEFT adapter folder
Output  a model folder: FP16 safetensors, the base's tokenizer files unchanged
"""

import argparse
from pathlib import Path

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.models.folder import (
    copy_tokenizer,
    count_parameters,
    embedding_shape,
    tensor_shapes,
)
from pockettune.models.merging import write_merged
from pockettune.runtimes.memory import memory_hint

# What transformers leaves out of the config.json it saves and llama.cpp's converter asks for.
CARRIED = ("n_ctx", "rotary_pct")  # GPT-2; GPT-NeoX, Cohere 2

LESS_MEMORY = "merging takes about 3 GB: run it where they are free"


def merge_adapter(base: Path, adapter: Path, output: Path) -> None:
    """Merge in fp32, round once to fp16, and write the model folder."""
    needed = 2 * count_parameters(base)  # the tokenizer comes on top
    with program.staged(output, needed) as partial, memory_hint(LESS_MEMORY):
        try:
            parameters = write_merged(base, adapter, partial)
        except ValueError as error:  # NaN in the adapter, or layers that the base has not
            raise UserError(f"adapter {adapter} cannot be merged onto {base}: {error}") from error
        carry_config(base, partial)
        copy_tokenizer(base, partial)
        check_shape(base, partial)
    program.logger.info("merged model of %s parameters in %s", f"{parameters:,}", output)


def carry_config(base: Path, merged: Path) -> None:
    """Put back into the merged config.json what of the base's the converter needs."""
    before = program.read_json(base / "config.json")
    after = program.read_json(merged / "config.json")
    carried = {key: before[key] for key in CARRIED if key in before and key not in after}
    if carried:
        program.write_json(merged / "config.json", after | carried)


def check_shape(base: Path, merged: Path) -> None:
    """Raise UserError where merging untied or resized the embedding.

    A tied model that is saved with a head of its own grows by the size of its embedding: 272 MB
    of Qwen2.5-0.5B.
    """
    before, after = tensor_shapes(base), tensor_shapes(merged)
    old, new = embedding_shape(before), embedding_shape(after)
    if old != new:
        raise UserError(
            f"merging changed the embedding from {old} to {new}:"
            " the adapter resized the vocabulary; train it without new tokens"
        )
    # Some bases leave out the name of the block around all layers (GPT-2: wte, not transformer.wte).
    known = tuple(f".{name}" for name in before)
    if added := sorted(n for n in after.keys() - before.keys() if not n.endswith(known)):
        raise UserError(f"merging added {', '.join(added)}: the adapter untied the embedding")


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument("--adapter", type=Path, required=True, help="PEFT adapter folder")
    parser.add_argument("--output", type=Path, required=True, help="model folder to make")

    def work(arguments: argparse.Namespace) -> None:
        merge_adapter(arguments.base, arguments.adapter, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
