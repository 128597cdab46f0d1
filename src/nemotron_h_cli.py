"""`nemotron-h COMMAND ...`: a table of commands; only the module of the command asked for is imported.

It is outside of the package because importing any part of the package imports torch, which takes seconds;
help and a mistyped command answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

# name, module with `main(argv)`, one line of help
COMMANDS = (
    (
        "demo",
        "nemotron_h_hf.scripts.demo",
        "the embedded model writes, in three sizes; cache memory next to a transformer's",
    ),
    ("generate", "nemotron_h_hf.scripts.generate", "continue a prompt, printing tokens as they come"),
    ("serve", "nemotron_h_hf.scripts.serve", "an OpenAI API for a model and every budget of an elastic parent"),
    ("info", "nemotron_h_hf.scripts.info", "pattern, parameters and memory of a folder, hub id or preset"),
    (
        "elasticize",
        "nemotron_h_hf.scripts.elasticize",
        "order a model's weights so the first rows and columns form smaller models",
    ),
    ("slice", "nemotron_h_hf.scripts.slice", "cut a nested model out of an elastic parent"),
    ("minipuzzle", "nemotron_h_hf.scripts.minipuzzle", "compress a model under a memory budget, and distil it"),
    ("convert", "nemotron_h_hf.scripts.convert", "convert checkpoints between Megatron and Hugging Face"),
    ("make-vl", "nemotron_h_hf.scripts.make_vl", "join a language model and a vision tower under a fresh projector"),
    ("blend", "nemotron_h_hf.scripts.blend", "show the tokens per source and phase of a training blend"),
    ("pretrain", "nemotron_h_hf.scripts.pretrain", "train on blended sources, from fresh weights or a checkpoint"),
    ("sft", "nemotron_h_hf.scripts.sft", "fine-tune on conversations or text, whole or with LoRA adapters"),
    ("merge", "nemotron_h_hf.scripts.merge", "merge LoRA adapters into an ordinary checkpoint"),
    ("distill", "nemotron_h_hf.scripts.distill", "train a student on what a teacher predicts"),
    ("elastic-train", "nemotron_h_hf.scripts.elastic_train", "train a parent and the smaller models nested in it"),
    ("export", "nemotron_h_hf.scripts.export", "make an ordinary checkpoint of a training run's, sharded or not"),
    ("plot", "nemotron_h_hf.scripts.plot", "draw the loss curves of runs side by side"),
    ("eval", "nemotron_h_hf.scripts.eval", "bits per byte, long-context questions, lm-evaluation-harness tasks"),
    (
        "bench",
        "nemotron_h_hf.scripts.bench",
        "speed and memory on CPU or GPU, next to transformers' models and a floor",
    ),
    ("push", "nemotron_h_hf.scripts.push", "upload a checkpoint folder with a model card computed from it"),
)


# transformers imports torchao where it is installed, and torchao 0.18's import warns of CUDA libraries on every CPU machine.
CHATTY_IMPORTS = ("torchao", "torch.utils._pytree")


CLOSED_PIPE = 141  # what a shell sees of a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed on its input, 2 wrong usage.

    A failure is one line on standard error. `--debug` anywhere among the words lets its traceback through.
    """
    argv, debug = take_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        status = run(argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone: `nemotron-h --help | head -1`
        drop_output()
        return CLOSED_PIPE
    except Exception as error:
        if debug:
            raise
        print(f"nemotron-h {argv[0] if argv else ''}: error: {describe(error)}", file=sys.stderr)
        return 1


def take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """The words without `--debug`, and whether it was there; with a value it is an option of transformers' Trainer."""
    ours = [i for i, word in enumerate(argv) if word == "--debug" and not argv[i + 1 : i + 2] == ["underflow_overflow"]]
    return [word for i, word in enumerate(argv) if i not in ours], bool(ours)


def run(argv: list[str]) -> int:
    """Import the module of one command and call it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    modules = {name: module for name, module, _ in COMMANDS}
    if argv[0] not in modules:
        print(unknown_command(argv[0]), file=sys.stderr)
        return 2
    for name in CHATTY_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    return importlib.import_module(modules[argv[0]]).main(argv[1:]) or 0


def describe(error: Exception) -> str:
    """One line about a failure: the message of an expected one, the type of an unexpected one."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text}" if text else "out of memory"
    if text.startswith("Repo id must"):  # huggingface_hub, which takes every name that is no folder for a hub id
        return f"no such folder, and no hub id (owner/name): {text}"
    if isinstance(error, (ValueError, OSError)) or (isinstance(error, ImportError) and "pip install" in text):
        return text or type(error).__name__
    return f"unexpected {type(error).__name__}: {text} (the same command with --debug shows where)"


def drop_output() -> None:
    """Send what is left for standard output nowhere: Python would otherwise complain of it at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage() -> str:
    """The text of `nemotron-h --help`."""
    lines = [f"  {name:<15}{help_line}" for name, _, help_line in COMMANDS]
    return "\n".join(
        [
            "usage: nemotron-h COMMAND [OPTIONS]",
            "",
            "commands:",
            *lines,
            "",
            "nemotron-h COMMAND --help tells more; --debug shows the traceback of an error.",
        ]
    )


def unknown_command(name: str) -> str:
    """What to say about a command that is not in the table, with the nearest name that is."""
    names = [command for command, _, _ in COMMANDS]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"commands: {', '.join(names)}"
    return f"nemotron-h: unknown command {name!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())
