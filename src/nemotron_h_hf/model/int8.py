"""torchao's int8 weights on a CPU at the speed of its memory.

torchao multiplies by int8 weights on a CPU by making them fp32 first, every time: slower than fp32 weights, for a single
token several times. FBGEMM, a part of torch on x86, has a product of uint8 inputs and int8 weights that reads each weight
once. An input is no uint8, but three digits to the base 128 say it to 2^-20 of the largest:

    x = unit (d0 + d1 / 128 + d2 / 128^2),    digits -64..64, unit = max |x| / 63

so a row becomes three rows, and what comes out is the weight-only product to the precision of fp32. Digits of seven bits
keep FBGEMM's sums of pairs inside 16 bits on CPUs without VNNI.

`pack_int8_weights` puts the weights into FBGEMM's order, in place: no second copy is held. `from_pretrained` calls it for a
model that torchao quantised (`TorchAoConfig(Int8WeightOnlyConfig())`) and that lies on a CPU.

    m rows of the input, k input channels, n output channels
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

try:  # imported for quantised models alone; who reads the imports of this file may not have it
    from torchao.quantization import Int8Tensor
except ImportError:
    Int8Tensor = Tensor

BASE = 128
LARGEST_DIGIT = 63
MIDDLE = 64  # added to a digit to make it unsigned
MAKER = "_make_per_channel_quantized_tensor"  # torch says that it will go with its quantised dtypes
MOST_ROWS = 256  # FBGEMM's three rows for one cost more than fp32 weights made anew once there are more rows


class PackedInt8Tensor(Int8Tensor):
    """An Int8Tensor (n, k) with one scale per row whose int8 values are kept in FBGEMM's order.

    Everything but linear layers sees the Int8Tensor that it was made of: moved to another device it is one again.
    """

    def __new__(cls, packed, scale: Tensor, shape: torch.Size, dtype: torch.dtype):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu", requires_grad=False)

    def __init__(self, packed, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        self.packed, self.scale = packed, scale
        self.block_size = [1, shape[1]]
        self.zero_point = self.act_quant_scale = self.act_quant_zero_point = self.act_pre_scale = None
        self.act_quant_kwargs, self.reduce_range = None, False

    @property
    def qdata(self) -> Tensor:
        """The values in their own order, (n, k) int8, a copy."""
        return self.packed.unpack()[0].int_repr()

    def plain(self) -> Int8Tensor:
        """torchao's tensor."""
        return Int8Tensor(self.qdata, self.scale, self.block_size, self.dtype)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return nn.Parameter(self.detach(), requires_grad=False)  # shared: nothing can write to it

    def __tensor_flatten__(self):
        raise TypeError(
            "torch.compile and torch.export cannot read packed int8 weights: unpack_int8_weights(model) first"
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            own = args[0]
            return return_and_correct_aliasing(func, args, kwargs, cls(own.packed, own.scale, own.shape, own.dtype))
        if func._schema.is_mutable:
            raise TypeError(f"{func} would write to packed int8 weights: unpack_int8_weights(model) first")
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs))
        return func(*args, **kwargs)


def _linear(x: Tensor, weight: PackedInt8Tensor, bias: Tensor | None = None) -> Tensor:
    num_rows = x.numel() // x.shape[-1]
    if not 0 < num_rows <= MOST_ROWS or (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, weight.plain(), bias)
    y = packed_product(x.reshape(num_rows, -1).float(), weight.packed).to(x.dtype)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def packed_product(x: Tensor, packed) -> Tensor:
    """x (m, k) fp32 times the packed weights -> (m, n) fp32, as if the weights alone were rounded."""
    unit = max(float(torch.linalg.vector_norm(x, torch.inf)), torch.finfo(torch.float32).tiny) / LARGEST_DIGIT
    rest = x * (1 / unit)
    digits = []
    for _ in range(2):
        digits.append(rest.round())
        rest.sub_(digits[-1]).mul_(BASE)
    y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        torch.cat([*digits, rest]), 1.0, MIDDLE, packed
    )
    return (torch.tensor([[unit, unit / BASE, unit / BASE**2]]) @ y.view(3, -1)).view(len(x), -1)


def pack_int8_weights(model: nn.Module) -> int:
    """Give every Linear with torchao's weight-only int8 weights on the CPU FBGEMM's order, in place.

    Returns:
        how many Linear modules were given it; 0 where torch has no FBGEMM, or no way to it.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines or not hasattr(torch, MAKER):
        return 0
    found = [module for module in model.modules() if isinstance(module, nn.Linear) and _can_pack(module.weight)]
    for module in found:
        weight = module.weight
        packed = PackedInt8Tensor(_pack(weight.qdata, weight.scale), weight.scale, weight.shape, weight.dtype)
        module.weight = nn.Parameter(packed, requires_grad=False)
        if _state_dict_of_plain not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_state_dict_of_plain)
    return len(found)


def unpack_int8_weights(model: nn.Module) -> int:
    """The reverse: torchao's own tensors again, for torch.compile and for whoever reads the weights."""
    found = [m for m in model.modules() if isinstance(getattr(m, "weight", None), PackedInt8Tensor)]
    for module in found:
        module.weight = nn.Parameter(module.weight.plain(), requires_grad=False)
    return len(found)


def _state_dict_of_plain(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: dict) -> None:
    """What is saved is torchao's tensor."""
    weight = state_dict.get(f"{prefix}weight")
    if isinstance(weight, PackedInt8Tensor):
        state_dict[f"{prefix}weight"] = weight.plain()


def _can_pack(weight: Tensor) -> bool:
    return (
        type(weight) is Int8Tensor
        and Int8Tensor is not Tensor
        and weight.device.type == "cpu"
        and list(weight.block_size) == [1, weight.shape[-1]]
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
        and (weight.zero_point is None or not weight.zero_point.any())
    )


def _pack(values: Tensor, scale: Tensor):
    """int8 (n, k) and its rows' scales (n, 1), packed by FBGEMM."""
    zeros = torch.zeros(len(values), dtype=torch.int64)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
            quantised = getattr(torch, MAKER)(values.contiguous(), scale.flatten().double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantised, None)
    finally:
        torch.backends.quantized.engine = engine
