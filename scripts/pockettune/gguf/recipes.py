"""Which tensors a recipe of `quantize:` names, by patterns of their names in the file."""

import re
from collections.abc import Mapping


def type_by_pattern(patterns: Mapping[str, str], name: str) -> str | None:
    """Return the type that patterns give the tensor of a name; None where none matches.

    Of several that match, the longest counts: the order of keys decides nothing in a config.
    """
    matching = [pattern for pattern in patterns if re.search(pattern, name)]
    longest = max(matching, key=lambda pattern: (len(pattern), pattern), default=None)
    return patterns[longest] if longest is not None else None
