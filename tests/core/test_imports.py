"""Who may import whom: the storeys of truepose_core, its nodes, and what knows ComfyUI."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STOREYS = (
    {"errors"},
    {"json_text", "regions", "pictures", "weights", "networks", "workers"},
    {"pose", "attention"},
    {"parsing", "mannequin"},
    {"body", "framing"},
    {"source", "alignment"},
    {"guidance"},
    {"models"},
    {"importing", "pipeline", "benchmark", "datasets"},
    {"training"},
    {"evaluation"},
    {"cli"},
)
"""The rooms of truepose_core, the lowest storey first. A room imports from storeys below, and from its own."""
NOT_FOR_NODES = {"cli", "training", "evaluation", "datasets", "workers"}


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, at its top or later. A relative import gets its full name."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The room of truepose_core that a dotted name is in."""
    parts = name.split(".")
    return parts[1] if parts[0] == "truepose_core" and len(parts) > 1 and not parts[1].startswith("__") else None


def arrows() -> dict[tuple[str, str], set[str]]:
    """(room, room it imports from) -> the files that do."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in files("truepose_core"):
        at = path.relative_to(ROOT / "truepose_core")
        for to in map(room, imported(path)):
            if to is not None and to != at.parts[0].removesuffix(".py"):
                found.setdefault((at.parts[0].removesuffix(".py"), to), set()).add(str(at))
    return found


def test_every_room_has_a_storey():
    there = {p.stem for p in (ROOT / "truepose_core").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__"} == set().union(*STOREYS)


def test_no_room_imports_from_a_storey_above():
    storey = {name: number for number, names in enumerate(STOREYS) for name in names}
    assert {pair: who for pair, who in arrows().items() if storey[pair[1]] > storey[pair[0]]} == {}


def test_rooms_import_each_other_in_no_circle():
    needs: dict[str, set[str]] = {}
    for user, used in arrows():
        needs.setdefault(user, set()).add(used)
    assert set(TopologicalSorter(needs).static_order()) == set().union(*STOREYS)


@pytest.mark.parametrize("path", files("nodes"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_host_room_knows_the_host(path):
    inside = path.is_relative_to(ROOT / "nodes" / "host")
    for name in imported(path):
        top = name.split(".")[0]
        assert inside or not top.startswith("comfy") or top == "comfy_api", name
        assert room(name) not in NOT_FOR_NODES, name
        # The host's room serves the nodes and knows none of them.
        assert not (inside and name.startswith("nodes.")) or name.startswith("nodes.host."), name


@pytest.mark.parametrize("path", files("truepose_core"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_core_names_neither_nodes_nor_the_host(path):
    for name in imported(path):
        assert name.split(".")[0] not in ("nodes", "pack") and not name.startswith("comfy"), name
