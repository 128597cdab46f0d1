"""When a layer may be computed from its weights, without calling it: it is not replaced and has no hooks.

Every projection is a plain `nn.Linear` and the convolution a plain `nn.Conv1d`, because tools look for exactly these
types (bitsandbytes, torchao, Model-Optimizer, torch's quantize_dynamic). A layer that such a tool puts in their place, or
one with a hook or a replaced `forward` (accelerate's offloading), is called as a module.
"""

from collections.abc import Iterable
from weakref import ref

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

FORWARDS = {nn.Linear: nn.Linear.forward, nn.Conv1d: nn.Conv1d.forward}  # a tool may put its own into the classes
PLAIN_TENSORS = (Tensor, nn.Parameter)
REORDERED: list[type[nn.Linear]] = []
"""Linear classes whose weight's rows and columns are in another order than outputs and inputs: `row_order` (out) has the row
of each output, `column_order` (columns) the input of each column, int64 on the CPU, or None."""


def remember_forward(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator for our own layers that may be computed without a call."""
    FORWARDS[kind] = kind.forward
    return kind


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly of this class, one in `FORWARDS` with that forward still, and without hooks."""
    if type(module) is not kind or "forward" in module.__dict__ or has_hooks(module):
        return False
    return FORWARDS.get(kind) is kind.forward


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, its own or those of all modules."""
    return any(_hooks(module)) or torch_module._has_any_global_hook()


def _hooks(module: nn.Module) -> tuple[dict, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def classes_are_plain() -> bool:
    """Whether all classes in `FORWARDS` have that forward still, and no hooks of all modules are there."""
    if torch_module._has_any_global_hook():
        return False
    return all(kind.forward is forward for kind, forward in FORWARDS.items())


class Seen:
    """What a module and its parts were when something was made of their weights, to know whether that is still true.

    Compared are the classes, every attribute, part and tensor by identity, and the tensors' memory; hooks, there must be none.
    No module or weight is kept alive by it.

    Args:
        module: without hooks.
        copied: tensors whose values were read, not only their place.
    """

    def __init__(self, module: nn.Module, copied: Iterable[Tensor] = ()) -> None:
        modules = list(module.modules())
        self.parts = [(ref(m), type(m), *map(_ids, _tables(m))) for m in modules]
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        wrapped = [t for t in tensors if type(t) not in PLAIN_TENSORS]  # a quantised weight holds others
        inner = [t for each in wrapped for t in vars(each).values() if type(t) in PLAIN_TENSORS]
        self.wrapped = [(ref(t), _ids(vars(t))) for t in wrapped]
        tensors = [t for t in tensors if type(t) in PLAIN_TENSORS] + inner
        self.memory = [(ref(t), t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        self.values = [(ref(t), None if t.is_inference() else t._version) for t in copied]
        self.hooks = [hooks for m in modules for hooks in _hooks(m)]
        attributes = [value for m in modules for name, value in vars(m).items() if name not in TABLES]
        self.alive = [
            *attributes,
            *(value for t in wrapped for value in vars(t).values() if not isinstance(value, Tensor)),
        ]

    def holds(self) -> bool:
        """Whether all is as it was."""
        if any(self.hooks):
            return False
        for at, kind, attributes, modules, parameters, buffers in self.parts:
            part = at()
            if (
                part is None
                or type(part) is not kind
                or _ids(vars(part)) != attributes
                or _ids(part._modules) != modules
            ):
                return False
            if _ids(part._parameters) != parameters or _ids(part._buffers) != buffers:
                return False
        for at, address, dtype, shape, strides in self.memory:
            t = at()
            if (
                t is None
                or t.data_ptr() != address
                or t.dtype is not dtype
                or t.shape != shape
                or t.stride() != strides
            ):
                return False
        if not all((t := at()) is not None and _ids(vars(t)) == ids for at, ids in self.wrapped):
            return False
        return all(
            (t := at()) is not None and version is not None and t._version == version for at, version in self.values
        )


TABLES = ("_modules", "_parameters", "_buffers")


def _tables(module: nn.Module) -> tuple[dict, ...]:
    return vars(module), module._modules, module._parameters, module._buffers


def _ids(table: dict) -> list[int]:
    """Of objects that live: of those that died, others may have them."""
    return list(map(id, table.values()))


def is_watched(module: nn.Module) -> bool:
    """Whether hooks read or change what parts of the module compute. Accelerate's hooks, which only move tensors, do not
    count, nor those by which transformers records outputs on request."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(_is_changed(part) for part in module.modules() if part is not module)


def _is_changed(part: nn.Module) -> bool:
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    if any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks):
        return True
    return "forward" in part.__dict__ and "_hf_hook" not in part.__dict__
