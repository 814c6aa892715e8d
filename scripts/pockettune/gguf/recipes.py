"""Which tensors a recipe of `quantize:` names, by patterns of their names in the file."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pockettune.common.errors import UserError, list_faults

if TYPE_CHECKING:  # the doctor reads recipes before there are packages
    from pockettune.gguf.files import Tensor

# Of a type that rows cannot hold.
REMEDY = "take one of blocks of 32 (Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1, Q8_0), or leave the choice to the recipe"


def type_by_pattern(patterns: Mapping[str, str], name: str) -> str | None:
    """Return the type that patterns give the tensor of a name; None where none matches.

    Of several that match, the longest counts: the order of keys decides nothing in a config.
    """
    matching = [pattern for pattern in patterns if re.search(pattern, name)]
    longest = max(matching, key=lambda pattern: (len(pattern), pattern), default=None)
    return patterns[longest] if longest is not None else None


def choose_types(patterns: Mapping[str, str], tensors: "Sequence[Tensor]") -> dict[str, str]:
    """Return the type of each matrix whose name holds one of the patterns, by its name.

    Raises UserError naming the patterns that no matrix's name holds.
    """
    matrices = [tensor.name for tensor in tensors if len(tensor.shape) > 1]
    chosen = {name: type_by_pattern(patterns, name) for name in matrices}
    if idle := [p for p in patterns if not any(re.search(p, name) for name in matrices)]:
        known = sorted({re.sub(r"blk\.\d+\.", "", name) for name in matrices})
        raise UserError(
            f"quantize: tensors: no matrix's name holds {list_faults(idle)}; names are"
            f" {', '.join(known)}, with blk.<layer>. before those of a layer"
        )
    return {name: kind for name, kind in chosen.items() if kind}
