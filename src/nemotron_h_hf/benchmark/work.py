"""What a job must move, compute and hold at least, from the configuration alone: the floor, and the predicted memory.

Works for Nemotron-H and for the Llama- and Qwen2-shaped models it is compared with. Weights, keys and values count in the dtype of
the run, recurrent states in fp32. `run_bytes` and `prefill_activation_bytes` are compared with measured peaks in
tests/benchmark/test_bench_work.py.

    b rows, t tokens of one pass over all rows, L tokens before and in it, s bytes of an element
    d hidden, i heads x head_dim of Mamba, c what the convolution sees, h its heads, w MLP width
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .. import cost
from ..model.configuration_nemotron_h import NemotronHConfig
from ..model.ssd import CHUNK_TOKENS, SEGMENT_TOKENS
from ..tensors import checkpoint_tensors


@dataclass(frozen=True)
class Costs:
    """Of one model in one dtype.

    Args:
        weight_bytes: everything stored.
        step_bytes: what each decode step reads at any batch size, without embeddings and routed experts.
        routed_bytes, routed_share: routed experts, and the share of them that one token is sent to.
        kv_bytes: per token of a sequence.
        state_bytes: per sequence, recurrent and convolution states.
        flops: per token through the stack, attention and lm_head left out.
        head_flops: per token that logits are made for.
        pair_flops: per pair of a token and one that it attends to.
    """

    weight_bytes: int
    step_bytes: int
    routed_bytes: int
    routed_share: float
    kv_bytes: int
    state_bytes: int
    flops: float
    head_flops: float
    pair_flops: float

    def decode(self, rows: int, context: int) -> tuple[float, float]:
        """Bytes and operations of one step: weights and cache read once, states read and written."""
        routed = self.routed_bytes * (1 - (1 - self.routed_share) ** rows)  # expected share of experts that are hit
        num_bytes = self.step_bytes + routed + rows * (context * self.kv_bytes + 2 * self.state_bytes)
        return num_bytes, rows * (self.flops + self.head_flops + context * self.pair_flops)

    def prefill(self, rows: int, length: int) -> tuple[float, float]:
        """Bytes and operations of a prompt, with logits of its last token."""
        pairs = length * (length + 1) / 2
        num_bytes = self.step_bytes + self.routed_bytes + rows * (length * self.kv_bytes + self.state_bytes)
        return num_bytes, rows * (length * self.flops + pairs * self.pair_flops + self.head_flops)

    def train(self, rows: int, length: int) -> tuple[float, float]:
        """Forward and backward; bytes of weights (read twice) and gradients. What is computed twice does not count."""
        pairs = length * (length + 1) / 2
        flops = rows * (length * (self.flops + self.head_flops) + pairs * self.pair_flops)
        return 3 * self.weight_bytes, 3 * flops


def costs_of(config: PreTrainedConfig, dtype: str) -> Costs:
    """Costs of a model with this configuration, in `dtype` (torch's name)."""
    return _hybrid_costs(config, dtype) if isinstance(config, NemotronHConfig) else _transformer_costs(config, dtype)


def _hybrid_costs(config: NemotronHConfig, dtype: str) -> Costs:
    size = cost.bytes_per_element(dtype)
    kinds = cost.parameters_by_kind(config)
    flops = cost.forward_flops_per_token(config, config.chunk_size)
    head_flops = 2 * config.vocab_size * config.hidden_size
    attention = flops.pop("attention") / (config.chunk_size + 1) * 2  # that of a pair; the mean token meets (l + 1) / 2
    table = 0 if config.tie_word_embeddings else kinds["embeddings"]
    weight_bytes = cost.weight_bytes(config, dtype)
    routed = kinds["moe_routed"]
    met = sum(cost.elements_per_token(config, it) for it in checkpoint_tensors(config) if it.kind == "moe_routed")
    return Costs(
        weight_bytes=weight_bytes,
        step_bytes=weight_bytes - size * (table + kinds["mtp"] + routed),
        routed_bytes=size * routed,
        routed_share=met / routed if routed else 0.0,
        kv_bytes=cost.kv_bytes_per_token(config, dtype),
        state_bytes=cost.ssm_state_bytes(config) + cost.conv_state_bytes(config, dtype),
        flops=sum(flops.values()) - head_flops,
        head_flops=head_flops,
        pair_flops=attention,
    )


def _transformer_costs(config: PreTrainedConfig, dtype: str) -> Costs:
    """Of a model of Llama's or Qwen2's build: SwiGLU of three matrices, grouped keys, one norm before each half."""
    size, hidden, layers = cost.bytes_per_element(dtype), config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads  # Qwen2's has no such field
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    matrices = layers * hidden * (2 * query + 2 * key_value + 3 * config.intermediate_size)
    biases = layers * (query + 2 * key_value) if config.model_type == "qwen2" else 0
    head, norms = config.vocab_size * hidden, (2 * layers + 1) * hidden
    table = 0 if config.tie_word_embeddings else head
    stack = matrices + biases + norms
    return Costs(
        weight_bytes=size * (stack + head + table),
        step_bytes=size * (stack + head),
        routed_bytes=0,
        routed_share=0.0,
        kv_bytes=2 * layers * key_value * size,
        state_bytes=0,
        flops=2 * matrices,
        head_flops=2 * head,
        pair_flops=4 * layers * query,
    )


def run_bytes(config: PreTrainedConfig, rows: int, room: int, pass_tokens: int, dtype: str) -> dict[str, int]:
    """Predicted memory of inference: weights, keys and values with room for `room` tokens, states, activations of one pass.

    Args:
        pass_tokens: tokens of each row that go through the layers at once; 1 while decoding.
    """
    costs = costs_of(config, dtype)
    parts = {"weights": costs.weight_bytes, "kv": rows * room * costs.kv_bytes, "state": rows * costs.state_bytes}
    if isinstance(config, NemotronHConfig):
        parts["activations"] = prefill_activation_bytes(config, rows, pass_tokens, room, dtype)
    else:
        width = max(3 * config.intermediate_size, 4 * config.hidden_size)
        parts["activations"] = cost.bytes_per_element(dtype) * rows * pass_tokens * (3 * config.hidden_size + width)
    return {**parts, "total": sum(parts.values())}


def prefill_activation_bytes(config: NemotronHConfig, rows: int, tokens: int, past: int, dtype: str) -> int:
    """Most bytes alive inside one block of a forward without gradients, in PyTorch's ops (fused kernels need less).

    Every block adds the embeddings, its input and its normed input, 3 s d per token (2 s d for the first block),
    and where a part of a prompt continues a cache in fp32, the mask of that part, L bytes per token (FlashAttention, in 16
    bits, needs none; nor does a CPU, with attention in two pieces). On top, per token:
        the norm, its input and its output in fp32 unless they are: 8 d
        M  in_proj's output s (i + c + h), the convolution's s c, step sizes 4 h, and in the gated norm the scan's output,
           the gate and its SiLU in fp32: 12 i (8 i if s is 4); and one segment of the scan (`_segment_bytes`)
        *  query, keys, values, output; under a mask also the kernel's own copy of it, s L, and keys and values repeated for
           every query head
        -  up_proj's output and its squared ReLU: 2 s w
        E  each token's copy for every expert it is sent to, and the widths of those experts
    """
    s, d, count = cost.bytes_per_element(dtype), config.hidden_size, rows * tokens
    blocks = [_block_bytes(config, index, rows, tokens, past, s) for index in range(config.num_hidden_layers)]
    later = [s * d * count * (index > 0) for index in range(len(blocks))]  # embeddings, in addition to another input
    norm = s * d * count + (0 if s == 4 else count * 8 * d)
    masked = "full_attention" in config.layers_block_type and s == 4 and 1 < tokens < past
    return int(count * 2 * s * d + max(norm, *map(sum, zip(blocks, later))) + masked * count * past)


def _block_bytes(config: NemotronHConfig, index: int, rows: int, tokens: int, past: int, s: int) -> float:
    kind, count = config.layers_block_type[index], rows * tokens
    if kind == "linear_attention":
        i, heads = config.mamba_width(index), config.size("mamba_num_heads", index)
        per_token = s * (i + 2 * config.conv_width(index) + heads) + 4 * heads
        scanned = count * (per_token + 4 * i) + _segment_bytes(config, index, rows, tokens)
        return max(scanned, count * (per_token + (8 if s == 4 else 12) * i))
    if kind == "full_attention":
        query = config.size("num_attention_heads", index) * config.head_dim
        masked = rows * past * s * (tokens + 2 * query) if s == 4 and 1 < tokens < past else 0
        return count * s * 2 * (query + config.num_key_value_heads * config.head_dim) + masked
    if kind == "mlp":
        return count * 2 * s * config.size("intermediate_size", index)
    chosen, width, latent, shared = (config.size(field, index) for field in
                                     ("num_experts_per_tok", "moe_intermediate_size", "moe_latent_size",
                                      "moe_shared_expert_intermediate_size"))  # fmt: skip
    return count * s * (chosen * 2 * (width + (latent or config.hidden_size)) + 2 * shared)


def _segment_bytes(config: NemotronHConfig, index: int, rows: int, tokens: int) -> int:
    """One segment of `ssd.scan`: its decays (h q), inputs in fp32 and by head, outputs, what goes into and out of states."""
    tokens = min(tokens, SEGMENT_TOKENS)
    chunk = min(tokens, CHUNK_TOKENS, config.chunk_size)
    i, groups, state = config.mamba_width(index), config.n_groups, config.ssm_state_size
    per_token = (config.size("mamba_num_heads", index) + groups) * chunk + 5 * i + 2 * groups * state
    states = 3 * -(-tokens // chunk) * i * state
    return 4 * rows * (tokens * per_token + states)
