"""The gate before any timing: what is timed must compute what transformers' own model computes from the same weights.

It is checked twice: on a few layers in fp32, gradients included, where rounding cannot hide a mistake; and on the model that is timed,
in the dtype that it is timed in, prefilled, continued step by step, and continued by replayed or compiled steps.
"""

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedConfig

from ..model.arguments import CACHE_NAME
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.decode_graph import can_replay
from .caches import empty_cache
from .models import Side, build_native, build_ours, depth_slice

LIMITS = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.15}  # norm of the difference over the norm
CPU_LIMIT = 1e-4  # of fp32 there; a GPU's products may be rounded more
SLICE_LIMIT = 1e-3
INT8_LIMIT = 1e-3  # int8 weights change the logits by a hundred times as much
SLICE_LAYERS = 6
NUM_STEPS = 6  # more than generate() takes before it captures a graph


def check_slice(config: NemotronHConfig, device: torch.device) -> dict[str, float]:
    """Logits and gradients of the first shallow slice that has all kinds of layers, in fp32; errors by name.

    Raises:
        ValueError: for an error over the limit; nothing may be timed then.
    """
    ours = build_ours(depth_slice(config, min(SLICE_LAYERS, config.num_hidden_layers)), torch.float32, device)
    native = build_native(ours)
    ids = random_ids(ours.model, 1, _odd_length(config))
    logits, gradients = {}, {}
    for side in (ours, native):
        output = side.model.train()(
            ids, labels=ids, use_cache=False, **({"skip_logits": False} if side is ours else {})
        )
        parameters = dict(side.model.named_parameters())
        gradients[side.name] = dict(zip(parameters, torch.autograd.grad(output.loss, list(parameters.values()))))
        logits[side.name] = output.logits.detach()
    errors = {
        "fp32 slice: logits, ours against native": difference(logits["ours"], logits["native"]),
        "fp32 slice: gradients, ours against native": max(
            difference(gradient, gradients["native"][name]) for name, gradient in gradients["ours"].items()
        ),
    }
    for name, error in errors.items():
        require(name, error, SLICE_LIMIT)
    return errors


@torch.no_grad()
def check_model(ours: Side, native: Side | None) -> dict[str, float]:
    """The model that is timed, in its dtype: against native, and its steps against one pass; errors by name.

    Raises:
        ValueError: for an error over the limit of its dtype.
    """
    ids = random_ids(ours.model, 2, _odd_length(ours.config))
    errors = {"steps of generate() against one pass": _steps_error(ours, ids, "eager", room=None)}
    if can_replay(ours.model):
        errors["replayed steps of generate() against one pass"] = _steps_error(ours, ids, "graphs", room=None)
    if native is not None:
        last = (side.model(ids, use_cache=False).logits[:, -NUM_STEPS:] for side in (ours, native))
        errors["logits, ours against native"] = difference(*last)
    return _require_all(errors, ours)


@torch.no_grad()
def check_int8(ours: Side, torchao: Side) -> dict[str, float]:
    """Our product with int8 weights against torchao's, of short and long inputs.

    Raises:
        ValueError: for an error over the limit.
    """
    name, lengths = "logits, ours against torchao", (1, 2, ours.config.chunk_size)
    inputs = [random_ids(ours.model, 1, length) for length in lengths]
    error = max(difference(ours.model(ids).logits, torchao.model(ids).logits) for ids in inputs)
    require(name, error, INT8_LIMIT)
    return {name: error}


@torch.no_grad()
def check_compiled(side: Side, rows: int, room: int) -> dict[str, float]:
    """The compiled steps of `generate()` against one pass, at the sizes that are timed, which avoids compiling twice."""
    length = min(_odd_length(side.config), room - 2 * NUM_STEPS)
    error = _steps_error(side, random_ids(side.model, rows, length), "compiled", room=room)
    return _require_all({f"{side.name}: compiled steps of generate() against one pass": error}, side)


def require(name: str, error: float, limit: float) -> None:
    """Refuse an error over the limit, NaN included."""
    if not error <= limit:
        raise ValueError(f"correctness gate: {name} differ by {error:.1e}; allowed is {limit:.0e}, nothing is timed")


def _require_all(errors: dict[str, float], side: Side) -> dict[str, float]:
    dtype = next(side.model.parameters()).dtype
    limit = CPU_LIMIT if side.device.type == "cpu" and dtype == torch.float32 else LIMITS[dtype]
    for name, error in errors.items():
        require(name, error, limit)
    return {f"{str(dtype).removeprefix('torch.')}: {name}": error for name, error in errors.items()}


def _steps_error(side: Side, ids: Tensor, variant: str, room: int | None) -> float:
    """Logits of the tokens that `generate()` makes, against one forward over all of them."""
    length = ids.shape[1]
    out = side.model.generate(
        ids,
        **{CACHE_NAME: empty_cache(side, room or length + NUM_STEPS + 1, static=variant == "compiled")},
        max_new_tokens=NUM_STEPS,
        output_logits=True,
        return_dict_in_generate=True,
        **greedy(variant),
    )
    full = side.model(out.sequences[:, :-1], use_cache=False).logits[:, length - 1 :]
    return difference(torch.stack(out.logits, dim=1), full)


def greedy(variant: str) -> dict:
    """Arguments of `generate()` that make it take the likeliest token, never stop, and run its steps "eager", from CUDA
    "graphs" where a model has them (its default), or "compiled"."""
    arguments = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "disable_compile": variant == "eager"}
    if variant != "compiled":
        return arguments
    config = CompileConfig()
    config._compile_all_devices = True  # transformers compiles on accelerators alone
    return {**arguments, "compile_config": config}


def difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in fp32."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def random_ids(model: nn.Module, rows: int, length: int) -> Tensor:
    """(rows, length) token ids, the same on every call, on the model's device."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def _odd_length(config: PreTrainedConfig) -> int:
    """Two chunks and a part of one."""
    chunk = config.chunk_size if isinstance(config, NemotronHConfig) else 128
    return 2 * chunk + chunk // 3
