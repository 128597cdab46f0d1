"""How one tensor's elements are arranged on the two sides: pure functions, each with its inverse.

    V vocabulary rows, g key/value groups, r query heads per group, hd head_dim, T tensor-parallel ranks, E experts

A whole tensor is cut for T ranks along one axis, part by part: each of the consecutive parts on it (z,
x, B, C, dt of a Mamba in_proj) is cut in T, and rank t holds its piece of every part. A plain concatenation of the
ranks' tensors therefore has the right shape but the wrong content if there is more than one part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_ranges(sizes: Sequence[int], num_ranks: int, rank: int) -> list[tuple[int, int, int]]:
    """(start in the rank's tensor, start in the whole tensor, length) of every part of `sizes`.

    Raises ValueError when a part does not divide by the number of ranks.
    """
    ranges, local_start, whole_start = [], 0, 0
    for size in sizes:
        if size % num_ranks:
            raise ValueError(f"{size} rows of parts {tuple(sizes)} cannot be cut for {num_ranks} ranks")
        length = size // num_ranks
        ranges.append((local_start, whole_start + rank * length, length))
        local_start += length
        whole_start += size
    return ranges


def cut_for_rank(whole: Tensor, axis: int, sizes: Sequence[int], num_ranks: int, rank: int) -> Tensor:
    """The tensor that one rank holds; a view where it is one range of the whole."""
    pieces = [whole.narrow(axis, start, length) for _, start, length in rank_ranges(sizes, num_ranks, rank)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def split_parts(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The consecutive parts on the first axis, as views."""
    return list(whole.split(list(sizes)))


def split_qkv(qkv: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [q heads of group 0, k 0, v 0, q heads of group 1, ...] to the rows of q, of k and of v."""
    rest = qkv.shape[1:]
    grouped = qkv.reshape(num_groups, -1, head_dim, *rest)  # (g, r + 2, hd, ...)
    q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def join_qkv(q: Tensor, k: Tensor, v: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """The inverse of `split_qkv`."""
    rest = q.shape[1:]
    grouped = [part.reshape(num_groups, -1, head_dim, *rest) for part in (q, k, v)]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def padded_rows(num_rows: int, multiple: int) -> int:
    """Rows of a vocabulary of `num_rows` that is padded to a multiple."""
    return -(-num_rows // multiple) * multiple


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """Zero rows added at the end until there are `num_rows`."""
    if num_rows == tensor.shape[0]:
        return tensor
    padded = tensor.new_zeros(num_rows, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    return padded


def cut_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """The first `num_rows` rows, a view; the inverse of `pad_rows`."""
    return tensor[:num_rows]


def expert_range(num_experts: int, num_ranks: int, rank: int) -> range:
    """The global numbers of the experts that one expert-parallel rank holds, in its local order."""
    if num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts cannot be shared by {num_ranks} expert-parallel ranks")
    share = num_experts // num_ranks
    return range(rank * share, (rank + 1) * share)
