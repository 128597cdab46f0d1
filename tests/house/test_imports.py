"""Who may import whom: the table of CONTRIBUTING.md, checked on the source without running it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "nemotron_h_hf"


def table() -> dict[str, tuple[str, set[str]]]:
    """CONTRIBUTING.md's: part -> its level, and the other parts of ours that it imports; `public` is `import nemotron_h_hf`."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Layout: who may import whom")[1].split("```")[1]
    rows: list[list[str]] = []
    for line in text.strip("\n").splitlines():
        if line.startswith(" "):
            rows[-1][2] += " " + line.strip()
        else:
            rows.append(re.split(r"\s{2,}", line, maxsplit=2))
    parts = {}
    for level, name, imports in rows:
        named = [part.strip() for part in imports.split(";")[0].split(",")]
        named = ["public" if part == "the public names" else part for part in named]
        parts[name.removesuffix(".py").rstrip("/")] = level, set(named) - {"nothing of ours"}
    return parts


LEVELS = {part: level for part, (level, _) in table().items()}
MAY_IMPORT = {part: imports for part, (_, imports) in table().items()}
# part -> packages apart from the standard library that it may import, where that is limited
THIRD_PARTY = {
    "model": {"torch", "transformers", "safetensors", "numpy", "peft", "PIL"}
    | {"mamba_ssm", "causal_conv1d", "triton", "numba", "llvmlite"},
    "checkpoint": {"torch", "safetensors"},
    "resumable": {"torch"},
    "cost": set(),
    "tensors": set(),
    "environment": {"torch", "transformers"},
    "errors": set(),
    "command_line": set(),
    "units": set(),
    "whole_files": set(),
    "output_folders": set(),
    "inputs": {"torch", "transformers", "yaml"},
    "nemotron_h_cli": set(),
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")
FILES += [PACKAGE.parent / "nemotron_h_cli.py", *sorted((ROOT / "conversion").glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_table(path):
    here = parts_of(path)
    modules = [name.split(".") for name in imported_names(path)]
    ours = [names[1:3] for names in modules if names[0] == "nemotron_h_hf"]
    for first, *rest in ours:
        part = first if first in MAY_IMPORT else "public"
        if part == here[0] == "scripts":
            assert rest == [here[1]], f"a script imports another script, {rest}"
        elif part != here[0]:
            assert part in MAY_IMPORT[here[0]], f"{here[0]} may not import {first}"
    packages = {names[0] for names in modules} - {"nemotron_h_hf"} - sys.stdlib_module_names
    assert packages <= THIRD_PARTY.get(here[0], packages)


def test_the_table_names_every_part_and_what_it_imports():
    """No row that is out of date, and no import from a higher level."""
    names = {parts_of(path)[0] for path in FILES}
    assert names == set(MAY_IMPORT)
    used: dict[str, set[str]] = {name: set() for name in names}
    for path in FILES:
        here = parts_of(path)[0]
        ours = [name.split(".") for name in imported_names(path) if name.split(".")[0] == "nemotron_h_hf"]
        used[here] |= {name[1] if len(name) > 1 and name[1] in names else "public" for name in ours} - {here}
    assert used == MAY_IMPORT
    for part, imports in MAY_IMPORT.items():
        levels = [LEVELS[other] for other in imports - {"public"}]
        assert LEVELS[part] == "-" or all(level <= LEVELS[part] for level in levels if level != "-"), part


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("[a-z]*.py")), ids=lambda path: path.name)
def test_hub_folder_is_flat(path):
    """transformers' loader of remote code follows nothing but `from .name import x` to a file next to it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, ast.unparse(node)
            assert (path.parent / f"{node.module}.py").is_file(), ast.unparse(node)
    assert "TYPE_CHECKING" not in path.read_text()


def test_hub_folder_does_not_know_elastic():
    """What is pushed with the weights is the architecture and what runs it."""
    words = re.compile(r"budget|elastic|manifest|slicing|\bnested\b|\bcosts?\b", re.IGNORECASE)
    texts = {path.name: path.read_text() for path in (PACKAGE / "model").glob("*.py")}
    assert len(texts) > 20 and not {name: found[0] for name, text in texts.items() if (found := words.search(text))}


# room of elastic/ -> the rooms that it may import; all may import the files above them
ROOMS = {"prepare": {"live"}, "live": {"cut"}, "cut": set(), "train": set()}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_elastic(room):
    names = [name.split(".") for path in (PACKAGE / "elastic" / room).glob("*.py") for name in imported_names(path)]
    rooms = {name[2] for name in names if name[:2] == ["nemotron_h_hf", "elastic"]} & ROOMS.keys()
    assert names and rooms - {room} <= ROOMS[room]


def test_every_folder_of_elastic_is_a_room():
    assert {path.parent.name for path in (PACKAGE / "elastic").glob("*/*.py")} == ROOMS.keys()


def parts_of(path: Path) -> tuple[str, ...]:
    """scripts/info.py -> ("scripts", "info"), inside the package; the command line is its own part."""
    base = next(base for base in (PACKAGE, PACKAGE.parent, ROOT) if path.is_relative_to(base))
    return path.relative_to(base).with_suffix("").parts


def imported_names(path: Path) -> list[str]:
    """Absolute dotted names that a file imports, wherever in it; `from a import b` gives a.b."""
    installed = path.is_relative_to(PACKAGE.parent)  # conversion/ is next to src and is installed inside the package
    package = path.relative_to(PACKAGE.parent).parts if installed else ("nemotron_h_hf", *path.relative_to(ROOT).parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            module = [*base, *([node.module] if node.module else [])]
            names += [".".join([*module, alias.name]) for alias in node.names]
    return names
