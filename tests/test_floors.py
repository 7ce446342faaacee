"""The import graph has floors: a file imports only from the floors below its own, or from its own package."""

import ast
from pathlib import Path

import pytest

import gradwatch

ROOT = Path(gradwatch.__file__).parent
FLOORS = [
    {
        "errors",
        "records",
        "requests",
        "protocols",
        "_adopt",
        "_closing",
        "_address",
        "_lazy",
        "_markup",
        "_places",
        "_text",
        "_uncopied",
        "_version",
        "_warn",
    },
    {"torchside"},
    {"stats", "samples"},
    {"hooks", "rules", "treatments", "sinks", "precision", "attention"},
    {"notebook"},
    {"watch", "book", "runs"},
    {"report", "_preflight", "ahead"},
    {"trials"},
    {"callbacks", "testing"},
    {"cli", "__init__"},
    {"__main__"},
]
FLOOR_OF = {name: height for height, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))
# Pairs that may meet all the same: the engine reads rules files through the book, replay judges with it, and the door
# `Watch.report` opens the report when asked to; `what_if=True` tries the training again at an incident.
NEIGHBOURS = {("watch", "book"), ("runs", "book"), ("watch", "report"), ("watch", "trials")}


def unit(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_units(file: Path, source: str | None = None) -> set[str]:
    """Units of gradwatch that a file imports, relative or absolute; TYPE_CHECKING blocks count too."""
    depth = len(file.relative_to(ROOT).parts)
    units = set()
    for node in ast.walk(ast.parse(file.read_text() if source is None else source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("gradwatch."):
            names = [str(node.module).removeprefix("gradwatch.")]
        elif isinstance(node, ast.Import):
            names = [a.name.removeprefix("gradwatch.") for a in node.names if a.name.startswith("gradwatch.")]
        units |= {name.split(".")[0] for name in names}
    return units - {unit(file)}


def units_above(file: Path, source: str | None = None) -> set[str]:
    mine = unit(file)
    return {
        u
        for u in imported_units(file, source)
        if FLOOR_OF.get(u, -1) >= FLOOR_OF[mine] > 0 and (mine, u) not in NEIGHBOURS and mine != "__init__"
    }


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_file_imports_only_lower_floors(file: Path) -> None:
    above = units_above(file)
    assert not above, f"{unit(file)} is on floor {FLOOR_OF[unit(file)]} and imports {sorted(above)}"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        pytest.param("stats/x.py", "from ..rules import Exploding", id="relative"),
        pytest.param("rules/x.py", "from gradwatch.treatments import Scale", id="absolute"),
        pytest.param("rules/x.py", "import gradwatch.hooks", id="plain-import"),
        pytest.param("hooks/x.py", "if True:\n    from .. import sinks", id="package-name"),
    ],
)
def test_floor_check_can_fail(file: str, source: str) -> None:
    assert units_above(ROOT / file, source)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_rules_and_floor_zero_do_without_torch(file: Path) -> None:
    if unit(file) not in FLOORS[0] | {"rules"}:
        return
    roots = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            roots |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(str(node.module).split(".")[0])
    assert "torch" not in roots
