"""Layouts: splitting and joining undo each other for any sizes, and agree with index arithmetic written here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_h_hf.conversion import layouts

SMALL = st.integers(1, 5)
QUICK = settings(max_examples=60, deadline=None)


def numbered(*shape: int) -> torch.Tensor:
    """A tensor whose elements are all different."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@QUICK
@given(st.lists(SMALL, min_size=1, max_size=5), SMALL, SMALL, st.integers(0, 1))
def test_cut_then_join_is_identity(shares, num_ranks, width, axis):
    sizes = [share * num_ranks for share in shares]
    shape = (sum(sizes), width) if axis == 0 else (width, sum(sizes))
    whole = numbered(*shape)
    shards = [layouts.cut_for_rank(whole, axis, sizes, num_ranks, rank) for rank in range(num_ranks)]
    parts = zip(*(shard.split([size // num_ranks for size in sizes], axis) for shard in shards), strict=True)
    assert torch.equal(torch.cat([torch.cat(part, axis) for part in parts], axis), whole)
    assert all(shard.shape[axis] * num_ranks == sum(sizes) for shard in shards)
    if len(sizes) > 1 and num_ranks > 1:  # the classic error: right shape, wrong content
        assert not torch.equal(torch.cat(shards, axis), whole)


@QUICK
@given(st.lists(SMALL, min_size=1, max_size=5), SMALL)
def test_parts_split_then_join_is_identity(sizes, width):
    whole = numbered(sum(sizes), width)
    parts = layouts.split_parts(whole, sizes)
    assert [part.shape[0] for part in parts] == sizes
    assert torch.equal(torch.cat(parts), whole)


@QUICK
@given(SMALL, SMALL, SMALL, st.one_of(st.none(), SMALL))
def test_qkv_split_then_join_is_identity(groups, per_group, head_dim, width):
    rows = groups * (per_group + 2) * head_dim
    qkv = numbered(rows) if width is None else numbered(rows, width)
    q, k, v = layouts.split_qkv(qkv, groups, head_dim)
    assert torch.equal(layouts.join_qkv(q, k, v, groups, head_dim), qkv)
    block = (per_group + 2) * head_dim  # rows of one group: its q heads, then k, then v
    for group in range(groups):
        start = group * block
        assert torch.equal(k[group * head_dim], qkv[start + per_group * head_dim])
        assert torch.equal(v[group * head_dim], qkv[start + (per_group + 1) * head_dim])
        assert torch.equal(q[group * per_group * head_dim], qkv[start])


@QUICK
@given(st.integers(1, 40), st.integers(1, 16), SMALL)
def test_pad_then_cut_is_identity(rows, multiple, width):
    tensor = numbered(rows, width) + 1
    padded = layouts.pad_rows(tensor, layouts.padded_rows(rows, multiple))
    assert padded.shape[0] % multiple == 0 and padded.shape[0] - rows < multiple
    assert torch.equal(layouts.cut_rows(padded, rows), tensor)
    assert not padded[rows:].any()


@QUICK
@given(SMALL, SMALL)
def test_experts_of_all_ranks_are_all_experts(per_rank, num_ranks):
    found = [e for rank in range(num_ranks) for e in layouts.expert_range(per_rank * num_ranks, num_ranks, rank)]
    assert found == list(range(per_rank * num_ranks))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="7 rows.*2 ranks"):
        layouts.rank_ranges([4, 7], 2, 0)
    with pytest.raises(ValueError, match="7 experts.*2"):
        layouts.expert_range(7, 2, 0)
