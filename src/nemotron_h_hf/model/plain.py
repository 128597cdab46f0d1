"""When a layer may be computed from its weights, without calling it: it is not replaced and has no hooks.

Every projection is a plain `nn.Linear` and the convolution a plain `nn.Conv1d`, because tools look for exactly these
types (bitsandbytes, torchao, Model-Optimizer, torch's quantize_dynamic). A layer that such a tool puts in their place, or
one with a hook or a replaced `forward` (accelerate's offloading), is called as a module.
"""

from torch import nn
from torch.nn.modules import module as torch_module

FORWARDS = {nn.Linear: nn.Linear.forward, nn.Conv1d: nn.Conv1d.forward}  # a tool may put its own into the classes
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
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or torch_module._has_any_global_hook()


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
