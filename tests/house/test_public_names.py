"""Programs outside of the package use its public names alone, and the package uses none of the programs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path for folder in ("examples", "experiments") for path in (ROOT / folder).rglob("*.py"))
SOURCE = [*(ROOT / "src").rglob("*.py"), *(ROOT / "conversion").rglob("*.py")]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_program_imports_public_names(path):
    """Those that a module defines itself or lists in `__all__`: a name that moved or is private is found here."""
    tree = ast.parse(path.read_text())
    ours = [(module, name) for module, name, _ in imports(tree) if module.split(".")[0] == "nemotron_h_hf"]
    hidden = [f"{module}.{name}" for module, name in ours if name.startswith("_") or name not in public_names(module)]
    assert not hidden


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_program_looks_into_nothing_of_ours(path):
    """No `module._name` or `Class._name` of what it imported from us."""
    tree = ast.parse(path.read_text())
    ours = {as_name for module, _, as_name in imports(tree) if module.split(".")[0] == "nemotron_h_hf"}
    looks = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and root_of(node) in ours]
    assert not [ast.unparse(node) for node in looks if node.attr.startswith("_") and not node.attr.startswith("__")]


def test_nothing_imports_a_program():
    names = {"examples", "experiments"} | {path.stem for path in PROGRAMS if path.parent.parent.name == "experiments"}
    names |= {path.parent.name for path in PROGRAMS}
    found = [(path, module) for path in SOURCE for module, _, _ in imports(ast.parse(path.read_text()))]
    assert len(PROGRAMS) > 20 and not [pair for pair in found if pair[1].split(".")[0] in names]


def imports(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """(module, name, name in the file) of absolute imports, wherever they are; `import a.b` has the module's last word."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parent, _, last = alias.name.rpartition(".")
                yield parent or alias.name, last, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module, alias.name, alias.asname or alias.name) for alias in node.names)


@cache
def public_names(module: str) -> set[str]:
    """What a module of ours defines or lists in `__all__`, and for a package its modules; nothing if it is not there."""
    path = file_of(module)
    if path is None or any(part.startswith("_") for part in module.split(".")):
        return set()
    defined = {name for node in ast.parse(path.read_text()).body for name in defined_by(node)}
    below = {child.stem for child in path.parent.iterdir() if path.name == "__init__.py"}
    return defined | below | {module.split(".")[-1]}


def file_of(module: str) -> Path | None:
    """conversion/ lies beside src and is installed inside the package."""
    words = module.split(".")
    base = ROOT.joinpath(*words[1:]) if words[1:2] == ["conversion"] else ROOT.joinpath("src", *words)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def defined_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        yield from names
        if names == ["__all__"]:
            yield from ast.literal_eval(node.value)


def root_of(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None
