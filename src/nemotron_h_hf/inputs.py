"""What a command is given, checked where it enters: devices, YAML files, tokenizers. Errors name file or value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .model.json_files import read_json
from .model.weights import open_tensors, read_checked, read_index, tensors_digest

__all__ = [
    "load_tokenizer",
    "open_tensors",
    "read_checked",
    "read_device",
    "read_index",
    "read_json",
    "read_yaml",
    "tensors_digest",
]


def read_device(name: str) -> torch.device:
    """The device called `name`, on which a tensor can be made.

    Raises:
        ValueError: for a name that PyTorch does not know, or a device that this machine does not have.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"--device={name!r}: allowed are cpu, cuda, cuda:1, ... where there is one ({first})"
        ) from None
    return device


def read_yaml(path: str | os.PathLike, name: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, {} if it is empty; `name` is the option that named the file.

    Raises:
        ValueError: naming option and file.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    # ValueError: not UTF-8, or an impossible date
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{name}: {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{name}: {path} holds a {type(content).__name__}: allowed is a mapping of names to values")
    return content


def load_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: naming the file that is damaged, or the folder, for any error of the tokenizers library.
        OSError: from the hub.
    """
    for path in sorted(Path(name).glob("*config.json")):
        read_json(path)
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(f"the tokenizer of {name} cannot be read: {type(error).__name__}: {error}") from error
