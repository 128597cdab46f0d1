"""The order in which an elastic parent keeps its weights in memory: each budget's part of them is a prefix.

Files keep the heads of a Mamba layer group by group, and query heads by their key/value head: the first heads of every
group are then scattered rows. In memory the first head of every group comes first, then the second of every group, and
any number of heads per group is a prefix. Where budgets also cut the channels of heads, the rows of the smallest budget
come first, then those that the next one adds, as long as each contains the one before. A budget outside that chain gets copies.

    in_proj    dt of all heads | B, C | gate and x, by (first budget that has them, head in its group, gate or x, group, channel)
    out_proj   columns likewise
    q_proj     by (first budget that has them, head of its key/value head, key/value head, channel); o_proj's columns likewise

An order is an int64 tensor: at each place of the live tensor, the index in the ordinary one.

    r heads in a group, g groups, p channels of a head
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...model.configuration_nemotron_h import NemotronHConfig
from ..budgets import read_elastic
from ..child import child_of


class KeptHeads(NamedTuple):
    """What a budget keeps of a Mamba layer, or of an attention layer, whose groups are its key/value heads."""

    heads: int  # of each group
    channels: int  # of each head; in attention the channels of all key/value heads


class Order(NamedTuple):
    """Orders of the rows and columns of one Linear, None as in files; the first `front` rows are the last ones there."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    front: int = 0


def live_orders(config: NemotronHConfig) -> dict[str, Order]:
    """Name of each reordered Linear -> its order, for the layers of the stack."""
    budgets = _sizes_of_budgets(config)
    orders: dict[str, Order] = {}
    for index, kind in enumerate(config.layers_block_type):
        prefix = f"model.layers.{index}.mixer."
        if kind == "linear_attention":
            whole = KeptHeads(
                config.size("mamba_num_heads", index) // config.n_groups, config.size("mamba_head_dim", index)
            )
            chain = nested([whole, *budgets.get(index, ())])
            state = 2 * config.n_groups * config.ssm_state_size
            heads = config.size("mamba_num_heads", index)
            orders[prefix + "in_proj"] = Order(in_proj_order(chain, config.n_groups, state), None, heads)
            orders[prefix + "out_proj"] = Order(None, head_order(chain, config.n_groups))
        elif kind == "full_attention":
            groups = config.num_key_value_heads
            heads = KeptHeads(config.size("num_attention_heads", index) // groups, groups * config.head_dim)
            order = query_order(nested([heads, *budgets.get(index, ())]), groups)
            orders[prefix + "q_proj"], orders[prefix + "o_proj"] = Order(order), Order(None, order)
    return orders


def nested(sizes: Iterable[KeptHeads]) -> list[KeptHeads]:
    """The sizes that each hold the one before, smallest first. Of two that do not fit, the larger stays, or the one of
    longer heads."""
    chain: list[KeptHeads] = []
    for size in sorted(set(sizes), key=lambda size: (size.heads * size.channels, size.channels), reverse=True):
        if not chain or (size.heads <= chain[-1].heads and size.channels <= chain[-1].channels):
            chain.append(size)
    return chain[::-1]


def head_order(chain: list[KeptHeads], num_groups: int) -> Tensor:
    """Order of (heads x channels) rows: (r * g * p)."""
    return torch.cat([heads.flatten() for heads in _pieces(chain, _by_head(chain[-1], num_groups))])


def query_order(chain: list[KeptHeads], num_groups: int) -> Tensor:
    """Order of attention's (query heads x channels) rows: (r * g * p)."""
    whole = chain[-1]
    index = _by_head(KeptHeads(whole.heads, whole.channels // num_groups), num_groups)
    return torch.cat([heads.flatten() for heads in _pieces(chain, index.flatten(1).unsqueeze(1))])


def in_proj_order(chain: list[KeptHeads], num_groups: int, state_rows: int) -> Tensor:
    """Order of in_proj's rows, which files keep as gate, x, B and C (`state_rows`), dt."""
    whole = chain[-1]
    inner = whole.heads * whole.channels * num_groups
    after = 2 * inner + state_rows
    parts = [
        torch.arange(after, after + whole.heads * num_groups, device="cpu"),
        torch.arange(2 * inner, after, device="cpu"),
    ]
    for heads in _pieces(chain, _by_head(whole, num_groups)):
        parts.append(torch.stack([heads, inner + heads], dim=1).flatten())  # gate and x of a head's group together
    return torch.cat(parts)


def positions(order: Tensor) -> Tensor:
    """The inverse: at each index of the ordinary tensor, the place in the live one."""
    return torch.argsort(order)


def block_size(places: Tensor) -> int:
    """The largest size of blocks that `places` is made of, each of successive ones and starting at a multiple of it."""
    starts = torch.cat([places.new_zeros(1), torch.nonzero(places.diff() != 1).flatten() + 1])
    return math.gcd(len(places), *starts.tolist(), *places[starts].tolist())


def _by_head(whole: KeptHeads, num_groups: int) -> Tensor:
    """(r, g, p): the ordinary index of each channel; files have them group by group."""
    index = torch.arange(whole.heads * whole.channels * num_groups, device="cpu")
    return index.view(num_groups, whole.heads, whole.channels).transpose(0, 1)


def _pieces(chain: list[KeptHeads], index: Tensor) -> Iterable[Tensor]:
    """Of `index` (r, g, p), what each size of the chain adds to the one before: longer heads, then more heads."""
    before = KeptHeads(0, 0)
    for size in chain:
        if before.heads and size.channels > before.channels:
            yield index[: before.heads, :, before.channels : size.channels]
        if size.heads > before.heads:
            yield index[before.heads : size.heads, :, : size.channels]
        before = size


def _sizes_of_budgets(config: NemotronHConfig) -> dict[int, list[KeptHeads]]:
    """Mamba or attention layer -> what each of the budgets keeps of it."""
    found: dict[int, list[KeptHeads]] = {}
    for budget in read_elastic(config).budgets.values() if config.elastic else ():
        child = child_of(config, budget)
        for own, index in enumerate(child.layers):
            if config.layers_block_type[index] == "linear_attention":
                heads = child.config.size("mamba_num_heads", own) // config.n_groups
                found.setdefault(index, []).append(KeptHeads(heads, child.config.size("mamba_head_dim", own)))
            elif config.layers_block_type[index] == "full_attention":
                groups = child.config.num_key_value_heads
                heads = child.config.size("num_attention_heads", own) // groups
                found.setdefault(index, []).append(KeptHeads(heads, groups * config.head_dim))
    return found
