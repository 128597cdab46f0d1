"""One layer: x + mixer(norm(x)), where the mixer is Mamba-2, attention, an MLP or a mixture of experts.

What a mixer needs beyond its input (cache, masks, padding, documents) is computed once per forward in `NemotronHModel`;
`run_blocks` hands it on, and each block takes what its kind of mixer needs.

    b batch, l length
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .arguments import PASSED_TO_ATTENTION, one_cache, refuse_unknown
from .cache import sequence_length
from .configuration_nemotron_h import NemotronHConfig
from .kernels import attends_in_triton
from .linear import project
from .mamba2 import NemotronHMamba2Mixer
from .moe import NemotronHMLP, NemotronHMoE
from .padding import Padding, Rows, flash_offsets, mask_name, within_window
from .plain import remember_forward
from .ssd import inverse_rms, wide
from .token import TokenRun, can_take_token


@remember_forward
class NemotronHRMSNorm(nn.Module):
    """x / rms(x) * weight, all in fp32, in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        if not (x.is_cuda and x.dtype == weight.dtype):  # a kernel that computes in fp32 and rounds once
            x, weight = wide(x), wide(weight)
        # There PyTorch's has no kernel, only a dozen small ops
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            normed = (x * inverse_rms(x, self.variance_epsilon)).mul_(weight)
        else:
            normed = nn.functional.rms_norm(x, weight.shape, weight, self.variance_epsilon)
        return normed.to(hidden_states.dtype)


@remember_forward
class NemotronHAttention(nn.Module):
    """Causal attention with grouped keys and values and no position embedding (order comes from the Mamba layers).

    With a `sliding_window` a token sees that many, itself included; a mask says so, or it is None and `attend_in_window` does.
    """

    def __init__(self, config: NemotronHConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.head_dim**-0.5, True
        num_heads = config.size("num_attention_heads", layer_idx)
        self.num_key_value_groups = num_heads // config.num_key_value_heads
        self.attention_dropout, self.sliding_window = config.attention_dropout, config.size("sliding_window", layer_idx)
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        continues: bool = False,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(b, l, hidden) -> (b, l, hidden) and, from the eager implementation, weights (b, heads, l, past + l).
        `continues` says that these are tokens after cached ones, all of them real, see `attend_after`."""
        refuse_unknown(self, kwargs, PASSED_TO_ATTENTION)
        rows, cache = hidden_states.shape[:-1], one_cache(cache, past_key_values)
        query, key, value = (
            project(linear, hidden_states).view(*rows, -1, self.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        if self._decodes(query, attention_mask, cache):
            return project(self.o_proj, self._decode(query, key, value, attention_mask, cache).flatten(2)), None
        # with a mask (static caches) the general way would repeat keys and values for every query head, in memory
        grouped = query.device.type == "cpu" or attention_mask is not None
        if implementation == "sdpa" and self.sliding_window and attention_mask is None:
            dropout = self.attention_dropout if self.training else 0.0
            output, weights = attend_in_window(query, key, value, self.sliding_window, self.scaling, dropout), None
        elif implementation == "sdpa" and rows[1] == 1 and grouped and not self.training:
            output, weights = attend_one(query, key, value, attention_mask, self.scaling), None
        elif continues:
            output, weights = attend_after(query, key, value, self.scaling), None
        else:
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            window = {} if self.sliding_window is None else {"sliding_window": self.sliding_window}
            output, weights = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **window, **kwargs
            )
        return project(self.o_proj, output.reshape(*rows, -1)), weights

    def _decodes(self, query: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> bool:
        """Whether triton_attention.py takes this token: for static caches and for masks, where PyTorch's FlashAttention does not."""
        if cache is None or query.shape[2] != 1 or self.training or self.config._attn_implementation != "sdpa":
            return False
        static = isinstance(cache.layers[self.layer_idx], StaticLayer)
        if not (static or attention_mask is not None) or not is_key_mask(attention_mask):
            return False
        return attends_in_triton(query, self.head_dim, self.config.mamba_implementation)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, cache: Cache) -> Tensor:
        from .triton_attention import decode_attention  # Triton is imported only where it runs

        layer = cache.layers[self.layer_idx]
        length = layer.cumulative_length if isinstance(layer, StaticLayer) else key.shape[2]
        mask = attention_mask[:, 0, 0] if attention_mask is not None and attention_mask.dim() == 4 else attention_mask
        return decode_attention(query, key, value, length, mask, self.scaling)


