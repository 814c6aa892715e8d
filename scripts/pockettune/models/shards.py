"""Writes a model's weights file by file, so that no more than one file's are held in memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file

from pockettune.common import program
from pockettune.models.folder import INDEX, read_header, weight_files

SHARD = 2 * 10**9  # bytes of a file at most


@dataclass(frozen=True)
class Stored:
    """A tensor of a model folder: the file it lies in, its name there, and its shape."""

    path: Path
    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def load(self) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor


def list_stored(folder: Path) -> Iterator[Stored]:
    """Yield every tensor of a model folder's files."""
    for path in weight_files(folder):
        for name, entry in read_header(path).items():
            yield Stored(path, name, tuple(entry["shape"]))


def write_shards(
    tensors: Mapping[str, Stored], make: Callable[[str, Stored], torch.Tensor], output: Path
) -> None:
    """Write what `make` gives of each tensor, of 16 bits a number, under its name in `tensors`.

    One file, or several with an index where they are more than SHARD bytes.
    """
    shards = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: 2 * tensor.elements,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD,
    )
    output.mkdir(exist_ok=True)
    for file, names in shards.filename_to_tensors.items():
        made = {name: make(name, tensors[name]).contiguous() for name in names}
        save_file(made, output / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        program.write_json(output / INDEX, index)
