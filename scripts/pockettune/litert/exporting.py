"""Runs litert-torch's exporter on a model folder: one float .tflite file."""

import os
import sys
import types
from pathlib import Path

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.common.extras import use_extra
from pockettune.common.native import run_library

# Tokens that a prompt is computed in at a time. One length: each would be a graph of its own, and a
# quantized table is stored once for each graph that looks tokens up in it otherwise than the head reads it.
PREFILL = 64

# Modules of litert-torch that make images. One imports TensorFlow, which the package does not ask for and
# nothing here needs; the other builds on it.
IMAGE_MODELS = ("bonsai_flux2", "flux2_klein")


def import_exporter() -> types.ModuleType:
    """Import litert_torch.generative.export_hf.export, without its models that make images.

    litert-torch 0.10.0 imports all its models at once. Empty modules in these two's place are never used:
    the exporter looks into them only when it is asked for such a model.
    """
    use_extra("litert")
    for name in IMAGE_MODELS:
        path = f"litert_torch.generative.export_hf.model_ext.{name}.{name}"
        sys.modules.setdefault(path, types.ModuleType(path, "left out by PocketTune"))
    from litert_torch.generative.export_hf import export

    return export


def export_float(model: Path, capacity: int, threads: int, needed: int, output: Path) -> None:
    """Write a model folder as a float .tflite file for conversations of `capacity` tokens.

    `needed` bytes of disk it takes at least. In a process of its own, which LLVM ends where it can go no
    further, at a full disk among others; UserError or DiskFullError then.
    """
    # Nothing is fetched: the folder has all.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with program.staged(output, needed) as partial:
        partial.mkdir()  # it writes more than the file
        run_library("litert-torch", f"model {model}", partial, run_exporter, model, capacity, threads, partial)  # fmt: skip
        # A name that the next `staged` clears too, should this process be killed here.
        made = (partial / "model.tflite").rename(partial.with_suffix(".file.partial"))
        program.remove(partial)
        made.rename(partial)


def run_exporter(model: Path, capacity: int, threads: int, work: Path) -> None:
    """Have litert-torch write model.tflite into the folder `work`."""
    import torch

    torch.set_num_threads(threads)
    try:
        import_exporter().export(
            str(model),
            str(work),
            task="text_generation",
            prefill_lengths=[PREFILL],
            cache_length=capacity,
            quantization_recipe="none",
            bundle_litert_lm=False,
            keep_temporary_files=True,
        )
    except NotImplementedError as error:
        raise UserError(f"model {model}: litert-torch cannot export it: {error}") from error
