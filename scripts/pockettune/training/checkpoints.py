"""Keeps the state of a training where a killed run can go on from it.

Snakemake deletes the declared output of a job that failed, so checkpoints lie in a folder that no
rule declares. It is named by a digest of all that decides the weights: with another setting, another
row of the dataset or another line of the program a training begins anew.
"""

import hashlib
import json
import signal
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pockettune.common import program
from pockettune.common.checksums import sha256

if TYPE_CHECKING:
    import torch

FILE = "checkpoint.pt"


def digest(settings: Any, files: Iterable[Path]) -> str:
    """Return 16 hexadecimal digits that stand for the settings and the content of the files."""
    deciding = [json.dumps(settings, sort_keys=True), *(sha256(path) for path in files)]
    return hashlib.sha256("\n".join(deciding).encode()).hexdigest()[:16]


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state, complete or not at all, in place of the one before."""
    import torch

    with program.staged(folder / FILE) as partial:
        torch.save(state, partial)


def load_checkpoint(folder: Path, device: "torch.device | str") -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote there last, tensors on `device`; None if nothing."""
    import torch

    path = folder / FILE
    # weights_only: tensors, numbers and text, never code.
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


class StopRequest:
    """Notices Ctrl-C and SLURM's SIGTERM while its block runs, so that a loop can end in order."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._notice) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
