"""Documents: their Python blocks and marked commands run, and every command, option and file they name exists.

A block that opens with ```bash run is run by `make test`, one with ```bash slow by `make test-slow`, in one shell and an
empty folder. The other commands need models or data that are not here: the help of the command must list their options.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nemotron_h_cli

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PACKAGE = ROOT / "src" / "nemotron_h_hf"
GUIDES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
TAUGHT = ["README.md", *GUIDES]  # what a user reads
DOCUMENTS = [*TAUGHT, "CONTRIBUTING.md", "MODEL_CARD.md", "experiments/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "results").rglob("README.md"))

COMMANDS = {name: module for name, module, _ in nemotron_h_cli.COMMANDS}
# Options of other programs that documents mention.
FOREIGN = {"--hf-overrides", "--external_plugins", "--config_file", "--no-deps", "--target", "--help", "--debug"}
# Files that a run writes or a reader brings, not files of the tree.
BROUGHT = ("runs/", "text/", "path/to/", "OUTPUT", "megatron/", "run/", "test/")
# Files of others, in docstrings.
OTHERS = {"pydoc_data/topics.py", "llava_model.py"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document whose opening line is exactly ```language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), flags=re.MULTILINE | re.DOTALL)


def labelled(language: str, documents: list[str]) -> list:
    return [
        pytest.param(block, id=f"{document}-{number}")
        for document in documents
        for number, block in enumerate(blocks(document, language))
    ]


# Blocks that run


@pytest.mark.parametrize("block", labelled("python", [*TAUGHT, "MODEL_CARD.md"]))
def test_python_block_runs(block, capsys):
    exec(compile(block, "document", "exec"), {"__name__": "block"})
    printed = capsys.readouterr().out.splitlines()
    for promised in re.findall(r"^print\(.*\)  # (\d+)", block, flags=re.MULTILINE):
        assert promised in printed


@pytest.mark.parametrize("block", labelled("bash run", TAUGHT))
def test_marked_commands_run(block, tmp_path, monkeypatch):
    """In this process, which has imported torch already: each is one `nemotron-h` command."""
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "nemotron-h" and nemotron_h_cli.main(words) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", labelled("bash slow", TAUGHT))
def test_longer_commands_run(block, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()[-3000:]


def test_guides_have_commands_that_run():
    for name in ("run", "convert", "elastic", "compress", "train", "measure"):
        assert blocks(f"docs/{name}.md", "bash run") + blocks(f"docs/{name}.md", "bash slow"), name


def test_run_guide_shows_what_info_prints(capsys):
    from nemotron_h_hf.scripts import info

    info.main(["nemotron-h-8b"])
    assert capsys.readouterr().out in text_of("docs/run.md")


# What is named exists


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_their_options_exist(document):
    lines = commands_of(document)
    assert lines or document not in [
        f"docs/{name}.md" for name in ("run", "convert", "elastic", "compress", "train", "measure")
    ]
    for name, options in lines:
        assert name in COMMANDS, f"{document}: nemotron-h {name}"
        missing = [option for option in options if not re.search(rf"{option}(?![\w-])", help_of(name))]
        assert missing == [], f"{document}: nemotron-h {name}"


@pytest.mark.parametrize("document", TAUGHT)
def test_options_in_the_text_exist(document):
    known = "".join(help_of(name) for name in COMMANDS)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(document))) - FOREIGN
    assert [option for option in sorted(named) if not re.search(rf"{option}(?![\w-])", known)] == []


def test_names_of_files_are_found():
    assert {"docs/run.md", "CONTRIBUTING.md", "docs/results/bench_cpu.png", "conversion/"} <= set(files_of("README.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    assert [name for name in files_of(document) if not is_there(name, (ROOT / document).parent)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_and_extras_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    section = text_of("pyproject.toml").split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE))
    text = text_of(document)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    assert {extra for group in re.findall(r"'\.\[([\w,]+)\]'", text) for extra in group.split(",")} <= extras


def test_the_readme_names_every_folder_and_command():
    readme = text_of("README.md")
    folders = [path.relative_to(ROOT) for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert [str(folder) for folder in folders if f"{folder}/" not in readme] == []
    assert [name for name in COMMANDS if f"`{name}`" not in readme] == []
    assert [name for name in GUIDES if f"({name})" not in readme and f"({Path(name).name})" not in linked()] == []


@pytest.mark.parametrize("package", sorted({path.parent for path in PACKAGE.rglob("*.py")} | {ROOT / "conversion"}))
def test_a_package_lists_its_files(package):
    """In its docstring: each file once, and no other."""
    listed = re.findall(r"\b(\w+\.py)\b", (package / "__init__.py").read_text().split('"""')[1])
    assert sorted(listed) == sorted(path.name for path in package.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *(ROOT / "conversion").rglob("*.py")], ids=lambda p: p.stem)
