"""Make the base model's folder of a GGUF file, and check it against that file in llama.cpp.

The weights are dequantized and stored as F16; what the quantization lost stays lost. Before the
folder is accepted, its token ids, special tokens, chat template and logits are compared with what
llama.cpp makes of the file.

Input   a GGUF file; a chat template, for a file that has none
Output  a folder as fetch_model.py makes it: config.json, model.safetensors, the tokenizer's files,
        and source.json, which also says what the file was
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from safetensors.torch import save_file

from pockettune.common import program
from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError, list_faults
from pockettune.data.prompts import encode
from pockettune.data.trial_texts import HARD_TEXTS
from pockettune.gguf.dequantize import Source, file_type, make_config, open_source, read_weights
from pockettune.gguf.files import describe_file
from pockettune.gguf.tokenizer import write_tokenizer
from pockettune.models.folder import check_model_folder, load_tokenizer
from pockettune.parity import computed, stored
from pockettune.parity.results import Result
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.llama import LlamaModel, start_backend

# Both bounds are in spreads, the standard deviation of a prompt's logits, over the whole vocabulary.
#
# llama.cpp rounds activations to 8 bits before it multiplies them with a quantized matrix. Measured
# on SmolLM2-135M: Q8_0 0.29, Q4_K_M 0.45, Q4_0 0.39, Q4_1 and IQ4_NL 0.32 (F16 0.011); on Gemma 3
# 270M: Q8_0 0.51, Q4_K_M 0.88, Q4_0 0.81, IQ4_NL 0.61, Q3_K_M 0.58 (F16 0.018). Wrong on purpose: q
# and k not put back 6.6, norms not shifted 6.2, rope of another base 2.4 and 3.2, two layers swapped
# 2.0 to 9.6. So this bound tells a wrong import, not a slip.
QUANTIZED_BOUND = 2.0
# Of the F16 file that llama.cpp itself makes of it, only rounding is left: at most 0.019 for all of
# those. Wrong on purpose: what the first bound finds, 2.0 to 9.6; norms of two layers swapped 0.51
# and 4.6; a rope base of 130,000 instead of 100,000 0.21; a window half as wide 0.34; the norms'
# epsilon ten times as large 0.53 in Gemma (and nothing, 0.01, in SmolLM2).
DEQUANTIZED_BOUND = 0.1
BEYOND_WINDOW = 64  # tokens by which the longest prompt exceeds a model's attention window
LONG_PROMPT = 512  # tokens, where a model has no window


def import_gguf(model: Mapping[str, Any], threads: int, output: Path) -> None:
    """Write `model.path` as a model folder, if what it computes is what the file does."""
    torch.set_num_threads(threads)
    path = Path(model["path"])
    source = open_source(path)
    template = find_template(source, model.get("chat_template"))
    config = make_config(source)
    # The weights, and for the check llama.cpp's F16 of the same file.
    needed = 2 * 2 * sum(tensor.elements for tensor in source.tensors.values())
    with program.staged(output, needed) as partial:
        partial.mkdir()
        config.save_pretrained(partial)
        write_tokenizer(source.metadata, template, path.name, partial)
        save_file(read_weights(source, config), partial / "model.safetensors", {"format": "pt"})
        check_model_folder(partial)
        checks = check_import(source, partial, threads, model.get("chat_template") is None)
        told = {
            "file": path.name,
            "sha256": sha256(path),
            "type": file_type(source),
            "bits_per_weight": describe_file(path)["bits_per_weight"],
            "checks": checks,
        }
        checksums = {"model.safetensors": sha256(partial / "model.safetensors")}
        program.write_json(
            partial / "source.json", {"origin": path.name, "sha256": checksums, "gguf": told}
        )
    program.logger.info(
        "model of %s in %s: %s, %.2f bits a weight; %s",
        path.name, output, told["type"], told["bits_per_weight"],
        "; ".join(f"{check['name']}: {check['detail']}" for check in checks),
    )  # fmt: skip


def find_template(source: Source, own: str | None) -> str:
    """Return the chat template that config.yaml gives, else the file's."""
    if own:
        return Path(own).read_text(encoding="utf-8")
    if template := source.metadata.get("tokenizer.chat_template"):
        return str(template)
    raise UserError(
        f"model.path {source.path.name}: the file has no chat template, so it is a base model's: take"
        " the Instruct version, or give a template of your own: model.chat_template: my.jinja"
    )


