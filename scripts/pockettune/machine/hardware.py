"""GPU, processor, and whether the libraries that compute on them really do."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pockettune.common import limits
from pockettune.machine.findings import Finding, State, judge
from pockettune.machine.probe import Answer
from pockettune.machine.run import Run

CPUINFO = Path("/proc/cpuinfo")
# Of the product's norm. bitsandbytes computes in fp32 here, and on a GPU perhaps in TF32.
MATMUL_BOUND = 0.01
STORAGE_BOUND = 0.2  # NF4 of normal values: 0.09
# Of what PyTorch tells of a processor, what decides speed here.
SHOWN = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "sve", "bf16")  # fmt: skip
LATE = "run again with --seconds 60"


def check_cores(run: Run) -> list[Finding]:
    """Cores that are really usable."""
    cores = limits.count_cores()
    told = f"{cores.usable} of the machine's {cores.machine} usable"
    reasons = []
    if cores.affinity < cores.machine:
        reasons.append(f"this process may run on {cores.affinity}")
    if cores.quota and cores.quota < cores.machine:
        reasons.append(f"its control group gives it the time of {cores.quota:g}")
    fault = f"{told}: {' and '.join(reasons)}" if reasons else None
    return [
        judge(
            "cores",
            fault,
            told,
            f"snakemake --cores {cores.usable}: more would get in each other's way",
            "warning",
        )
    ]


def check_processor(run: Run) -> list[Finding]:
    """What the processor can do, and what that means for speed."""
    answer: Answer = run.facts["torch"]()
    if "cpu" not in answer.facts:
        return []  # check_gpu says why
    known: dict[str, Any] = answer.facts["cpu"]
    has = [name for name in SHOWN if known.get(name)]
    told = f"{known.get('architecture', 'processor')} with {', '.join(has) or 'none of the instructions that make it fast'}"
    if known.get("avx512_bf16") or known.get("amx_bf16"):
        return [Finding("processor", "ok", f"{told}: trains in bf16")]
    if answer.facts.get("device") == "cuda" or run.on_cluster:
        return [Finding("processor", "ok", told)]
    if known.get("architecture", "x86_64").startswith("x86") and not known.get("avx2"):
        return [
            Finding(
                "processor",
                "warning",
                f"{told}: no AVX2, everything takes several times as long",
                "a newer machine",
            )
        ]
    return [
        Finding(
            "processor",
            "ok",
            f"{told}: no bf16 instructions, so it trains in fp32, slower and in twice the memory",
        )
    ]


def check_gpu(run: Run) -> list[Finding]:
    """The GPU as the driver and as PyTorch see it."""
    answer: Answer = run.facts["torch"]()
    seen = ask_driver()
    if "device" not in answer.facts:
        remedy = LATE if answer.late else "`make setup`; pytorch.org has builds for other drivers"
        state: State = "warning" if answer.late or run.uses_conda else "problem"
        return [Finding("gpu", state, f"PyTorch: {answer.failure}", remedy)]
    facts, train = answer.facts, {} if run.config is None else run.settings["train"]
    build = f"PyTorch {facts['torch']}" + ("" if facts["cuda_build"] else ", a CPU build")
    if facts["gpus"]:
        cards = ", ".join(
            f"{card['name']}, {card['memory'] / 1e9:.0f} GB ({card['free'] / 1e9:.0f} free), compute capability"
            f" {card['capability']}, {'bf16' if card['bf16'] else 'no bf16: trains in fp16'}"
            for card in facts["gpus"]
        )  # fmt: skip
        return [
            Finding(
                "gpu",
                "ok",
                f"{cards}; {build}, CUDA {facts['cuda_build']}{f'; driver {seen[1]}' if seen else ''}",
            )
        ]
    if train.get("precision") == "fp16" and not run.on_cluster:
        return [
            Finding(
                "gpu",
                "problem",
                "train.precision fp16 needs a GPU, and there is none",
                "train.precision: auto",
            )
        ]
    if seen:
        why = (
            "has no CUDA"
            if not facts["cuda_build"]
            else f"with CUDA {facts['cuda_build']} cannot use it"
        )
        return [
            Finding(
                "gpu",
                "warning",
                f"{seen[0]} with driver {seen[1]} is here, but {build} {why}: the run would take the CPU",
                "take the PyTorch build for this driver from pytorch.org, or update the driver",
            )
        ]
    where = "training goes to the cluster" if run.on_cluster else "everything runs on the CPU"
    return [Finding("gpu", "ok", f"none here, {where}; {build}")]


def ask_driver() -> tuple[str, str] | None:
    """Return the first GPU's name and the driver's version; None without an NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, version = answer.stdout.partition("\n")[0].rpartition(", ")
    return (name, version) if name else None


def check_bitsandbytes(run: Run) -> list[Finding]:
    """Whether bitsandbytes multiplies, on the device that the run would use."""
    answer: Answer = run.facts["torch"]()
    if "device" not in answer.facts:
        return []
    wanted = (
        run.config is not None
        and run.settings["train"].get("quantization") == "nf4"
        and not run.settings["train"].get("adapter")
    )
    here = wanted and not (run.on_cluster or run.uses_conda)
    state: State = "problem" if here else "warning"
    remedy = (
        "train.quantization: none, or another version of bitsandbytes or of the driver"
        if here
        else "nothing, until train.quantization is nf4"
    )
    device, measured = answer.facts["device"], answer.facts.get("bitsandbytes")
    if measured is None:
        if answer.late:
            return [Finding("bitsandbytes", "warning", f"{answer.failure} on {device}", LATE)]
        return [
            Finding("bitsandbytes", state, f"does not work on {device}: {answer.failure}", remedy)
        ]
    bounds = {"matmul": MATMUL_BOUND, "storage": STORAGE_BOUND, "gradient": MATMUL_BOUND}
    wrong = [f"{name} off by {measured[name]:.2g} (allowed {bound})" for name, bound in bounds.items()
             if not measured[name] <= bound]  # fmt: skip
    fault = f"multiplies wrongly on {device}: {', '.join(wrong)}" if wrong else None
    return [
        judge(
            "bitsandbytes",
            fault,
            f"multiplies in 4 bits on {device}, within {measured['matmul']:.1g} of the dequantized product",
            remedy,
            state,
        )
    ]


def check_llama_cpp(run: Run) -> list[Finding]:
    """Whether llama.cpp loads, and was built for a processor such as this one."""
    answer: Answer = run.facts["llama_cpp"]()
    build = "build it here: `make setup`, or for several machines with CMAKE_ARGS=-DGGML_NATIVE=OFF, see docs/cluster.md"
    if "misfit" in answer.facts:
        return [Finding("llama.cpp", "problem", answer.facts["misfit"], build)]
    if "system" not in answer.facts:
        state: State = "warning" if answer.late or run.uses_conda else "problem"
        return [
            Finding(
                "llama.cpp",
                state,
                f"cannot be used: {answer.failure}",
                LATE if answer.late else build,
            )
        ]
    parts = [part.strip() for part in answer.facts["system"].split("|")]
    built = [
        part.partition(" = ")[0].rpartition(": ")[2] for part in parts if part.endswith(" = 1")
    ]
    unchecked = (
        ""
        if CPUINFO.exists() and sys.platform == "linux"
        else "; whether the processor has them is not known on this system"
    )
    return [
        Finding(
            "llama.cpp",
            "ok",
            f"llama-cpp-python {answer.facts['version']}, built with {', '.join(built)}{unchecked}",
        )
    ]
