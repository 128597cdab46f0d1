"""Documents: every Python block of README.md and MODEL_CARD.md runs, and what they say about the tree is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "nemotron_h_hf"


def python_blocks(name: str) -> list[str]:
    """The ```python blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [(name, block) for name in ("README.md", "MODEL_CARD.md") for block in python_blocks(name)]


@pytest.mark.parametrize("name, block", BLOCKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BLOCKS)])
def test_python_block_runs(name, block, capsys):
    exec(compile(block, name, "exec"), {"__name__": "block"})
    printed = capsys.readouterr().out.splitlines()
    for promised in re.findall(r"^print\(.*\)  # (\d+)", block, flags=re.MULTILINE):
        assert promised in printed


def test_readme_shows_what_info_prints(capsys):
    from nemotron_h_hf.scripts import info

    info.main(["nemotron-h-8b"])
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()


def test_model_cards_have_the_same_sections():
    """MODEL_CARD.md describes the embedded model under the headings that `nemotron-h push` writes."""
    assert headings(ROOT / "MODEL_CARD.md") == headings(PACKAGE / "assets" / "model_card_template.md")


def test_model_card_states_what_push_would_write():
    from nemotron_h_hf import EMBEDDED_MODEL, hub

    assert facts_of((ROOT / "MODEL_CARD.md").read_text()) == facts_of(hub.model_card(EMBEDDED_MODEL, "owner/name"))


def facts_of(card: str) -> str:
    """The section of facts."""
    return card.split("## Facts\n")[1].split("## Use\n")[0]


def headings(path: Path) -> list[str]:
    """The second-level headings of a Markdown file."""
    return [line for line in path.read_text().splitlines() if line.startswith("## ")]
