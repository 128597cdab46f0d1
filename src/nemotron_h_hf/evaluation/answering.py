"""Greedy answers to prompts that begin alike: what they share is computed once, its cache forked where they part.

A prompt goes through the model once, in pieces; its logits are made for the last position only. Works with any causal
language model of transformers that takes a cache; ours forks its hybrid cache, others are copied.

    prompts     A B C D x     A B C and then A B C D are computed once:
                A B C D y     feed A B C, fork, answer z
                A B C z       feed D, fork, answer x, answer y
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from nemotron_h_hf import HybridCache

from ..model.arguments import CACHE_NAME, cache_of

PIECE = 16384  # tokens per forward; bounds the memory of models that do not split long inputs themselves


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """The likeliest next tokens, one at a time, after each prompt; without the stop token that ended them."""
    if not all(prompts):
        raise ValueError("prompts: one of them has no tokens; at least one is needed")
    answers: dict[int, list[int]] = {}
    todo: list[tuple[list[int], int, Cache | None]] = [(list(range(len(prompts))), 0, None)]
    while todo:
        group, start, cache = todo.pop()
        if len(group) == 1:
            answers[group[0]] = _continue(model, prompts[group[0]][start:], cache, max_new_tokens, stop_ids)
            continue
        shared = shared_length([prompts[index] for index in group])
        if shared > start:
            _, cache = _feed(model, prompts[group[0]][start:shared], cache)
        branches = _branches(group, prompts, shared)
        todo += [(branch, shared, cache if branch is branches[0] else _fork(cache)) for branch in branches]
    return [answers[index] for index in range(len(prompts))]


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left over."""
    first, last = min(prompts), max(prompts)  # in the order of a dictionary these two share the least
    shared = next((i for i, (one, other) in enumerate(zip(first, last)) if one != other), len(first))
    return min(shared, min(map(len, prompts)) - 1)


def _branches(group: list[int], prompts: Sequence[Sequence[int]], shared: int) -> list[list[int]]:
    """Prompts that continue with the same token stay together; a prompt that ends with it stands alone. Largest first."""
    by_token: dict[tuple, list[int]] = {}
    for index in group:
        ends = len(prompts[index]) == shared + 1
        by_token.setdefault((prompts[index][shared], index if ends else None), []).append(index)
    return sorted(by_token.values(), key=len, reverse=True)


def _fork(cache: Cache | None) -> Cache | None:
    return cache.fork() if isinstance(cache, HybridCache) else copy.deepcopy(cache)


def _feed(model: PreTrainedModel, ids: Sequence[int], cache: Cache | None) -> tuple[Tensor, Cache]:
    """Logits (v) after the last of `ids`, and the cache with all of them in it."""
    for start in range(0, len(ids), PIECE):
        piece = torch.tensor([ids[start : start + PIECE]], device=model.device)
        output = model(input_ids=piece, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        cache = cache_of(output)
    return output.logits[0, -1], cache


def _continue(
    model: PreTrainedModel, ids: Sequence[int], cache: Cache | None, max_new_tokens: int, stop_ids: Collection[int]
) -> list[int]:
    """Greedy tokens after `ids`, of which there is at least one."""
    written: list[int] = []
    for _ in itertools.repeat(None, max_new_tokens):
        logits, cache = _feed(model, ids, cache)
        token = int(logits.argmax())
        if token in stop_ids:
            break
        written.append(token)
        ids = [token]
    return written
