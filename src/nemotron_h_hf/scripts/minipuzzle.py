"""Compress a model under a memory budget: scores, search, ranking, tournament, distillation (MiniPuzzle, arXiv 2504.03624).

    nemotron-h minipuzzle TEACHER WORK --data text.jsonl --budget 31.7GiB@1M --weights fp4 --kv fp8 --state bf16 --output student
    nemotron-h minipuzzle --config examples/recipes/minipuzzle_56b_to_47b.yaml
    nemotron-h minipuzzle TEACHER WORK --data text.jsonl --max_parameters 47B --until ranked      # look before training

TEACHER is only read. The stages leave files in WORK: scores.json (how much layers and neurons matter), candidates.json (every
smaller model that fits), ranked.json (these on held-out text, next to controls), benchmarked.json (the best on tasks, a few
of which go on), tournament.json (those after short distillation), student.json; report.html (and the same as Markdown) tells
it all. The same command given again goes on where it was: what is done is not repeated, killing it loses seconds of
measuring, or what a training did since its last checkpoint. A WORK of another teacher or other arguments is refused.

Candidates run as budgets of the one model in memory, without copies. The student is an ordinary checkpoint with a model card.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import takewhile

from transformers.utils.logging import disable_progress_bar

from nemotron_h_hf.errors import require
from nemotron_h_hf.minipuzzle.arguments import MiniPuzzleArguments
from nemotron_h_hf.minipuzzle.pipeline import compress
from nemotron_h_hf.training.arguments import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages that are not done."""
    (arguments,) = parse((MiniPuzzleArguments,), with_names(argv), __doc__, "nemotron-h minipuzzle")
    disable_progress_bar()
    work = compress(arguments)
    print(f"{work / 'report.html'} tells what was found")
    if arguments.output is not None and arguments.until in (None, "student"):
        print(f"{arguments.output} holds the student")
    return 0


def with_names(argv: Sequence[str] | None) -> list[str]:
    """The words before the first option, as options."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    require(len(words) <= 2, "arguments", words, "TEACHER and WORK; options begin with --")
    named = [part for name, word in zip(("--teacher", "--work"), words) for part in (name, word)]
    return [*named, *argv[len(words) :]]


if __name__ == "__main__":
    sys.exit(main())
