"""Whether a float .tflite file holds the model folder's matrices, each in its layer."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open

from pockettune.litert.files import digest, read_weights
from pockettune.models.folder import read_header, weight_files
from pockettune.parity.exported import make_result
from pockettune.parity.results import Result


def check_tensors(tflite: Path, model: Path) -> Result:
    """Find every matrix of the model folder in the file, the same numbers in the same layer."""
    stored: dict[bytes, set[int | None]] = {}
    for weight in read_weights(tflite):
        stored.setdefault(digest(weight.data), set()).add(weight.layer)
    faults, count = [], 0
    for name, layer, matrix in matrices(model):
        count += 1
        places = stored.get(digest(matrix))
        if places is None:
            faults.append(f"{name} is not in the file")
        elif layer is not None and places.isdisjoint({layer, None}):
            faults.append(f"{name} stands in layer {min(p for p in places if p is not None)}")
    detail = f"{count} matrices in their place, as they are"
    return make_result("tensors", faults, detail, matrices=count)


def matrices(model: Path) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yield name, layer and values in fp32 of each matrix that a model folder stores."""
    for path in weight_files(model):
        names = [name for name, entry in read_header(path).items() if len(entry["shape"]) == 2]
        with safe_open(path, "pt") as file:
            for name in names:
                parts = name.split(".")
                layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
                yield name, layer, file.get_tensor(name).float().numpy()