def is_key_mask(mask: Tensor | None) -> bool:
    """Whether a mask only says which keys a row's one new token sees: (b, m) or (b, 1, 1, m), bool; None is such a mask too."""
    return mask is None or (mask.dtype == torch.bool and (mask.dim() == 2 or mask.shape[1:3] == (1, 1)))


def attend_one(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
    """SDPA for one new token per row: (b, heads, 1, d) -> (b, 1, heads, d). PyTorch is slow there with grouped keys on a CPU,
    and on a GPU with a mask. Queries that share a key head therefore become rows of one product, under the same mask."""
    grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])  # (b, kv heads, heads per kv head, d)
    output = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(query.shape[0], 1, -1, query.shape[-1])


def attend_in_window(
    query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float, dropout: float = 0.0
) -> Tensor:
    """SDPA where a token sees the last `window`, itself included; keys and values that no query sees are not read.

    query (b, heads, l, d), the last tokens of key and value (b, kv heads, past + l, d), all real -> (b, l, heads, d).
    """
    length = query.shape[2]
    seen = min(key.shape[2], length + window - 1)
    key, value = key[:, :, key.shape[2] - seen :], value[:, :, value.shape[2] - seen :]
    places = torch.arange(seen, device=query.device)
    distance = places[seen - length :, None] - places
    mask = None if length == 1 else (distance >= 0) & (distance < window)
    attend = nn.functional.scaled_dot_product_attention
    output = attend(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2)


