"""Finds the project's own modules that a program imports.

Snakemake compares a rule's inputs by content and knows nothing of imports. With the modules among
the inputs, an edited line reruns the rules that use it and no others.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path


def imported_files(program: Path, root: Path) -> list[Path]:
    """Return the files below `root` that `program` imports, directly or not, sorted.

    Reads the source without running it, so imports inside functions count too.
    """
    found: set[Path] = set()
    open_files = [program]
    while open_files:
        for path in _imports_of(open_files.pop(), root):
            if path not in found:
                found.add(path)
                open_files.append(path)
    return sorted(found - {program})


@functools.cache  # twenty rules ask for the same modules, and a sweep has many runs of them
def _imports_of(path: Path, root: Path) -> tuple[Path, ...]:
    return tuple(_read_imports(path, root))


def _read_imports(path: Path, root: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files_of(alias.name, root)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from _files_of(node.module, root)
            for alias in node.names:  # a name may be a module of its own
                yield from _files_of(f"{node.module}.{alias.name}", root)


def _files_of(name: str, root: Path) -> Iterator[Path]:
    """Yield the files that importing the dotted `name` runs: its packages and itself."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:length])
        for candidate in (base / "__init__.py", base.with_suffix(".py")):
            if candidate.is_file():
                yield candidate
