"""Packages import downwards only, no modules import each other in a circle, no name hides a module, no file is long."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rpqfx

PACKAGE = Path(rpqfx.__file__).parent
ROOTS = (PACKAGE, PACKAGE.parent)

# What stands at the top of the package, from the top down; CONTRIBUTING.md says what is in each.
ORDER = (
    "__main__", "integrations", "distributed", "training", "conversion", "storage", "routing", "kv", "timing", "graph",
    "reporting", "policies", "nn", "fit", "ops", "codebook", "validation", "errors",
)  # fmt: skip
AT_MOST = 20  # entries that a newcomer has to look through
LINES = 300  # of a file; a longer one holds a second idea


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules that a tree imports, also within functions, but for those that only a type checker imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module
        else:
            yield from imported(node, known)


def arrows() -> dict[str, set[str]]:
    known = set(MODULES)
    found = {name: set(imported(ast.parse(path.read_text()), known)) & known for name, path in MODULES.items()}
    return {name: uses - {"rpqfx", name} for name, uses in found.items() if name != "rpqfx"}


def upward(found: dict[str, set[str]]) -> list[str]:
    """The imports that lead from a package to one that stands above it."""
    place = {name: number for number, name in enumerate(ORDER)}
    return [
        f"{name} imports {used}"
        for name, uses in sorted(found.items())
        for used in sorted(uses)
        if place[name.split(".")[1]] > place[used.split(".")[1]]
    ]


def test_the_order_names_all_that_stands_at_the_top() -> None:
    here = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert here - {"__init__"} == set(ORDER)
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= AT_MOST


def test_imports_go_down_only() -> None:
    assert upward(arrows()) == []


def test_a_module_that_imports_what_stands_above_it_is_found() -> None:
    found = {"rpqfx.nn.linear": {"rpqfx.kv.policy", "rpqfx.codebook.matrix"}, "rpqfx.kv.policy": {"rpqfx.kv.rewrite"}}
    assert upward(found) == ["rpqfx.nn.linear imports rpqfx.kv.policy"]
    tree = ast.parse("if TYPE_CHECKING:\n    import rpqfx.a\ndef f():\n    from rpqfx import b\n    import rpqfx.c\n")
    assert set(imported(tree, {"rpqfx.a", "rpqfx.b", "rpqfx.c"})) == {"rpqfx.b", "rpqfx.c"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = arrows()
    # Importing a module runs the package it is in first; what the package's own file imports is its business.
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_no_file_is_longer_than_one_idea() -> None:
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    lengths = {path.name: len(path.read_text().splitlines()) for path in sources}
    assert {name: count for name, count in lengths.items() if count > LINES} == {}


@pytest.mark.parametrize("package", sorted(name for name, path in MODULES.items() if path.name == "__init__.py"))
def test_no_name_hides_a_module(package: str) -> None:
    found = importlib.import_module(package)
    inside = {info.name for info in pkgutil.iter_modules(found.__path__)}
    hidden = [name for name in inside if not isinstance(getattr(found, name, found), type(found))]
    assert hidden == []


def test_the_map_of_the_house_names_what_is_there() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    text = text[text.index("## The house") : text.index("## Style")]
    packages = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert packages == list(ORDER[1:])
    files = re.findall(r"`([\w/]+\.py)`", text)
    assert len(files) > 20 and [name for name in files if not any((root / name).is_file() for root in ROOTS)] == []
