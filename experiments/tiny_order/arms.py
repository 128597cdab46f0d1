"""What each run is given: the order of the text for `pretrain`, the stream of tokens for the loop of `train-tiny`.

Two roads lead from the one loop to the other, one difference at a time:

    train-tiny's loop
      loop            windows of 1,024 tokens out of all documents laid end to end, in random order
      loop_whole      the same windows, of the first documents alone: as many as the run has tokens
      loop_dealt      and of those 1,000 rows at a time, as `shuffle_rows` deals them
      loop_published  and with the order of documents that the published runs had (records 1,000 at a time, sorted by name)
      loop_ends       loop, each document opened and closed by <|endoftext|>
      loop_decay      loop, with weight decay on the embedding
    nemotron-h pretrain
      published       blocks of 1,000 records of a sorted file, rows dealt 1,000 at a time
      whole           records in random order over all of them, rows dealt 1,000 at a time
      joined          whole, documents not kept apart
      plain           whole, rows in the order of the documents
      windows         the very rows of `loop`, in its order
      all_rows        rows dealt out of all documents
      no_decay        all_rows, without weight decay on embedding
      fp32            all_rows, without bfloat16
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_h_hf.data.sources import shuffled

LENGTH = 1024
BLOCK = 1000  # records, and rows, that the published runs shuffled together
Encoded = Sequence[Sequence[int]]  # token ids of each document, in order of their names, without special tokens


def random_order(count: int, seed: int) -> list[int]:
    """As train-tiny puts its documents."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def published_order(count: int, seed: int) -> list[int]:
    """As the published runs read a file sorted by name: blocks of BLOCK records, each shuffled."""
    order: list[int] = []
    for window, start in enumerate(range(0, count, BLOCK)):
        size = min(BLOCK, count - start)
        order += [start + place for place in shuffled(size, seed, "python", 0, window)]
    return order


def stream_of(documents: Encoded, order: Sequence[int], end: int, closed: bool = False) -> Tensor:
    """(tokens,) int32: the documents in `order`, each opened (and closed) by the end token."""
    tail = [end] if closed else []
    return torch.cat([torch.tensor([end, *documents[i], *tail], dtype=torch.int32) for i in order])


def dealt(stream: Tensor, num_rows: int, seed: int) -> Tensor:
    """The rows of a stream, `num_rows` at a time in random order."""
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    parts = [part[torch.tensor(shuffled(len(part), seed, n))] for n, part in enumerate(rows.split(num_rows))]
    return torch.cat(parts).flatten()


# name -> (stream, whether the loop may shuffle its windows) from documents, end token, seed, tokens of the run
LOOPS: dict[str, Callable[[Encoded, int, int, int], tuple[Tensor, bool]]] = {
    "loop": lambda ids, end, seed, tokens: (stream_of(ids, random_order(len(ids), seed), end), True),
    "loop_decay": lambda ids, end, seed, tokens: (stream_of(ids, random_order(len(ids), seed), end), True),
    "loop_ends": lambda ids, end, seed, tokens: (stream_of(ids, random_order(len(ids), seed), end, True), True),
    "loop_whole": lambda ids, end, seed, tokens: (stream_of(ids, random_order(len(ids), seed), end)[:tokens], True),
    "loop_dealt": lambda ids, end, seed, tokens: (
        dealt(stream_of(ids, random_order(len(ids), seed), end)[:tokens], BLOCK, seed), False),
    "loop_published": lambda ids, end, seed, tokens: (
        dealt(stream_of(ids, published_order(len(ids), seed), end)[:tokens], BLOCK, seed), False),
}  # fmt: skip

# name -> (order of documents, flags of `nemotron-h pretrain`)
PRETRAIN: dict[str, tuple[Callable[[int, int], list[int]], list[str]]] = {
    "published": (published_order, ["--shuffle_rows", str(BLOCK)]),
    "whole": (random_order, ["--shuffle_rows", str(BLOCK)]),
    "joined": (random_order, ["--shuffle_rows", str(BLOCK)]),
    "plain": (random_order, ["--shuffle_rows", "0"]),
    "windows": (random_order, ["--shuffle_rows", "0"]),
    "all_rows": (random_order, ["--shuffle_rows", "9400"]),
    "no_decay": (random_order, ["--shuffle_rows", "9400"]),
    "fp32": (random_order, ["--shuffle_rows", "9400", "--bf16", "false"]),
}
