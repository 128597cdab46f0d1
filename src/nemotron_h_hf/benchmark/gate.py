"""The gate before any timing: a fast model that computes something else has no speed."""

import torch
from torch import Tensor, nn

from ..model.arguments import CACHE_NAME, cache_of
from .sides import Shape, Sides, random_tokens, train_step

MAX_LOGIT_ERROR = 1e-4  # absolute; logits of the random model are about 1
MAX_GRADIENT_ERROR = 1e-3  # norm of the difference over the norm, the worst parameter
MAX_INT8_ERROR = 1e-3  # absolute; int8 weights change these logits by 0.2
NUM_CACHED_STEPS = 8


def check_agreement(sides: Sides, shape: Shape) -> dict[str, float]:
    """Compare ours with native, with itself through the cache, and its gradients with native's.

    Returns:
        the errors found, by name.

    Raises:
        ValueError: for an error over its limit; nothing may be timed then.
    """
    length = 2 * shape.chunk_size + shape.chunk_size // 3  # ends inside a chunk
    ids = random_tokens(shape, length)
    with torch.no_grad():
        full, native = sides.ours(ids).logits, sides.native(ids).logits
        cached = cached_logits(sides.ours, ids, length - NUM_CACHED_STEPS)
    errors = {
        "logits, ours against native": largest_difference(full, native),
        "logits, prefill and steps against one pass": largest_difference(cached, full[:, -cached.shape[1] :]),
        "gradients, ours against native": gradient_difference(sides, shape, length),
    }
    for name, error in errors.items():
        limit = MAX_GRADIENT_ERROR if name.startswith("gradients") else MAX_LOGIT_ERROR
        require(name, error, limit)
    return errors


def check_int8(models: dict[str, nn.Module], shape: Shape) -> float:
    """The largest difference of logits between torchao's product with int8 weights and ours, of short and long inputs."""
    error = 0.0
    with torch.no_grad():
        for length in (1, 2, shape.chunk_size):
            ids = random_tokens(shape, length)
            error = max(error, largest_difference(models["int8"](ids).logits, models["torchao"](ids).logits))
    require("logits, int8.py against torchao", error, MAX_INT8_ERROR)
    return error


def require(name: str, error: float, limit: float = MAX_LOGIT_ERROR) -> None:
    """Refuse an error over the limit, NaN included."""
    if not error <= limit:
        raise ValueError(f"correctness gate: {name} differ by {error:.1e}; allowed is {limit:.0e}, nothing is timed")


def largest_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b|."""
    return float((a - b).abs().max())


def cached_logits(model: nn.Module, ids: Tensor, num_prompt: int) -> Tensor:
    """(1, 1 + steps, vocab): logits of the prompt's last token and of the tokens after it, fed one by one."""
    output = model(ids[:, :num_prompt], use_cache=True, logits_to_keep=1)
    logits = [output.logits]
    for place in range(num_prompt, ids.shape[1]):
        output = model(ids[:, place, None], **{CACHE_NAME: cache_of(output)}, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def gradient_difference(sides: Sides, shape: Shape, length: int) -> float:
    """The largest relative difference over the parameters; leaves both models without gradients, in evaluation mode."""
    for model in (sides.ours, sides.native):
        train_step(model, shape, length)
    expected = {name: p.grad for name, p in sides.native.named_parameters()}
    errors = [(p.grad - expected[name]).norm() / expected[name].norm() for name, p in sides.ours.named_parameters()]
    for model in (sides.ours, sides.native):
        model.zero_grad(set_to_none=True)
        model.eval()
    return float(torch.stack(errors).max())
