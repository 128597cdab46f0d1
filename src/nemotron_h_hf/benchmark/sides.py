"""What `nemotron-h bench cpu` compares: our model, transformers' own with the same weights, and the floor beneath both.

The floor is what no implementation can skip: the model's own Linear layers, called alone, at the shapes of the job. It
uses our model's modules; the native model shares their storage, so all three read the same weights. For decoding there is
also `linear`, the same layers as torch multiplies them: slower for few rows than ours (linear.py).

    b batch (1), l length
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers.models.nemotron_h import NemotronHConfig as NativeConfig
from transformers.models.nemotron_h import NemotronHForCausalLM as NativeForCausalLM

from ..model.arguments import CACHE_NAME, cache_of
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.linear import project
from ..model.modeling_nemotron_h import NemotronHForCausalLM

SEED = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are the 189M one that the targets are set for. Names are those of the config."""

    hybrid_override_pattern: str = "M-M-M*-M-M-M*-M-"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 64
    mamba_num_heads: int = 32
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    chunk_size: int = 128
    vocab_size: int = 32000


@dataclass(frozen=True)
class Sides:
    """Both models in fp32, with one set of weights."""

    ours: NemotronHForCausalLM
    native: NativeForCausalLM


def build_sides(shape: Shape) -> Sides:
    """Random weights from a fixed seed; building needs no disk."""
    torch.manual_seed(SEED)
    ours = NemotronHForCausalLM(NemotronHConfig(**asdict(shape))).float().eval()
    spread_weights(ours)
    with torch.device("meta"):
        native = NativeForCausalLM(NativeConfig(**asdict(shape)))
    native.load_state_dict(ours.state_dict(), assign=True)
    native.requires_grad_(True)
    for layer in native.model.layers:
        if layer.block_type == "linear_attention":
            # Its prefill, not its decoding, clamps step sizes from below by time_step_min; the reference never does.
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return Sides(ours, native.eval())


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Weights that let every layer matter; fresh ones are so small and even that the gate would miss mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif name.endswith(".D"):
            parameter.normal_()


def random_tokens(shape: Shape, length: int) -> Tensor:
    """(1, l) token ids, the same on every call."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, shape.vocab_size, (1, length), generator=generator)


def prefill_jobs(sides: Sides, shape: Shape, length: int) -> dict[str, Callable[[], Tensor]]:
    """One prompt with a new cache -> logits (vocab) of its last token, by side; the floor's have no meaning."""
    ids = random_tokens(shape, length)

    def prefill(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=True, logits_to_keep=1).logits[0, -1]

    floor = floor_job(sides.ours, length, num_logits=1)
    return {"floor": floor, "native": lambda: prefill(sides.native), "ours": lambda: prefill(sides.ours)}


def decode_jobs(sides: Sides, shape: Shape, context: int, num_steps: int) -> dict[str, Callable[[], Tensor]]:
    """`num_steps` tokens, one forward each, after `context` tokens; every call continues where the last one ended."""
    ids = random_tokens(shape, context)

    def repeated(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: [step() for _ in range(num_steps)][-1]

    return {
        "floor": repeated(floor_job(sides.ours, 1, num_logits=1)),
        "linear": repeated(floor_job(sides.ours, 1, num_logits=1, by_torch=True)),
        "native": decoder(sides.native, ids, num_steps),
        "ours": decoder(sides.ours, ids, num_steps),
    }


def decoder(model: nn.Module, ids: Tensor, num_steps: int) -> Callable[[], Tensor]:
    """`num_steps` tokens, one forward each, after the prompt `ids`; every call continues where the last one ended."""
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True, logits_to_keep=1))

    def decode() -> Tensor:
        with torch.no_grad():
            for step in range(num_steps):
                token = ids[:, step % ids.shape[1], None]
                logits = model(token, **{CACHE_NAME: cache}, use_cache=True).logits
        return logits[0, -1]

    return decode


def int8_models(model: NemotronHForCausalLM) -> dict[str, NemotronHForCausalLM]:
    """The model, and its copies with int8 weights: as torchao multiplies them, as int8.py does, lm_head in fp32 and not."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantised, whole = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(
        quantised, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"
    )
    quantize_(whole, Int8WeightOnlyConfig())
    by_torchao = copy.deepcopy(quantised)
    for module in by_torchao.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.register_forward_hook(lambda *_: None)  # called as a module, it multiplies as torchao does
    return {"fp32": model, "torchao": by_torchao, "int8": quantised, "int8_head": whole}


def train_jobs(sides: Sides, shape: Shape, length: int) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward with labels, gradients from scratch -> the loss, by side (the floor's has no meaning)."""
    return {
        "floor": floor_train_job(sides.ours, length),
        "native": lambda: train_step(sides.native, shape, length),
        "ours": lambda: train_step(sides.ours, shape, length),
    }


def train_step(model: nn.Module, shape: Shape, length: int) -> Tensor:
    """Gradients of one sequence; the loss, detached."""
    model.train()
    model.zero_grad(set_to_none=True)
    ids = random_tokens(shape, length)
    options = {"skip_logits": True} if isinstance(model, NemotronHForCausalLM) else {}  # as our Trainer asks
    loss = model(ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach()


def floor_job(
    model: NemotronHForCausalLM, length: int, num_logits: int, by_torch: bool = False
) -> Callable[[], Tensor]:
    """Every Linear of the stack at (1, l, in), `lm_head` at the positions whose logits the job needs; as the model calls
    them, or `by_torch`."""

    def call(linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x) if by_torch else project(linear, x)

    linears = stack_linears(model)
    inputs = {width: torch.randn(1, length, width) for width in {linear.in_features for linear in linears}}
    head_input = torch.randn(1, num_logits, model.lm_head.in_features)

    def run() -> Tensor:
        with torch.no_grad():
            for linear in linears:
                call(linear, inputs[linear.in_features])
            return call(model.lm_head, head_input)[0, -1]

    return run


def floor_train_job(model: NemotronHForCausalLM, length: int) -> Callable[[], Tensor]:
    """Every Linear, `lm_head` at all positions: forward, then the gradients of its input and its weights."""
    linears = [*stack_linears(model), model.lm_head]
    inputs = {width: torch.randn(1, length, width, requires_grad=True) for width in {n.in_features for n in linears}}
    outputs = {width: torch.randn(1, length, width) for width in {n.out_features for n in linears}}

    def run() -> Tensor:
        for linear in linears:
            given = inputs[linear.in_features]
            gradients = torch.autograd.grad(linear(given), (given, *linear.parameters()), outputs[linear.out_features])
        return gradients[0].sum()

    return run


def stack_linears(model: NemotronHForCausalLM) -> list[nn.Linear]:
    """The Linear layers of all blocks, in order."""
    return [module for module in model.model.modules() if isinstance(module, nn.Linear)]