def test_docstrings_name_files_that_exist(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, DOCUMENTED)]
    text = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    named = set(re.findall(r"(?<![\w/.*-])[\w/]*\w\.(?:py|md)\b", text)) - OTHERS
    assert [name for name in sorted(named) if not is_there(name, path.parent)] == []


# The model card


def test_model_cards_have_the_same_sections():
    """MODEL_CARD.md describes the embedded model under the headings that `nemotron-h push` writes."""
    assert headings(ROOT / "MODEL_CARD.md") == headings(PACKAGE / "assets" / "model_card_template.md")


def test_model_card_states_what_push_would_write():
    from nemotron_h_hf import EMBEDDED_MODEL, hub

    assert facts_of(text_of("MODEL_CARD.md")) == facts_of(hub.model_card(EMBEDDED_MODEL, "owner/name"))


# Reading documents


def commands_of(document: str) -> list[tuple[str, list[str]]]:
    """Every `nemotron-h NAME ...` of a document with its options, in blocks and in the text."""
    calls = re.findall(r"nemotron-h (?=[a-z])((?:[^`\n\\]|\\\n)+)", text_of(document))
    named = [(call.split()[0], call.split(" #")[0]) for call in calls]
    return [(name, re.findall(r"(?<!\S)(--[a-z][\w-]*)", call)) for name, call in named]


def files_of(document: str) -> list[str]:
    """Names that look like files of the tree: links, names that end in .py or .md, and paths below a folder of it."""
    text = re.sub(r"https?://\S+|^#.*\n?", "", text_of(document), flags=re.MULTILINE)
    links = re.findall(r"\]\(([^)#:\s]+)\)", text)
    sources = re.findall(r"(?<![\w/*.-])[\w./*-]*\w\.(?:py|md)\b", text)
    below = re.findall(r"(?<![\w/.-])(?:docs|examples|experiments|tests|src|conversion)/[\w./*-]*", text)
    return [name.rstrip(".") for name in {*links, *sources, *below} if not name.startswith(BROUGHT)]


def is_there(name: str, folder: Path) -> bool:
    """Whether a name is a file, a folder or a stem of files below the root, the package or `folder`; a bare one, anywhere."""
    name = name.rstrip("/")
    if any(found for place in (ROOT, PACKAGE, folder) for found in (*place.glob(name), *place.glob(f"{name}.*"))):
        return True
    return "/" not in name and any(
        found for top in ("src", "conversion", "tests") for found in (ROOT / top).rglob(name)
    )


@functools.cache
def help_of(name: str) -> str:
    """What a command prints for --help, with every option of the Trainer where it passes them on."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        for flag in ("--help_all", "--help"):  # a command without the first refuses it, with status 2
            with contextlib.suppress(SystemExit):
                nemotron_h_cli.main([name, flag])
    return printed.getvalue()


def linked() -> str:
    """The text of all guides, in which one may link to another."""
    return "".join(text_of(name) for name in GUIDES)


def facts_of(card: str) -> str:
    """The section of facts."""
    return card.split("## Facts\n")[1].split("## Use\n")[0]


def headings(path: Path) -> list[str]:
    """The second-level headings of a Markdown file."""
    return [line for line in path.read_text().splitlines() if line.startswith("## ")]
