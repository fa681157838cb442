"""The rooms' floors: a lower room never imports a higher one, nor one beside it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    "errors",
    "ranks",
    "files target",
    "arguments drafters",
    "convert.read",
    "convert demo",  # convert: with dialects and mtp
    "pairs loading",
    "doctor decode grammar watch",
    "generate",
    "measure",  # what its rooms share
    "measure.acceptance measure.inside measure.speed serve",
    "train",
    "cli public",
    "front __main__",  # mlx_drift/__init__.py: the public names, imported when asked for
]
"""From the ground up. Rooms of one floor do not know each other."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
SOURCES = {
    ".".join((*package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for folder, package in (
        (ROOT / "mlx_drift", ("mlx_drift",)),
        (ROOT / "convert", ("mlx_drift", "convert")),
    )
    for path in folder.rglob("*.py")
}


def room_of(module: str) -> str:
    """Names the room of a module: the longest of the table that it lies in."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOOR_OF), parts[0] if parts else "front")


def imports(source: str) -> Iterator[str]:
    """Names the modules of ours that a source imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written out in full here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in SOURCES else node.module for name in names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in found if name and name.split(".")[0] == "mlx_drift")


def turned_upward(module: str, source: str) -> list[str]:
    """Lists what a module imports of its own floor's other rooms, or from above."""
    own = room_of(module)
    others = {room_of(name) for name in imports(source)} - {own}
    return [f"{own} imports {o}" for o in sorted(others) if FLOOR_OF[o] >= FLOOR_OF[own]]


def test_every_room_has_a_floor():
    assert {room_of(module) for module in SOURCES} == {*FLOOR_OF}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_import_is_turned_upward(module):
    assert turned_upward(module, SOURCES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("mlx_drift.target.model", "from mlx_drift.drafters.chain import Network", "drafters"),
        ("mlx_drift.drafters.load", "def f():\n    import mlx_drift.decode.text", "decode"),
        ("mlx_drift.files.hub", "from mlx_drift.target.model import Target", "target"),
        ("mlx_drift.convert.read.stored", "from mlx_drift.convert import layers", "convert"),
        ("mlx_drift.generate", "from mlx_drift import DriftError", "front"),
    ],
)
def test_an_import_turned_upward_is_told(module, line, wrong):
    assert turned_upward(module, line) == [f"{room_of(module)} imports {wrong}"]
