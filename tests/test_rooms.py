"""The packages of scripts/pockettune lie in layers: each imports from those below it only."""

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "scripts/pockettune"
# From the floor up. What the rules use (workflow) knows nothing of models.
LAYERS = ("common", "tasks", "data", "sources", "models", "gguf", "litert", "runtimes", "evaluation", "training",
          "parity", "phone")  # fmt: skip
ABOVE_COMMON = ("workflow",)
# What looks at a machine before a run asks all of them; none of them knows of it.
ABOVE_ALL = ("machine",)


def imported_rooms(path: Path) -> Iterator[str]:
    """Yield the packages of pockettune that a module imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pockettune" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                yield parts[1]


def allowed(room: str) -> set[str]:
    """Return the packages that a module of `room` may import from."""
    if room in ABOVE_COMMON:
        return {"common", room}
    if room in ABOVE_ALL:
        return {*LAYERS, *ABOVE_COMMON, room}
    return set(LAYERS[: LAYERS.index(room) + 1])


def test_every_room_is_in_a_layer() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == {*LAYERS, *ABOVE_COMMON, *ABOVE_ALL}
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_nothing_is_imported_upwards() -> None:
    faults = [
        f"{path.relative_to(PACKAGE)} imports from {other}"
        for path in PACKAGE.glob("*/*.py")
        for other in set(imported_rooms(path)) - allowed(path.parent.name)
    ]
    assert faults == []


def test_nothing_is_exported_twice() -> None:
    """A name has one address: a package's __init__ brings in nothing but what it registers."""
    inits = [path for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "tasks"]
    assert [path for path in inits if list(imported_rooms(path))] == []
