"""Asks a library what it can do, in a process of its own: one that crashes takes nothing with it.

    python -m pockettune.machine.probe torch

Prints a JSON object a line, each as soon as it is known: what was told before a crash counts.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2]
MARK = "pockettune "  # before each line of ours, since libraries print too


@dataclass(frozen=True)
class Answer:
    """What a library told, and why it told no more."""

    facts: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    late: bool = False  # it had not ended in its time, which says nothing of it


def ask(topic: str, arguments: Sequence[str | Path], end: float) -> Answer:
    """Ask in a new process, until `end` of time.monotonic()."""
    command = [
        sys.executable,
        "-B",
        "-P",
        "-m",
        "pockettune.machine.probe",
        topic,
        *map(str, arguments),
    ]
    known = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SCRIPTS), *([known] if known else [])]),
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment,
            stdin=subprocess.DEVNULL, timeout=max(end - time.monotonic(), 0.1),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        told = error.stdout if isinstance(error.stdout, bytes) else b""
        return Answer(_read(told.decode("utf-8", "replace")), "did not answer in time", late=True)
    return Answer(_read(done.stdout), _failure(done.returncode, done.stderr))


def _read(output: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith(MARK):
            facts |= json.loads(line.removeprefix(MARK))
    return facts


def _failure(status: int, errors: str) -> str | None:
    if status == 0:
        return None
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"the process ended with status {status}"


def tell(**facts: Any) -> None:
    """Print facts, at once."""
    print(MARK + json.dumps(facts), flush=True)


def tell_torch() -> None:
    """Tell of PyTorch and its device; then, since that may crash, of bitsandbytes."""
    import torch

    tell(
        torch=torch.__version__,
        cuda_build=torch.version.cuda,
        cpu=dict(torch.cpu.get_capabilities()),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = []
    for number in range(torch.cuda.device_count() if device == "cuda" else 0):
        card = torch.cuda.get_device_properties(number)
        gpus.append({
            "name": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}",
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "free": torch.cuda.mem_get_info(number)[0],
        })  # fmt: skip
    tell(device=device, gpus=gpus)
    tell(bitsandbytes=None)
    tell(bitsandbytes=multiply_in_four_bits(device))


def multiply_in_four_bits(device: str) -> dict[str, float]:
    """Multiply by a matrix in NF4, forward and back; return how far off that is, as shares.

    matmul: from the product with the dequantized matrix; storage: the dequantized matrix from the
    original, which NF4 keeps to about a tenth; gradient: as matmul, of the way back.
    """
    import bitsandbytes
    import torch
    from bitsandbytes import functional

    torch.manual_seed(0)
    inputs = torch.randn(4, 256, device=device, requires_grad=True)
    weight = torch.randn(128, 256, device=device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    restored = functional.dequantize_4bit(packed, state)
    product = bitsandbytes.matmul_4bit(inputs, packed.t(), state)
    product.sum().backward()
    assert inputs.grad is not None, "training through the matrix needs a gradient"

    def distance(found: "torch.Tensor", expected: "torch.Tensor") -> float:
        return float((found - expected).norm() / expected.norm())

    return {
        "matmul": distance(product.detach(), inputs.detach() @ restored.t()),
        "storage": distance(restored, weight),
        "gradient": distance(inputs.grad, restored.sum(0).expand_as(inputs)),
    }


def tell_llama_cpp() -> None:
    """Tell whether llama.cpp loads and fits the processor, and what it was built for.

    The first functions called hold no instruction that an old processor lacks (runtimes/processor).
    """
    import llama_cpp

    tell(version=llama_cpp.__version__)
    from pockettune.common.errors import UserError
    from pockettune.runtimes.processor import check_processor

    try:
        check_processor()
    except UserError as error:
        tell(misfit=str(error))
        return
    tell(system=llama_cpp.llama_print_system_info().decode())


def tell_tokenizer(model: Path, converter: Path) -> None:
    """Tell by what name llama.cpp's converter knows a model's tokenizer, as convert_model.py asks."""
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import conversion.base  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    from convert_model import named_by_pattern  # a program's: what convert will ask
    from pockettune.common.errors import UserError

    text_model = conversion.base.TextModel
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    if (model / "tokenizer.model").exists() and not (model / "tokenizer.json").exists():
        tell(name="sentencepiece")
        return
    try:
        tell(name=named_by_pattern(model, text_model.get_vocab_base_pre)(None, tokenizer))
    except UserError as error:
        tell(unknown=str(error))


TOPICS: dict[str, Callable[..., None]] = {
    "torch": tell_torch,
    "llama_cpp": tell_llama_cpp,
    "tokenizer": tell_tokenizer,
}

if __name__ == "__main__":
    TOPICS[sys.argv[1]](*map(Path, sys.argv[2:]))