def check_import(source: Source, folder: Path, threads: int, own_template: bool) -> list[Result]:
    """Compare the folder in PyTorch with the file in llama.cpp; UserError names what differs."""
    tokenizer = load_tokenizer(folder)
    prompts = list(make_prompts(tokenizer, source))
    with LlamaModel(source.path, threads) as llama:
        checks = [
            stored.check_made_up(llama, tokenizer),
            stored.check_special_tokens(llama, tokenizer, []),
            *([stored.check_chat_template(llama, tokenizer)] if own_template else []),
        ]
        found = computed.logits_of_llama(llama, prompts)
    expected = logits_of_folder(folder, prompts)
    checks.append(compare("logits", found, expected, QUANTIZED_BOUND))
    found = logits_dequantized(source.path, folder / "f16.gguf", prompts, threads)
    checks.append(compare("dequantized logits", found, expected, DEQUANTIZED_BOUND))
    # The causes that the gate names are a conversion's.
    faults = [f"{check['name']}: {check['detail'].split('; cause: ')[0]}"
              for check in checks if not check["passed"]]  # fmt: skip
    if faults:
        raise UserError(
            f"model.path {source.path.name}: the folder made of it is not what the file is in"
            f" llama.cpp: {list_faults(faults)}; take the model's safetensors folder"
        )
    return checks


def make_prompts(tokenizer: Any, source: Source) -> Iterator[list[int]]:
    """Yield the hard texts as a user's words, and a prompt longer than the model's window."""
    everything: list[int] = []
    for text in HARD_TEXTS:
        talk = [{"role": "user", "content": text}]
        prompt = encode(tokenizer, stored.render(tokenizer, talk, None))
        everything += prompt
        yield prompt
    window = source.get("attention.sliding_window") or LONG_PROMPT
    length = min(window + BEYOND_WINDOW, source.get("context_length"))
    yield (everything * (length // len(everything) + 1))[:length]


def logits_of_folder(folder: Path, prompts: Sequence[list[int]]) -> np.ndarray:
    """Return the logits behind each prompt in PyTorch, in fp32: (prompts, vocabulary).

    One prompt at a time, with transformers' own attention, because packed sequences do not support
    a window shorter than a prompt.
    """
    model = load_exact(folder, attention="eager")
    with torch.inference_mode():
        rows = [
            model(input_ids=torch.tensor([prompt]), logits_to_keep=1, use_cache=False).logits[0, -1]
            for prompt in program.progress(prompts, description="Checking", unit="prompts", total=len(prompts))
        ]  # fmt: skip
    return torch.stack(rows).numpy()


def logits_dequantized(
    path: Path, copy: Path, prompts: Sequence[list[int]], threads: int
) -> np.ndarray:
    """Return the logits in llama.cpp of the file that llama.cpp itself dequantizes to F16."""
    start_backend()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_F16
    parameters.allow_requantize = True
    parameters.nthread = threads
    if llama_cpp.llama_model_quantize(os.fsencode(path), os.fsencode(copy), parameters):
        raise UserError(
            f"{path.name}: llama.cpp cannot dequantize it; its own words are in the log"
        )
    try:
        with LlamaModel(copy, threads) as llama:
            return computed.logits_of_llama(llama, prompts)
    finally:
        copy.unlink()


def compare(name: str, found: np.ndarray, expected: np.ndarray, bound: float) -> Result:
    """Compare logits over the whole vocabulary, all of whose tokens count as answers."""
    faults, numbers = computed.compare_logits(found, expected, range(expected.shape[1]), bound)
    detail = list_faults(faults) if faults else computed.describe(numbers)
    told = detail.replace("an answer's logit", "a logit").replace("answers' logits", "logits")
    return {"name": name, "passed": not faults, "detail": told, **numbers}


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--settings", type=json.loads, required=True, help="section model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="model folder to make")

    def work(arguments: argparse.Namespace) -> None:
        import_gguf(arguments.settings["model"], arguments.threads, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