def can_attend_after(x: Tensor, head_dim: int) -> bool:
    """Whether `attend_after` runs on x's device and in its dtype: on a CPU, or where PyTorch has FlashAttention."""
    if x.device.type == "cpu":
        return True
    flash = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    if x.device.type != "cuda" or not flash or x.dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def attend_after(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of tokens (b, heads, l, d) that follow others, all real, over keys and values (b, kv heads, past + l, d);
    ask `can_attend_after` first. With a mask PyTorch would hold l x (past + l) of it, and keys and values repeated for
    every query head. -> (b, l, heads, d)."""
    if query.device.type == "cpu":
        return attend_in_two(query, key, value, scaling)
    return attend_lower_right(query, key, value, scaling)


def attend_lower_right(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`attend_after` by FlashAttention (arXiv 2307.08691), whose causal mask ends at the lower right."""
    mask = causal_lower_right(query.shape[2], key.shape[2])
    attend = nn.functional.scaled_dot_product_attention
    return attend(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2)


def attend_in_two(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`attend_after` on a CPU: over the tokens before, which all of these see, and among themselves, merged by their
    log-sum-exps (arXiv 2205.14135, section 3.1)."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past = key.shape[2] - query.shape[2]
    before, log_before = attend(query, key[:, :, :past], value[:, :, :past], scale=scaling)
    among, log_among = attend(query, key[:, :, past:], value[:, :, past:], is_causal=True, scale=scaling)
    share = torch.sigmoid(log_before - log_among)[..., None].to(among.dtype)
    return torch.lerp(among, before, share).transpose(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for callers that want its weights: query (b, heads, l, d), key, value (b, kv heads, past + l, d)."""
    b, heads, l, d = query.shape
    query = query.reshape(b, key.shape[1], -1, d)  # (b, kv heads, heads per kv head * l, d)
    scores = (query @ key.transpose(-1, -2) * scaling).view(b, heads, l, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = weights.view(b, value.shape[1], -1, value.shape[2]) @ value
    return output.view(b, heads, l, d).transpose(1, 2), weights


def make_mixer(config: NemotronHConfig, kind: str, layer_idx: int) -> nn.Module:
    """The mixer of one layer."""
    mixers = {
        "linear_attention": lambda: NemotronHMamba2Mixer(config, layer_idx),
        "full_attention": lambda: NemotronHAttention(config, layer_idx),
        "mlp": lambda: NemotronHMLP(config, config.size("intermediate_size", layer_idx)),
        "moe": lambda: NemotronHMoE(config, layer_idx),
    }
    return mixers[kind]()


@remember_forward
class NemotronHBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x))."""

    _is_checkpointed = False

    def __init__(self, config: NemotronHConfig, layer_idx: int, kind: str) -> None:
        super().__init__()
        self.layer_idx, self.block_type = layer_idx, kind
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = make_mixer(config, kind, layer_idx)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether a forward is repeated in its backward pass; never without one, which keeps caches in use."""
        return self._is_checkpointed and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._is_checkpointed = value

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        padding: Padding | None = None,
        seq_idx: Tensor | None = None,
        continues: bool = False,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> Tensor:
        refuse_unknown(self, kwargs, PASSED_TO_ATTENTION)
        cache, taken = one_cache(cache, past_key_values), {}
        if self.block_type == "full_attention":
            taken = {"cache": cache, "attention_mask": attention_mask, "continues": continues, **kwargs}
        elif self.block_type == "linear_attention":
            taken = {"cache": cache, "padding": padding, "seq_idx": seq_idx}
        residual, hidden_states = hidden_states, self.norm(hidden_states)
        if self.residual_in_fp32:
            residual, hidden_states = residual.float(), hidden_states.to(self.norm.weight.dtype)
        output = self.mixer(hidden_states, **taken)
        if self.block_type == "full_attention":
            output, _ = output
        return residual + output


def run_blocks(
    blocks: Sequence[NemotronHBlock],
    norm: nn.Module | None,
    config: NemotronHConfig,
    hidden_states: Tensor,
    rows: Rows,
    cache: Cache | None,
    **kwargs: object,
) -> Tensor:
    """Blocks one after the other, then `norm`, over one stretch of tokens: (b, l, hidden) -> (b, l, hidden)."""
    windows = {block.mixer.sliding_window for block in blocks if block.block_type == "full_attention"}
    training = blocks[0].training
    masks = {window: _attention_mask(config, hidden_states, rows, cache, training, window) for window in windows}
    alone = rows.padding is None and rows.documents is None and not kwargs
    token = TokenRun(hidden_states, cache) if alone and can_take_token(config, hidden_states, training) else None
    for block in blocks:
        attends = block.block_type == "full_attention"
        mask, more = masks[block.mixer.sliding_window] if attends else (None, {})
        if token is not None:
            if token.add(block, mask):
                continue
            hidden_states = token.finish()
        hidden_states = block(
            hidden_states,
            cache=cache,
            attention_mask=mask,
            padding=rows.padding,
            seq_idx=rows.documents,
            **kwargs,
            **more,
        )
        if token is not None:
            token.start(hidden_states)
    if token is not None:
        return token.finish(norm)
    return hidden_states if norm is None else norm(hidden_states)


def _attention_mask(
    config: NemotronHConfig, embeds: Tensor, rows: Rows, cache: Cache | None, training: bool, window: int | None
) -> tuple[Tensor | None, dict]:
    """The mask in the form that the attention implementation wants, and what else the attention layers with that sliding
    window (None: without) must know."""
    if rows.is_masked:
        mask = rows.attention_mask
        return (mask[mask_name(window)] if isinstance(mask, dict) else mask), {}
    mask, documents = rows.real, rows.documents
    if documents is None:
        growing = cache is None or not cache.is_compileable
        if growing and config._attn_implementation == "sdpa":
            if embeds.shape[1] == 1 and mask is None:
                return None, {}  # one token sees everything before it
            if not training and _continues(embeds, config.head_dim, mask, cache):
                return None, {"continues": embeds.shape[1] > 1}
            if window is not None and mask is None:
                return None, {}  # the layer sees to its window
    elif "flash" in config._attn_implementation:
        return None, flash_offsets(documents, mask)
    within = within_window(window, mask, cache, documents)
    return create_causal_mask(config, embeds, mask, cache, and_mask_function=within), {}


def _continues(embeds: Tensor, head_dim: int, mask: Tensor | None, cache: Cache | None) -> bool:
    """Whether these are tokens after cached ones, all of them real, without gradients or tracing."""
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if traced or not can_attend_after(embeds, head_dim) or cache is None or not sequence_length(cache):
        return False
    return mask is None or bool(mask.all())
