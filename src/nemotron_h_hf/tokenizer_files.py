"""The files that a checkpoint folder has apart from weights and configuration, in the form that every reader takes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .model.json_files import read_json
from .whole_files import whole_file

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""What a folder has apart from weights and configuration."""

CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
RESPONSE_TEMPLATES: dict[str, dict[str, Any]] = {
    "<|im_start|>assistant": {  # Nano v3
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "content": "xml-inline",
                "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
                "repeats": True,
                "transform": CALL,
            },
            "content": {"close": ["<|im_end|>", "</s>"]},
        },
    },
    "<SPECIAL_11>Assistant": {  # Nano v2
        "start_anchor": "<SPECIAL_11>Assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open": "<TOOLCALL>", "close": "</TOOLCALL>", "content": "json", "transform_each": True,
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
            },
            "content": {"close": ["<SPECIAL_12>", "</s>"]},
        },
    },
}  # fmt: skip
"""What a chat template holds -> how to read its answers."""


def response_template_for(chat_template: Any) -> dict[str, Any] | None:
    """How transformers' parser reads the answers of a known chat format; None for any other."""
    if not isinstance(chat_template, str):
        return None
    return next((form for marker, form in RESPONSE_TEMPLATES.items() if marker in chat_template), None)


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Save a tokenizer that every reader takes: with the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = portable_config(path.read_text(encoding="utf-8"), path.parent)
    with whole_file(path) as part:
        part.write_bytes(config)


def copy_files(names: Sequence[str], source: Path, target: Path) -> list[str]:
    """Copy the files of these names that `source` has, each whole or not at all; their names.

    A tokenizer_config.json is written as `portable_config` says.
    """
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        with whole_file(target / name) as part:
            if name == "tokenizer_config.json":
                read_json(source / name)  # names the file if it is none
                part.write_bytes(portable_config((source / name).read_text(encoding="utf-8"), source))
            else:
                shutil.copyfile(source / name, part)
    return found


def portable_config(text: str, folder: Path) -> bytes:
    """A tokenizer_config.json of this folder as every reader takes it.

    `TokenizersBackend`, which only transformers 5 reads, is named as everywhere else, and a known chat format gets its
    `response_template`, with which transformers finds reasoning and tool calls in answers.
    """
    config = json.loads(text)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # how it was loaded here, written by a save after a load
        config.pop(name, None)
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if "response_template" not in config and (form := response_template_for(template)):
        config["response_template"] = form
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
