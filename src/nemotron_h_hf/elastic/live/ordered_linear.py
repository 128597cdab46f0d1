"""A Linear whose weight is reordered, while its input and output are in the ordinary order.

The weight of a smaller model is then a prefix of it. Checkpoints do not see the order: `state_dict` and `load_state_dict`
use the ordinary weight. Adapters do not see it either, because they wrap the module.
"""

import math

import torch
from torch import Tensor, nn

from ...model.kernels import compiled_loops
from ...model.linear import multiply
from ...model.plain import REORDERED, remember_forward
from .prefix_order import Order, block_size, positions


class Gather(nn.Module):
    """x (..., n) -> x[..., places], moved in the largest blocks that `places` is made of; they are between `start` and the end."""

    blocks: Tensor

    def __init__(self, places: Tensor, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        self.start, self.stop = start, stop
        self.size = math.gcd(block_size(places - start), 0 if stop is None else stop - start)
        self.register_buffer("blocks", (places - start)[:: self.size] // self.size, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., self.start : self.stop]
        return x.unflatten(-1, (-1, self.size)).index_select(-2, self.blocks).flatten(-2)

    def places(self) -> Tensor:
        """The index as it was given."""
        within = torch.arange(self.size, device=self.blocks.device)
        return (self.blocks[:, None] * self.size + within).flatten() + self.start


@remember_forward
class OrderedLinear(nn.Linear):
    """y = W x + b with rows and columns of W, and b, in another order than y and x.

    Args:
        weight: the ordered weight; it may have a few rows more than there are outputs (see `front`).
        rows: (out) the row of each output, None for as they are.
        inputs: (in) the column of each input, None for as they are.
        front: the last outputs are somewhere in that many first rows, the others after them.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: Tensor | None, inputs: Tensor | None, front: int = 0
    ) -> None:
        out_features = len(weight) if rows is None else len(rows)
        super().__init__(weight.shape[1], out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.front = front
        self.set_order(rows, inputs, weight.device)

    def set_order(self, rows: Tensor | None, inputs: Tensor | None, device: torch.device) -> None:
        """The row of each output and the column of each input."""
        self.inputs = self.outputs = self.row_order = self.column_order = None
        if inputs is not None:
            self.inputs = Gather(torch.argsort(inputs)).to(device)
        if rows is not None:
            parts = [Gather(rows[rows >= self.front], self.front)]
            parts += [Gather(rows[rows < self.front], 0, self.front)] if self.front else []
            self.outputs = nn.ModuleList(parts).to(device)
        if device.type != "meta":
            self.row_order = None if rows is None else self.rows().cpu()
            self.column_order = None if inputs is None else self.inputs.places().cpu()

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(x if self.inputs is None else self.inputs(x), self.weight, self.bias)
        if self.outputs is None:
            return y
        parts = [gather(y) for gather in self.outputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def rows(self) -> Tensor | None:
        """(out) the row of each output."""
        return None if self.outputs is None else torch.cat([gather.places() for gather in self.outputs])

    def places_of_inputs(self) -> Tensor | None:
        """(in) the column of each input."""
        return None if self.inputs is None else torch.argsort(self.inputs.places())

    def ordinary(self, name: str) -> Tensor:
        """`weight` or `bias` in the ordinary order: a copy where that is another."""
        tensor = getattr(self, name).detach()
        if (rows := self.rows()) is not None:
            tensor = tensor.index_select(0, rows)
        if name == "weight" and (columns := self.places_of_inputs()) is not None:
            tensor = tensor.index_select(1, columns)
        return tensor

    def _in_order(self, name: str, tensor: Tensor) -> Tensor:
        """The reverse of `ordinary`."""
        if (rows := self.rows()) is not None:
            tensor = tensor.index_select(0, torch.argsort(rows).to(tensor.device))
        if name == "weight" and self.inputs is not None:
            tensor = tensor.index_select(1, self.inputs.places().to(tensor.device))
        return tensor

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name in self._parameters:
            if self._parameters[name] is not None:
                destination[prefix + name] = self.ordinary(name)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for name, own in self._parameters.items():
            given = state_dict.get(prefix + name)
            if own is not None and given is not None and given.shape == own.shape:
                state_dict[prefix + name] = self._in_order(name, given)
        super()._load_from_state_dict(state_dict, prefix, *args)


REORDERED.append(OrderedLinear)


def ordered(linear: nn.Linear, order: Order) -> OrderedLinear:
    """An ordinary Linear with its weight moved into an order."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    rows = columns = None
    if order.rows is not None:
        index, rows = order.rows.to(weight.device), positions(order.rows)
        weight, bias = weight.index_select(0, index), None if bias is None else bias.index_select(0, index)
    if order.columns is not None:
        columns, weight = positions(order.columns), weight.index_select(1, order.columns.to(weight.device))
    live = OrderedLinear(weight, bias, rows, columns, order.front)
    return live.requires_grad_(linear.weight.requires_grad).train(linear.training)


def arranged(weight: Tensor) -> Tensor:
    """The same matrix, in the memory layout that is read fastest, with rows successive but for fp32 on a CPU without Numba.

    There the longer side is: a part of it then has long stretches, which a processor reads ahead. With the short side
    successive, decoding from a view took 1.2 times as long as from a copy.
    """
    across = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.shape[0] > weight.shape[1]
    across = across and compiled_loops() is None
    return weight.t().contiguous().t() if across else weight.contiguous()
