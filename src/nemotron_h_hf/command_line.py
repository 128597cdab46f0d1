"""A command's options as one dataclass: a field is an option, with its default and its help; argparse reads them.

    @dataclass(frozen=True)
    class Arguments:
        folder: Path = argument("new folder")
        max_tokens: int = option(128, "stop after so many tokens (128)")     # --max-tokens

Training commands have their own reader of dataclasses, with YAML files and transformers' arguments (training/arguments.py).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any, TypeVar, get_args, get_type_hints

Kind = TypeVar("Kind")


def option(default: Any, help_text: str, *names: str, group: tuple[str, ...] = (), **how: Any) -> Any:
    """A field that is an option, by default `--name-of-the-field`.

    Args:
        names: other spellings.
        group: title of its group in the help, and a description.
        how: more for argparse's `add_argument`.
    """
    return field(
        metadata={"names": names or None, "group": group, "how": {"default": default, "help": help_text} | how}
    )


def argument(help_text: str, **how: Any) -> Any:
    """A field that is a word without a name."""
    return field(metadata={"names": (), "group": (), "how": {"help": help_text} | how})


def read_options(kind: type[Kind], argv: Sequence[str] | None, command: str, description: str, **more: Any) -> Kind:
    """The dataclass, filled from the words after `nemotron-h COMMAND`; `more` is for `ArgumentParser`."""
    parser = argparse.ArgumentParser(
        prog=f"nemotron-h {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )
    add_options(parser, kind)
    return kind(**vars(parser.parse_args(argv)))


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Let argparse know the fields that are options. Booleans are switches, numbers finite."""
    hints, groups = get_type_hints(kind), {}
    for item in (item for item in fields(kind) if item.metadata):
        names, group, how = (item.metadata[name] for name in ("names", "group", "how"))
        converter = hints[item.name]
        while parts := [part for part in get_args(converter) if part is not type(None)]:  # of `list[int] | None`: int
            converter = parts[0]
        if "action" in how or "type" in how:
            more = {}
        elif converter is bool:
            more = {"action": "store_true"}
        else:
            more = {"type": finite if converter is float else converter}
        if group and group not in groups:
            groups[group] = parser.add_argument_group(*group)
        add = groups[group].add_argument if group else parser.add_argument
        if names == ():
            add(item.name, **how, **more)
        else:
            add(*(names or ["--" + item.name.replace("_", "-")]), dest=item.name, **how, **more)


def finite(text: str) -> float:
    """A number for argparse's `type`: neither NaN nor infinity, which every comparison with a limit lets pass or none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a finite number")
    return number
