"""What training costs one of many GPUs: bytes of states and activations, bytes sent, under FSDP2 and tensor parallelism.

Nothing is allocated: all follows from the configuration. The formulas count what this model and torch really do, and
tests/experiments/test_scaling.py compares them with small runs; docs/scaling.md says which, and what is assumed. Dense models only.
`table.py` prints the tables of docs/scaling.md.

    D data-parallel ranks (FSDP2 shards over them), T tensor-parallel ranks, D T GPUs; t tokens in one pass of a rank
    d hidden, i heads x head_dim of Mamba, c what the convolution sees, w MLP width, V vocabulary
    s bytes of one number in compute: 2 in bfloat16. Master weights, their gradients and AdamW's two moments are fp32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nemotron_h_hf import NemotronHConfig
from nemotron_h_hf.cost import forward_flops_per_token
from nemotron_h_hf.model.loss import CHUNKS_AT_ONCE, KEPT_LOGITS, LOGITS_PER_CHUNK
from nemotron_h_hf.model.ssd import KEPT_TOKENS, SEGMENT_TOKENS
from nemotron_h_hf.tensors import WeightShape, checkpoint_tensors

PAPER_TOKENS_PER_STEP = 768 * 8192
LM_HEAD_RULE = {"lm_head": "colwise_gather_output"}


@dataclass(frozen=True)
class Plan:
    """How a run is spread over GPUs.

    Args:
        tokens_per_pass: rows x length of one forward and backward of a rank; a step has as many passes as it takes.
        reduce_each_pass: reduce-scatter gradients after every pass; False does so once a step and keeps whole gradients.
        element_bytes: of activations and of gathered weights and gradients.
        fused_norm: RMSNorm keeps its input once (torch's GPU kernel), or also the normalised one (on a CPU).
    """

    data_parallel: int = 1
    tensor_parallel: int = 1
    tokens_per_step: int = PAPER_TOKENS_PER_STEP
    tokens_per_pass: int = 8192
    checkpointing: bool = True
    reduce_each_pass: bool = True
    element_bytes: int = 2
    fused_norm: bool = True

    @property
    def passes(self) -> int:
        """Forward and backward passes of each rank in a step."""
        count, rest = divmod(self.tokens_per_step, self.data_parallel * self.tokens_per_pass)
        if rest or not count:
            raise ValueError(
                f"data_parallel={self.data_parallel}: allowed are numbers of ranks that share {self.tokens_per_step:,} "
                f"tokens per step in whole passes of {self.tokens_per_pass:,}"
            )
        return count


# States: each tensor is cut by the tensor-parallel plan, then by FSDP2 along its first dimension


def rank_elements(config: NemotronHConfig, plan: Plan, data_rank: int = 0, tensor_rank: int = 0) -> int:
    """Elements of all parameters that one rank keeps; ranks of number 0 keep the most."""
    return sum(
        _chunk(shape[0], plan.data_parallel, data_rank) * math.prod(shape[1:])
        for _, shape in tensor_parallel_shapes(config, plan.tensor_parallel, tensor_rank)
    )


def state_bytes(config: NemotronHConfig, plan: Plan, data_rank: int = 0, tensor_rank: int = 0) -> dict[str, int]:
    """Bytes that one rank keeps from step to step: fp32 weights, their gradients, AdamW's moments."""
    elements = rank_elements(config, plan, data_rank, tensor_rank)
    states = {"weights": 4 * elements, "gradients": 4 * elements, "moments": 8 * elements}
    if not plan.reduce_each_pass and plan.passes > 1:  # kept whole until the last pass
        states["gradients"] = plan.element_bytes * _total(tensor_parallel_shapes(config, plan.tensor_parallel))
    return states


def tensor_parallel_shapes(
    config: NemotronHConfig, tensor_parallel: int, rank: int = 0
) -> Iterator[tuple[WeightShape, tuple[int, ...]]]:
    """Each tensor of the model with the shape that one tensor-parallel rank holds, by the model's own plan."""
    if "moe" in config.layers_block_type or config.num_nextn_predict_layers:
        raise ValueError(f"pattern is {config.hybrid_override_pattern}: allowed are M, * and -, without MTP layers")
    rules = config.base_model_tp_plan | LM_HEAD_RULE
    for tensor in checkpoint_tensors(config):
        module, _, last = tensor.name.removeprefix("backbone.").rpartition(".")
        rule = rules.get(re.sub(r"\.\d+\.", ".*.", module), "")
        shape = list(tensor.shape)
        if rule.startswith(("colwise", "embedding_rowwise")):
            shape[0] = _chunk(shape[0], tensor_parallel, rank)
        elif rule.startswith("rowwise") and last == "weight":
            shape[1] = _chunk(shape[1], tensor_parallel, rank)
        yield tensor, tuple(shape)


def fsdp_groups(config: NemotronHConfig, plan: Plan) -> dict[str, int]:
    """Padded elements that each FSDP2 unit gathers, in order of depth, as accelerate makes them: embeddings, every
    block, and final norm with lm_head, whose weights stay gathered from forward to backward."""
    groups: dict[str, int] = {}
    for tensor, shape in tensor_parallel_shapes(config, plan.tensor_parallel):
        parts = tensor.name.split(".")
        name = ".".join(parts[1:3]) if parts[1] == "layers" else "embeddings" if parts[1] == "embeddings" else "tail"
        padded = _chunk(shape[0], plan.data_parallel) * plan.data_parallel * math.prod(shape[1:])
        groups[name] = groups.get(name, 0) + padded
    return groups


def gathered_bytes(config: NemotronHConfig, plan: Plan) -> int:
    """Most bytes of whole weights and gradients at one time: the tail, a block with its neighbour, which is fetched
    ahead, and the gradients of whichever is larger."""
    *_, tail = groups = list(fsdp_groups(config, plan).values())
    pair = max(a + b for a, b in zip(groups[:-1], groups[1:-1]))
    return plan.element_bytes * (tail + pair + max(tail, pair))


# Activations: what autograd keeps between forward and backward


def kept_bytes(config: NemotronHConfig, kind: str, width: int, plan: Plan) -> int:
    """Bytes per token that one layer keeps, `width` being an MLP's.

    All: the norm's input in fp32 (4 d, on a CPU also normalised) and its scale (4), and its output (s d).
    M: in_proj's output (s (i + c + heads)), whole on every tensor-parallel rank, and out_proj's input (s i / T);
       convolution, scan and gated norm are computed again.
    *: query, key, value, output, and 4 bytes per head, all / T (no mask: FlashAttention, or rows of one document).
    -: up_proj's output after ReLU, and its square, each s w / T.
    """
    s, tp = plan.element_bytes, plan.tensor_parallel
    kept = _norm_bytes(config, plan)
    if kind == "linear_attention":
        inner = config.mamba_intermediate_size
        return kept + s * (inner + config.conv_dim + config.mamba_num_heads) + s * inner // tp
    if kind == "full_attention":
        heads, key_heads = config.num_attention_heads // tp, config.num_key_value_heads // tp
        return kept + 2 * s * (heads + key_heads) * config.head_dim + 4 * heads
    return kept + 2 * s * width // tp


def activation_bytes(config: NemotronHConfig, plan: Plan, tokens: int | None = None) -> int:
    """Bytes of activations that a pass keeps between forward and backward, the loss included.

    With checkpointing a layer keeps its input alone (s d per token). The loss keeps logits only of a small batch.
    """
    tokens = plan.tokens_per_pass if tokens is None else tokens
    s, d, vocab = plan.element_bytes, config.hidden_size, config.vocab_size
    per_token = 8 + _norm_bytes(config, plan) + 8  # token ids, the final norm, labels
    per_token += 4 * vocab if tokens * vocab <= KEPT_LOGITS else 0
    layers = _layers(config)
    per_token += (
        s * d * len(layers) if plan.checkpointing else sum(kept_bytes(config, *layer, plan) for layer in layers)
    )
    num_norms = 1 if plan.checkpointing else 1 + len(layers)
    copies = 4 * d * num_norms if s < 4 and not plan.fused_norm else 0  # of the norms' weights, in fp32
    return per_token * tokens + copies


def working_bytes(config: NemotronHConfig, plan: Plan, tokens: int | None = None) -> int:
    """Most bytes alive for a while in the backward pass: a block computed again, with the inside of a Mamba mixer, and
    one chunk of logits with its gradient (whichever is larger)."""
    tokens = plan.tokens_per_pass if tokens is None else tokens
    blocks = [
        tokens * (kept_bytes(config, kind, width, plan) if plan.checkpointing else 0)
        + (mixer_bytes(config, plan, tokens) if kind == "linear_attention" else 0)
        for kind, width in _layers(config)
    ]
    logits = min(tokens * config.vocab_size, LOGITS_PER_CHUNK * CHUNKS_AT_ONCE["cuda"]) * (
        2 * plan.element_bytes + 3 * 4
    )
    return max(*blocks, logits)


def mixer_bytes(config: NemotronHConfig, plan: Plan, tokens: int) -> int:
    """Bytes inside one Mamba mixer while its backward runs, on the PyTorch path; the fused kernels should keep less.

    Per token s c for the convolution's output (it keeps no more); 5 x 4 i and 8 groups for the scan's output and the
    gated norm; 2 x 4 heads for step sizes; and a state of 4 i n per segment of 512 tokens. Each rank of a
    tensor-parallel group does all of it.
    """
    if tokens <= KEPT_TOKENS or tokens % SEGMENT_TOKENS:
        raise ValueError(f"tokens is {tokens}: allowed are multiples of {SEGMENT_TOKENS} above {KEPT_TOKENS}")
    s, inner, state = plan.element_bytes, config.mamba_intermediate_size, config.ssm_state_size
    conv = s * config.conv_dim * tokens
    scan = tokens * (20 * inner + 8 * config.n_groups + 8 * config.mamba_num_heads)
    return conv + scan + 4 * inner * state * tokens // SEGMENT_TOKENS


# Bytes sent


def fsdp_bytes_sent(config: NemotronHConfig, plan: Plan) -> dict[str, int]:
    """Bytes that one rank sends in a step (and receives), in rings: (D - 1) / D of what is gathered or reduced.

    A pass gathers embeddings and blocks twice, forward and backward, the tail once. Gradients are reduce-scattered after
    every pass, or once a step.
    """
    groups = fsdp_groups(config, plan)
    s, ranks = plan.element_bytes, plan.data_parallel
    gathered = 2 * sum(groups.values()) - groups["tail"]
    reductions = plan.passes if plan.reduce_each_pass else 1
    return {
        "all_gather": plan.passes * s * gathered * (ranks - 1) // ranks,
        "reduce_scatter": reductions * s * sum(groups.values()) * (ranks - 1) // ranks,
    }


def tensor_parallel_traffic(config: NemotronHConfig, kind: str, checkpointing: bool = False) -> dict[str, int]:
    """Numbers per token that the plan all-reduces and all-gathers for a layer, forward and backward, by its kind.

    M: in_proj's output is gathered, out_proj's is summed; backward sums in_proj's input gradient and gathers out_proj's.
    *: o_proj's output is summed; backward sums three input gradients, one of each projection.
    -: down_proj's output is summed; backward sums up_proj's input gradient.
    `embeddings` sums its output, `lm_head` gathers logits and sums its input gradient. A layer that is computed again
    talks again; the loss in chunks always does.
    """
    d, inner = config.hidden_size, config.mamba_intermediate_size
    again = 2 if checkpointing else 1
    if kind == "linear_attention":
        projected = inner + config.conv_dim + config.mamba_num_heads
        return {"all_reduce": (again + 1) * d, "all_gather": again * projected + inner}
    if kind == "lm_head":
        return {"all_reduce": d, "all_gather": again * config.vocab_size}
    backward = {"full_attention": 3 * d, "mlp": d, "embeddings": 0}[kind]
    forward = d if kind == "embeddings" else again * d
    return {"all_reduce": forward + backward, "all_gather": 0}


def tensor_parallel_bytes_sent(config: NemotronHConfig, plan: Plan) -> int:
    """Bytes that one rank sends in a step, in rings: 2 (T - 1) / T of what is summed, (T - 1) / T of what is gathered."""
    kinds = [*config.layers_block_type, "embeddings", "lm_head"]
    total = 0
    for kind in kinds:
        traffic = tensor_parallel_traffic(config, kind, plan.checkpointing or kind == "lm_head")
        total += 2 * traffic["all_reduce"] + traffic["all_gather"]
    ranks = plan.tensor_parallel
    return plan.passes * plan.tokens_per_pass * plan.element_bytes * total * (ranks - 1) // ranks


def flops_per_gpu(config: NemotronHConfig, plan: Plan) -> float:
    """Of a step, recomputation included, the backward pass as two forward ones.

    Convolution and scan run whole on every tensor-parallel rank, all else is split. The inside of a Mamba mixer and
    lm_head are computed again in any case, the former once more with checkpointing.
    """
    parts = forward_flops_per_token(config, plan.tokens_per_pass)
    split = (parts["linear"] + parts["attention"]) * (4 if plan.checkpointing else 3)
    split += 0 if plan.checkpointing else 2 * config.hidden_size * config.vocab_size
    split /= plan.tensor_parallel
    whole = (parts["scan"] + parts["conv"]) * (5 if plan.checkpointing else 4)
    return (split + whole) * plan.passes * plan.tokens_per_pass


def _layers(config: NemotronHConfig) -> list[tuple[str, int]]:
    """Kind and MLP width of each layer."""
    widths = iter(config.mlp_widths)
    return [(kind, next(widths) if kind == "mlp" else 0) for kind in config.layers_block_type]


def _norm_bytes(config: NemotronHConfig, plan: Plan) -> int:
    return (4 if plan.fused_norm else 8) * config.hidden_size + 4 + plan.element_bytes * config.hidden_size


def _chunk(size: int, parts: int, number: int = 0) -> int:
    """Rows of the `number`-th of `parts` chunks, as torch.chunk cuts: the first ones are full."""
    full = -(-size // parts)
    return max(0, min(full, size - number * full))


def _total(shapes: Iterator[tuple[WeightShape, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) for _, shape in shapes)
