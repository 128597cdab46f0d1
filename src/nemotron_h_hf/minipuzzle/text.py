"""The text of all stages: rows to score on, held-out rows to rank on, and files for distillation, apart from each other."""

from __future__ import annotations

import glob
import json
import os
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..data.packed_text import packed_rows
from ..data.stdlib_text import read_documents, split_documents
from ..evaluation.held_out import end_token
from ..evaluation.texts import read_texts
from ..inputs import load_tokenizer
from ..whole_files import write_text
from .arguments import MiniPuzzleArguments

Row = dict[str, Tensor]


class Files(NamedTuple):
    """For `nemotron-h distill`."""

    data: list[str]
    eval_data: list[str]


class Text:
    """Read when it is needed. Without --held_out, shuffled documents go to ranking until it has enough; the rest is trained on."""

    def __init__(self, arguments: MiniPuzzleArguments, teacher: Path, work: Path) -> None:
        self.arguments, self.work = arguments, work
        self.tokenizer = load_tokenizer(teacher)
        self._documents: tuple[list[str], list[str]] | None = None

    def scoring_rows(self) -> list[Row]:
        """For neurons; the first of them for layers."""
        texts = self.documents()[0]
        return self._packed(texts, "width_samples", self.arguments.width_samples)

    @cached_property
    def ranking_rows(self) -> list[Row]:
        """Held-out."""
        arguments = self.arguments
        return self._packed(
            self.documents()[1], "ranking_tokens", arguments.ranking_tokens // arguments.sequence_length
        )

    def files(self) -> Files:
        """Files with the documents to train on and to hold out; the given ones, or copies in the work folder."""
        arguments = self.arguments
        if arguments.data and arguments.held_out and arguments.column == "text":
            return Files(arguments.data, arguments.held_out)
        folder = self.work / "text"
        paths = [folder / "train.jsonl", folder / "held_out.jsonl"]
        if not all(path.is_file() for path in paths):
            for path, texts in zip(paths, self.documents()):
                write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        return Files(*([str(path)] for path in paths))

    def documents(self) -> tuple[list[str], list[str]]:
        """To train on, and held-out."""
        if self._documents is None:
            self._documents = self._split()
        return self._documents

    def _split(self) -> tuple[list[str], list[str]]:
        arguments = self.arguments
        if arguments.data is None:
            texts, held_out = ([one.text for one in part] for part in split_documents(read_documents()))
        else:
            texts, held_out = [text for _, text in read_texts(arguments.data, arguments.column)], None
        if arguments.held_out:
            held_out = [text for _, text in read_texts(arguments.held_out, arguments.column)]
        for part in (texts, held_out or []):
            random.Random(arguments.seed).shuffle(part)
        count = self._documents_for_ranking(texts if held_out is None else held_out)
        return (texts[count:], texts[:count]) if held_out is None else (texts, held_out[:count])

    def _documents_for_ranking(self, texts: Sequence[str]) -> int:
        missing = self.arguments.ranking_tokens
        for number, text in enumerate(texts, 1):
            missing -= 1 + len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if missing <= 0:
                return number
        raise ValueError(
            f"ranking_tokens={self.arguments.ranking_tokens:,}: allowed is at most what the {len(texts):,} documents have "
            f"that may be held out, {self.arguments.ranking_tokens - missing:,} tokens"
        )

    def _packed(self, texts: Sequence[str], name: str, num_rows: int) -> list[Row]:
        return packed_rows(
            self.tokenizer, end_token(self.tokenizer), texts, name, num_rows, self.arguments.sequence_length
        )


def file_stamps(patterns: Sequence[str] | None) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of the files of patterns, which differ when the texts do; None for the standard library."""
    if patterns is None:
        return None
    paths = sorted({os.path.realpath(path) for pattern in patterns for path in glob.glob(pattern, recursive=True)})
    return [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths if os.path.isfile(path)]
